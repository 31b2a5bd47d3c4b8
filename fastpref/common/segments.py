"""Sums over sequences of packed values: deterministic, differentiable, and added up in fp64 where a device has it."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_dtype(values: Tensor) -> torch.dtype:
    """The dtype to sum `values` in: fp64 where the device has it.

    Added up one by one in fp32, 500 log-probs of -11 lose a relative 1e-6. A pair's margin is the difference of two
    such sums, and turns that into 2e-5 of its gradient.
    """
    return torch.float64 if values.device.type in ("cpu", "cuda") else values.dtype


def segment_sums(values: Tensor, sizes: Tensor) -> Tensor:
    """Sums of consecutive segments of `values` `[N]`, whose lengths are `sizes` `[S]`: `[S]` in `sum_dtype`."""
    return torch.segment_reduce(values.to(sum_dtype(values)), "sum", lengths=sizes, unsafe=True)
