"""Derivatives of the specification's formulas, for the portable backend."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def value_and_gradients(formula: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A scalar formula and its gradient in each argument, all detached.

    On a thread of its own, about 0.1 ms: inside an operator autograd is off, torch.func refuses to run under
    saved-tensor hooks (checkpointing, offloading) or a dispatch mode (FLOP counters), and all of these are a
    thread's own state.
    """

    device = arguments[0].device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def differentiate() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.cuda.stream(stream):  # nothing if there is none
            leaves = [a.detach().requires_grad_() for a in arguments]
            value = formula(*leaves)
            return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(differentiate).result()
