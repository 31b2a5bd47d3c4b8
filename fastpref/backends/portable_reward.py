"""The portable backend's rewards: scores of single rows and the Bradley-Terry loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients


def _picked(hidden: Tensor, index: Tensor, layout: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """(where each sequence's row lies in `hidden`, is there such a row). A missing one points at row 0."""
    limit = hidden.shape[1] if layout == "positions" else hidden.shape[0]
    begin = index[:-1] if layout == "edges" else 0
    row = (index[1:] - 1 if layout == "edges" else index).long()
    found = (row >= begin) & (row < limit)
    row = row.where(found, 0)
    if layout == "positions":
        return (torch.arange(row.shape[0], device=row.device), row), found
    return (row,), found


def _accumulate_in(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def row_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *, layout: str) -> Tensor:
    """As `fastpref_kernels.row_scores`."""
    dtype = _accumulate_in(hidden, weight, bias)
    where, found = _picked(hidden, index, layout)
    scores = (hidden[where].to(dtype) * weight.to(dtype)).sum(-1)
    if bias is not None:
        scores += bias.to(dtype)
    return scores.masked_fill_(~found, float("nan"))


def row_scores_gradient(
    grad: Tensor, scale: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, *,
    layout: str, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `fastpref_kernels.row_scores_gradient`."""
    dtype = _accumulate_in(hidden, weight, bias)
    where, found = _picked(hidden, index, layout)
    grad = grad.to(dtype) if scale is None else grad.to(dtype) * scale
    d_hidden = d_weight = d_bias = None
    if need_hidden:
        d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        # a row named twice gets both gradients, added before rounding; one that is missing adds nothing to row 0
        totals = grad.new_zeros(hidden.shape[:-1]).index_put_(where, grad.where(found, 0), accumulate=True)
        d_hidden[where] = (totals[where][:, None] * weight.to(dtype)).to(hidden.dtype)
    if need_weight:
        d_weight = (grad[:, None] * hidden[where].to(dtype)).sum(0).to(weight.dtype)
    if need_bias and bias is not None:
        d_bias = grad.sum().reshape(bias.shape).to(bias.dtype)
    return d_hidden, d_weight, d_bias


def bradley_terry(
    rewards: Tensor, margin: Tensor | None, *, center_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fastpref_kernels.bradley_terry`."""

    def formula(both: Tensor) -> Tensor:
        chosen, rejected = both.chunk(2)
        return reference.bradley_terry(chosen, rejected, margin, center_coefficient)

    loss, (coefs,) = value_and_gradients(formula, rewards)
    return loss, reference.reward_metrics(*rewards.chunk(2)), coefs
