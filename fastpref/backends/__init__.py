"""Two implementations of one contract, and the choice between them.

A backend is a module with the functions of `fastpref_kernels`, of the same signatures and meaning, and `row_stride`.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

CHOICES = ("auto", "triton", "portable")
ACCELERATORS = ("cuda", "xpu")  # ROCm devices call themselves cuda

_forced: str | None = None


class Choice(NamedTuple):
    name: str
    reason: str


def set_backend(name: str) -> None:
    """Choose the backend for the whole process: `"auto"` (the default), `"triton"` or `"portable"`.

    Overrides the environment variable `FASTPREF_BACKEND`. Raises `ValueError` on any other name.
    """
    global _forced
    _forced = None if _checked(name, "set_backend(name)") == "auto" else name


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source}: got {name!r}, want one of {', '.join(CHOICES)}")
    return name


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(device: torch.device) -> Choice:
    """The backend for tensors on `device`, and why."""
    wanted, source = _forced, "set_backend"
    if wanted is None:
        wanted, source = os.environ.get("FASTPREF_BACKEND", "auto"), "FASTPREF_BACKEND"
        _checked(wanted, source)
    if wanted == "portable":
        return Choice("portable", f"{source} asks for it")
    accelerated = device.type in ACCELERATORS
    if wanted == "triton":
        if not accelerated and not _interpreting():
            raise ValueError(
                f"{source}: got 'triton' for tensors on {device.type!r}, want a CUDA, ROCm or XPU device "
                "(or TRITON_INTERPRET=1, set before Python starts, to run the kernels slowly on the CPU)"
            )
        return Choice("triton", f"{source} asks for it")
    if not accelerated:
        return Choice("portable", f"Triton does not run on {device.type}")
    try:
        importlib.import_module("triton")
    except ImportError:
        return Choice("portable", "triton is not installed")
    return Choice("triton", f"tensors are on {device.type}")


def backend_for(tensor: torch.Tensor) -> ModuleType:
    return importlib.import_module(f"fastpref.backends.{choose(tensor.device).name}")
