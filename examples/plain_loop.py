"""DPO in a loop of one's own: python examples/plain_loop.py MODEL_FOLDER"""

import sys

import torch

import fastpref
from fastpref import models
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import sample_pairs
from fastpref.integrations.transformers import batch_loss, pair_batch, reference_logps

model, tokenizer = models.load(sys.argv[1])
models.output_head(model)  # says so if this model's head is not known
pairs = tokenize_pairs(sample_pairs()[0][:8], tokenizer, max_length=256)
batches = [pair_batch(pairs[i : i + 2], tokenizer.pad_token_id) for i in range(0, 8, 2)]
references = [reference_logps(model, batch) for batch in batches]
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
for batch, ref_logps in zip(batches, references, strict=True):
    out = batch_loss(fastpref.DPOLoss(beta=0.1), model, batch | {"ref_logps": ref_logps})
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"loss {out.loss.item():.4f}, margin {out.margins.mean().item():.4f}")
