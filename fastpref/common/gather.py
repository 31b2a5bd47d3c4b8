"""Reads rows through an index, with a gradient that is added up in one order: no atomics, so it is deterministic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x.index_select(0, index)` of `x` `[N, ...]` for an index `[M]` in which a row may be any number of times."""
    return _TakeRows.apply(x, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        ctx.save_for_backward(index)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return add_by_row(grad, *copies_by_row(index, ctx.rows)), None


def copies_by_row(index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(order `[M]` of the copies by row, offsets `[rows + 1]` of each row's copies in it), without a host sync."""
    order = index.argsort(stable=True)
    edges = torch.arange(rows + 1, device=index.device, dtype=index.dtype)
    return order, torch.searchsorted(index.index_select(0, order), edges)


def add_by_row(copies: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each row's copies: `[M, ...]` -> `[rows, ...]`, added up in at least fp32."""
    wide = copies.index_select(0, order).to(torch.promote_types(copies.dtype, torch.float32))
    return torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, initial=0).to(copies.dtype)
