"""SimPO with Accelerate: accelerate launch examples/accelerate_loop.py MODEL_FOLDER"""

import sys

import torch
from accelerate import Accelerator

from fastpref import SimPOLoss, models
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import sample_pairs
from fastpref.integrations.transformers import batch_loss, pair_batch

accelerator = Accelerator(gradient_accumulation_steps=2)
model, tokenizer = models.load(sys.argv[1])
pairs = tokenize_pairs(sample_pairs()[0][:8], tokenizer, max_length=256)
loader = torch.utils.data.DataLoader(pairs, 2, collate_fn=lambda p: pair_batch(p, tokenizer.pad_token_id))
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-5), loader)
for batch in loader:
    with accelerator.accumulate(model):
        out = batch_loss(SimPOLoss(), model, batch, accelerator)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"loss {out.loss.item():.4f}")
