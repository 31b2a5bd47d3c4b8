"""Operators of losses on lists: from log-probs, and from hidden states with gradients formed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import decoder, register_ready_coefs, wide, without_autocast
from fastpref.ops.linear import fake_gradients, head_of, present, register_ready_gradients
from fastpref.plans import fused, plans
from fastpref.reference import ListObjective, compared_groups

decode = decoder(ListObjective)


@torch.library.custom_op("fastpref::list_loss", mutates_args=())
@without_autocast
def list_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None, ranks: Tensor,
    group: Tensor, objective: str, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, S]`, d loss / d token_logps `[N]`). Metrics are those of `reference.list_metrics`."""
    checks.packed_edges(cu_seqlens, token_logps.numel())
    return backend_for(token_logps).list_loss(
        token_logps, labels, cu_seqlens, ref_logps, ranks, group, None, decode(objective), ignore_index=ignore_index
    )


@list_loss.register_fake
def _(token_logps, labels, cu_seqlens, ref_logps, ranks, group, objective, ignore_index):
    return token_logps.new_empty(()), token_logps.new_empty(6, ranks.numel()), torch.empty_like(token_logps)


register_ready_coefs(list_loss, num_inputs=8)


@torch.library.custom_op("fastpref::linear_list_loss", mutates_args=())
@without_autocast
def linear_list_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_logps: Tensor, ranks: Tensor,
    group: Tensor, bounds: list[int], cu_seqlens: Tensor | None, ignore_index: int, temperature: float,
    logit_scale: float, softcap: float | None, objective: str, workspace_bytes: int | None,
    need_hidden: bool, need_weight: bool, need_bias: bool, compute_weight: Tensor | None = None,
    edges: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, S]`, dH, dW, db) by plan `pair`. The gradients are in fp32, and empty where not needed.

    A unit is the sequences `bounds[u]:bounds[u + 1]`, with whole groups in it.
    """
    checks.label_range(labels, weight.shape[0], ignore_index)
    checks.packed_edges(cu_seqlens, labels.numel())
    o = decode(objective)
    total = compared_groups(ranks, group, o)

    def group_loss(logps: Tensor, offsets: Tensor, rows: Tensor, first: int, last: int):
        here = slice(bounds[first], bounds[last])
        return backend_for(logps).list_loss(
            logps, None, offsets, ref_logps[here], ranks[here], group[here], total, o, ignore_index=ignore_index
        )

    head = head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap)
    loss, metrics, gradients = fused.forward_units(
        hidden, head, labels, cu_seqlens, ranks.numel(), 1, plans.Needs(need_hidden, need_weight, need_bias),
        workspace_bytes, separable=True, group_loss=group_loss, edges=edges, bounds=bounds,
    )  # fmt: skip
    return loss, metrics, *present(gradients, hidden)


@linear_list_loss.register_fake
def _(
    hidden, weight, labels, bias, ref_logps, ranks, group, bounds, cu_seqlens, ignore_index, temperature, logit_scale,
    softcap, objective, workspace_bytes, need_hidden, need_weight, need_bias, *_,
):  # fmt: skip
    dtype = wide(hidden.dtype)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(6, ranks.numel(), dtype=dtype)
    return loss, metrics, *fake_gradients(hidden, weight, bias, needs)


register_ready_gradients(linear_list_loss, num_inputs=20)
