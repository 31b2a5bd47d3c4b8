"""What the matrix trains: a tiny model with a head of its own, four pairs, adapters of every kind."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests import trl_hosts
from tests.support_ranks import tiny

FOLDERS = "FASTPREF_MATRIX_FOLDERS"  # of the checkpoints, for ranks
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "weights": torch.bfloat16, "fp32": torch.float32}


@functools.cache
def folder(seed: int = 0) -> str:
    """An untied tiny model, so that the head can be frozen or trained by itself; logits of size 1."""
    if FOLDERS in os.environ:
        return os.environ[FOLDERS].split(os.pathsep)[seed]
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    model, tokenizer = tiny(seed, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    for part in (model, tokenizer):
        part.save_pretrained(path)
    return path


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder())


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids of all that there is: one batch, of one rank or of two."""
    found = []
    for row in trl_hosts.dataset("dpo"):
        prompt = tokenizer()(row["prompt"])["input_ids"]
        texts = (row["prompt"] + row[side] + tokenizer().eos_token for side in ("chosen", "rejected"))
        found.append((prompt, *(tokenizer()(text)["input_ids"][len(prompt) :] for text in texts)))
    return found


def sequences(pairs: list[tuple[list[int], list[int], list[int]]]) -> list[tuple[list[int], int]]:
    """[B chosen; B rejected] as (ids, where the completion begins)."""
    return [(prompt + sides[i], len(prompt)) for i in (0, 1) for prompt, *sides in pairs]


def base(trains: str, precision: str, seed: int = 0) -> Any:
    dtype = torch.bfloat16 if precision == "weights" else torch.float32
    more = {}
    if trains == "qlora":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(folder(seed), dtype=dtype, **more)


def lora(trains: str) -> Any:
    from peft import LoraConfig

    saved = ["lm_head"] if trains == "saved" else None
    return LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=saved,
        task_type="CAUSAL_LM",
    )  # fmt: skip


def adapted(model: Any, trains: str) -> Any:
    """What a user does to a model before training, or a trainer with `peft_config`."""
    if trains == "frozen":
        model.lm_head.requires_grad_(False)
    if trains in ("all", "frozen"):
        return model
    from peft import get_peft_model

    torch.manual_seed(3)  # of the adapters
    return get_peft_model(model, lora(trains))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """On every rank, in fp64, what was quantised as it is multiplied."""
    found = {}
    for name, value in model.named_parameters():
        state = getattr(value, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            found[name] = dequantize_4bit(value.data, state).double()
        else:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = whole.detach().double()
    return found


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, value in model.named_parameters():
        if value.grad is not None:
            whole = value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
            found[name] = whole.detach().double()
    return found
