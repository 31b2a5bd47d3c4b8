"""Operators of reward models: scores of single rows (a `[d] -> 1` head in fp32), the Bradley-Terry loss, and both."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import first_order_only, register_ready_coefs, without_autocast


def _accumulate_in(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def sequence_count(index: Tensor, layout: str) -> int:
    """How many sequences `index` tells apart."""
    return index.shape[0] - int(layout == "edges")  # a bool has no difference from a traced shape in torch 2.11


def _index_range(index: Tensor, layout: str, limit: int) -> None:
    """Check that `index` names rows that exist, below `limit`.

    An accelerator is not asked, which would be a host sync. There a row that does not exist scores NaN instead.
    """
    if not checks.free_to_read(index):
        return
    if layout == "edges":
        checks.packed_edges(index, limit)
        empty = (index.diff() == 0).nonzero()
        if len(empty):
            raise ValueError(f"cu_seqlens: got no rows in sequence {int(empty[0])}, want at least 1 in each")
        return
    bad = ((index < 0) | (index >= limit)).nonzero()
    if len(bad):
        at, unit = int(bad[0]), "position" if layout == "positions" else "row"
        raise ValueError(f"last_index: got {int(index[at])} for sequence {at}, want a {unit} in [0, {limit})")


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, layout: str) -> Tensor:
    _index_range(index, layout, hidden.shape[1] if layout == "positions" else hidden.shape[0])
    return backend_for(hidden).row_scores(hidden, weight, bias, index, layout=layout)


@torch.library.custom_op("fastpref::row_scores", mutates_args=())
@without_autocast
def row_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, layout: str) -> Tensor:
    """`hidden[row_s] . weight + bias` of each sequence `[S]`. Layouts as in `fastpref_kernels.row_scores`."""
    return _scores(hidden, weight, bias, index, layout)


@row_scores.register_fake
def _(hidden, weight, bias, index, layout):
    return hidden.new_empty(sequence_count(index, layout), dtype=_accumulate_in(hidden, weight, bias))


@torch.library.custom_op("fastpref::row_scores_gradient", mutates_args=())
@without_autocast
def row_scores_gradient(
    grad: Tensor, scale: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor,
    layout: str, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dH, dW, db) for the upstream gradient `grad` `[S]` times `scale` (0-d). Empty where not needed."""
    gradients = backend_for(hidden).row_scores_gradient(
        grad, scale, hidden, weight, bias, index, layout=layout,
        need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return d_hidden, d_weight, d_bias


@row_scores_gradient.register_fake
def _(grad, scale, hidden, weight, bias, index, layout, need_hidden, need_weight, need_bias):
    def gradient(of, needed):
        if of is None or not needed:
            return hidden.new_empty(0)
        return torch.empty(of.shape, dtype=of.dtype, device=of.device)

    return gradient(hidden, need_hidden), gradient(weight, need_weight), gradient(bias, need_bias)


first_order_only(row_scores_gradient)


def _gradients(ctx, grad: Tensor, scale: Tensor | None, saved) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, index = saved
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.fastpref.row_scores_gradient(grad, scale, hidden, weight, bias, index, ctx.layout, *needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


def _save_scores(ctx, inputs, output):
    hidden, weight, bias, index, ctx.layout = inputs
    ctx.save_for_backward(hidden, weight, bias, index)


def _backward_scores(ctx, grad):
    return *_gradients(ctx, grad, None, ctx.saved_tensors), None, None


row_scores.register_autograd(_backward_scores, setup_context=_save_scores)


@torch.library.custom_op("fastpref::bradley_terry", mutates_args=())
@without_autocast
def bradley_terry(
    rewards: Tensor, margin: Tensor | None, center_coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[4, B]`, d loss / d rewards `[2B]`) of `[B chosen; B rejected]` rewards.

    Metrics are those of `reference.reward_metrics`.
    """
    return backend_for(rewards).bradley_terry(rewards, margin, center_coefficient=center_coefficient)


@bradley_terry.register_fake
def _(rewards, margin, center_coefficient):
    return rewards.new_empty(()), rewards.new_empty(4, rewards.shape[0] // 2), torch.empty_like(rewards)


register_ready_coefs(bradley_terry, num_inputs=3)


@torch.library.custom_op("fastpref::linear_bradley_terry", mutates_args=())
@without_autocast
def linear_bradley_terry(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, margin: Tensor | None, layout: str,
    center_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`bradley_terry` of `row_scores`: two launches in the forward, and one in the backward for all gradients."""
    rewards = _scores(hidden, weight, bias, index, layout)
    return backend_for(hidden).bradley_terry(rewards, margin, center_coefficient=center_coefficient)


@linear_bradley_terry.register_fake
def _(hidden, weight, bias, index, margin, layout, center_coefficient):
    sequences, dtype = sequence_count(index, layout), _accumulate_in(hidden, weight, bias)
    shapes = ((), (4, sequences // 2), (sequences,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _save_linear(ctx, inputs, output):
    hidden, weight, bias, index, _, ctx.layout, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, index, output[2])


def _backward_linear(ctx, grad, *unused):
    if grad is None:
        return (None,) * 7
    *saved, coefs = ctx.saved_tensors
    return *_gradients(ctx, coefs, grad, saved), *(None,) * 4


linear_bradley_terry.register_autograd(_backward_linear, setup_context=_save_linear)
