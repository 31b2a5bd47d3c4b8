"""The two backends, Triton kernels and plain PyTorch, and the choice between them.

A backend is a module with the functions of `fastpref_kernels`, of the same signatures and meaning, and with
`row_stride`. What each function takes and returns is described there.
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
    """A backend's name, and in words why it was chosen."""

    name: str
    reason: str


def set_backend(name: str) -> None:
    """Choose the backend for the whole process: `"auto"` (the default), `"triton"` or `"portable"`.

    `"auto"` takes Triton for tensors on CUDA, ROCm and XPU devices, and the portable backend elsewhere. This call
    overrides the environment variable `FASTPREF_BACKEND`; `"auto"` hands the choice back to it.

    Raises:
        ValueError: the name is another one.
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
    """The backend for tensors on `device`, and why.

    Raises:
        ValueError: `FASTPREF_BACKEND` names none, or Triton is asked for on a device where it cannot run.
    """
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
    """The backend for the tensor's device, as a module."""
    return importlib.import_module(f"fastpref.backends.{choose(tensor.device).name}")
