"""TRL's own CPOTrainer, without logits: python examples/trl_patch.py MODEL_FOLDER OUTPUT_FOLDER"""

import sys

import torch
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer

from fastpref import models
from fastpref.data.pairs import sample_pairs
from fastpref.integrations import trl as fast_trl

fast_trl.patch()  # the one line
model, tokenizer = models.load(sys.argv[1])
data = Dataset.from_list([pair._asdict() for pair in sample_pairs()[0][:8]])
args = CPOConfig(
    sys.argv[2], max_length=256, per_device_train_batch_size=2, num_train_epochs=1, logging_steps=1,
    bf16=torch.cuda.is_available(),
)  # fmt: skip
CPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer).train()
