"""Derivatives of the specification's formulas by autograd, for the portable backend."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


@functools.cache
def _worker(process: int, threads: int) -> ThreadPoolExecutor:
    """A thread that is kept from call to call. A new one for each call would also start a new OpenMP team.

    There is one for each process, since a fork has none of its parent's threads. There is one for each number of
    PyTorch's threads, since a thread keeps the number that it began with.
    """
    return ThreadPoolExecutor(1, "fastpref-derivatives")


def value_and_gradients(formula: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(value, gradients) of a scalar formula with respect to each argument, all detached.

    The formula runs on another thread. Inside an operator autograd is off, and torch.func refuses to run under
    saved-tensor hooks (checkpointing, offloading) or a dispatch mode (FLOP counters). All of these are state of one
    thread.

    Raises:
        RuntimeError: called out of a backward on an accelerator. Autograd has one thread for each device: it would
            wait here, and the formula's own backward needs it.
    """
    device = arguments[0].device
    if device.type != "cpu" and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"backend: got 'portable' on {device} in a forward that a backward runs again, want the loss outside of "
            "the checkpointed part, or backend='triton'"
        )
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def differentiate() -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.cuda.stream(stream):  # nothing if there is none
            leaves = [a.detach().requires_grad_() for a in arguments]
            value = formula(*leaves)
            return value.detach(), torch.autograd.grad(value, leaves, materialize_grads=True)

    return _worker(os.getpid(), torch.get_num_threads()).submit(differentiate).result()
