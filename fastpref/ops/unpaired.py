"""Operators of unpaired losses: from log-probs, and from hidden states with gradients formed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import decoder, register_ready_coefs, wide, without_autocast
from fastpref.ops.linear import fake_gradients, head_of, present, register_ready_gradients
from fastpref.plans import fused, plans
from fastpref.reference import UnpairedObjective

decode = decoder(UnpairedObjective)


@torch.library.custom_op("fastpref::unpaired_loss", mutates_args=())
@without_autocast
def unpaired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor, desirable: Tensor,
    shift: Tensor | None, objective: str, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[2, S]`, d loss / d token_logps `[N]`). Metrics are those of `reference.unpaired_metrics`."""
    checks.packed_edges(cu_seqlens, token_logps.numel())
    return backend_for(token_logps).unpaired_loss(
        token_logps, labels, cu_seqlens, ref_logps, desirable, shift, decode(objective),
        first_sequence=0, num_sequences=desirable.numel(), ignore_index=ignore_index,
    )  # fmt: skip


@unpaired_loss.register_fake
def _(token_logps, labels, cu_seqlens, ref_logps, desirable, shift, objective, ignore_index):
    return token_logps.new_empty(()), token_logps.new_empty(2, desirable.numel()), torch.empty_like(token_logps)


register_ready_coefs(unpaired_loss, num_inputs=8)


@torch.library.custom_op("fastpref::linear_unpaired_loss", mutates_args=())
@without_autocast
def linear_unpaired_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_logps: Tensor, desirable: Tensor,
    shift: Tensor | None, cu_seqlens: Tensor | None, ignore_index: int, temperature: float, logit_scale: float,
    softcap: float | None, objective: str, workspace_bytes: int | None,
    need_hidden: bool, need_weight: bool, need_bias: bool, compute_weight: Tensor | None = None,
    edges: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[2, S]`, dH, dW, db) by plan `pair`. The gradients are in fp32, and empty where not needed."""
    checks.label_range(labels, weight.shape[0], ignore_index)
    checks.packed_edges(cu_seqlens, labels.numel())
    o = decode(objective)

    def group_loss(logps: Tensor, offsets: Tensor, rows: Tensor, first: int, last: int):
        return backend_for(logps).unpaired_loss(
            logps, None, offsets, ref_logps[first:last], desirable, shift, o,
            first_sequence=first, num_sequences=last - first, ignore_index=ignore_index,
        )  # fmt: skip

    head = head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap)
    loss, metrics, gradients = fused.forward_units(
        hidden, head, labels, cu_seqlens,
        desirable.numel(), 1, plans.Needs(need_hidden, need_weight, need_bias), workspace_bytes,
        separable=True, group_loss=group_loss, edges=edges,
    )  # fmt: skip
    return loss, metrics, *present(gradients, hidden)


@linear_unpaired_loss.register_fake
def _(
    hidden, weight, labels, bias, ref_logps, desirable, shift, cu_seqlens, ignore_index, temperature, logit_scale,
    softcap, objective, workspace_bytes, need_hidden, need_weight, need_bias, *_,
):  # fmt: skip
    dtype = wide(hidden.dtype)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(2, desirable.numel(), dtype=dtype)
    return loss, metrics, *fake_gradients(hidden, weight, bias, needs)


register_ready_gradients(linear_unpaired_loss, num_inputs=19)
