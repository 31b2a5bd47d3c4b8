"""Loads models for inference, by the names that the commands take."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from fastpref import models
from fastpref.common import checks
from fastpref.common.terminal import hide_library_bars
from fastpref.models import adapters
from fastpref.models.vision import processing_class
from fastpref.objectives.reward import RewardHead

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--device` and `--dtype`."""
    parser.add_argument("--device", help="a torch device (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: float32 on a CPU, bfloat16 elsewhere)"
    )


def default_device(name: str | None = None) -> torch.device:
    """The device of that name. By default the GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or it is not on this machine.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # as torch was built without it, or found none
        raise ValueError(f"device: got {name!r}, want one that is here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def default_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name. By default float32 on a CPU, and bfloat16 elsewhere.

    Raises:
        ValueError: the name is not known.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    checks.choice("dtype", name, DTYPES)
    return DTYPES[name]


def _folder(name: str | os.PathLike[str]) -> str:
    return str(models.smollm2()) if name == "smollm2" else os.fspath(name)


def load_policy(name: str | os.PathLike[str], device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """(language model in eval mode, tokenizer or processor).

    `name` is a folder, a hub id, an adapter's folder (with peft installed), or `smollm2`. By default the device is the
    GPU if there is one, and the dtype is bfloat16 there and float32 on a CPU.
    """
    from transformers import AutoModelForCausalLM

    hide_library_bars()
    where = default_device(device)
    model = adapters.load(AutoModelForCausalLM, _folder(name), dtype=default_dtype(dtype, where))
    return models.inner_model(model).to(where).eval(), _tokenizer(name, model)  # the adapter stays in its layers


def load_reward_model(
    name: str | os.PathLike[str], device: str | None = None, dtype: str | None = None
) -> tuple[RewardHead, Any]:
    """(reward model in eval mode, tokenizer or processor).

    `name` is what `AutoModelForSequenceClassification` reads with one label, or an adapter of it.
    """
    hide_library_bars()
    where = default_device(device)
    model = RewardHead.from_pretrained(_folder(name), dtype=default_dtype(dtype, where))
    return model.to(where).eval(), _tokenizer(name, model.backbone)


def _tokenizer(name: str | os.PathLike[str], model: Any) -> Any:
    """The tokenizer, or the processor of a model that takes images."""
    return processing_class(model, adapters.tokenizer_source(_folder(name)))


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of weights, config and adapters. The same path can hold another model in the next round."""
    from fastpref.data.reference_cache import Fingerprint

    found = Fingerprint().weights(model.state_dict().items()).config(models.inner_model(model).config)
    return found.text(adapters.describe(model)).hexdigest()
