"""DPO with LoRA in transformers.Trainer: python examples/trainer.py MODEL_FOLDER OUTPUT_FOLDER"""

import functools
import sys

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import fastpref
from fastpref import models
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import sample_pairs
from fastpref.integrations.transformers import PreferenceLossMixin, pair_batch


class DPOTrainer(PreferenceLossMixin, Trainer): ...


model, tokenizer = models.load(sys.argv[1])
model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
data = tokenize_pairs(sample_pairs()[0][:8], tokenizer, max_length=256)
args = TrainingArguments(sys.argv[2], per_device_train_batch_size=2, logging_steps=1, remove_unused_columns=False)
collate = functools.partial(pair_batch, pad_token_id=tokenizer.pad_token_id)
DPOTrainer(model, args, collate, data, loss_fn=fastpref.DPOLoss(), ref_model="adapters").train()
