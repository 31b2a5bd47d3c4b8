"""Operators of paired losses: from log-probs, and from hidden states with gradients formed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.common.segments import segment_sums
from fastpref.ops.common import decoder, register_ready_coefs, wide, without_autocast
from fastpref.ops.linear import fake_gradients, head_of, present, register_ready_gradients
from fastpref.plans import fused, plans
from fastpref.reference import PairedObjective, pair_confidence

SEPARABLE_EXCEPT = ("aot", "aot_unpaired")  # these sort across the batch

decode = decoder(PairedObjective)


def _chosen_tokens(objective: PairedObjective, labels, cu_seqlens, lengths, pairs: int, ignore_index: int):
    """How many tokens of all chosen completions are scored, 0-d: what an `sft` term is divided by. Else None."""
    if "sft" not in objective.losses:
        return None
    if labels is None:
        return lengths[:pairs].sum()
    scored = labels != ignore_index
    if cu_seqlens is None:
        return scored[: scored.numel() // 2].sum()
    return (scored & (torch.arange(scored.numel(), device=scored.device) < cu_seqlens[pairs])).sum()


@torch.library.custom_op("fastpref::paired_loss", mutates_args=())
@without_autocast
def paired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None,
    lengths: Tensor | None, pair_weights: Tensor | None, objective: str, num_pairs: int, ignore_index: int,
    token_weights: Tensor | None = None, nll_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, B]`, d loss / d token_logps `[N]`). Metrics are those of `reference.paired_metrics`."""
    checks.packed_edges(cu_seqlens, token_logps.numel())
    o = decode(objective)
    return backend_for(token_logps).paired_loss(
        token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights,
        _chosen_tokens(o, labels, cu_seqlens, lengths, num_pairs, ignore_index) if nll_tokens is None else nll_tokens,
        o,
        num_pairs=num_pairs, total_pairs=num_pairs, ignore_index=ignore_index, token_weights=token_weights,
    )  # fmt: skip


@paired_loss.register_fake
def _(token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights, objective, num_pairs, ignore_index, *_):
    return token_logps.new_empty(()), token_logps.new_empty(6, num_pairs), torch.empty_like(token_logps)


register_ready_coefs(paired_loss, num_inputs=11)


@torch.library.custom_op("fastpref::linear_paired_loss", mutates_args=())
@without_autocast
def linear_paired_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_logps: Tensor | None,
    cu_seqlens: Tensor | None, ignore_index: int, temperature: float, logit_scale: float, softcap: float | None,
    objective: str, num_pairs: int, workspace_bytes: int | None,
    need_hidden: bool, need_weight: bool, need_bias: bool, lengths: Tensor | None = None,
    token_weights: Tensor | None = None, confidence: bool = False, nll_tokens: Tensor | None = None,
    compute_weight: Tensor | None = None, edges: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, B]`, dH, dW, db) by plan `pair`. The gradients are in fp32, and empty where not needed.

    With `confidence` pairs are weighed as in WPO. `edges`: see `fastpref.plans.units.unit_rows`.
    """
    checks.label_range(labels, weight.shape[0], ignore_index)
    checks.packed_edges(cu_seqlens, labels.numel())
    o = decode(objective)
    chosen_tokens = nll_tokens
    if chosen_tokens is None:
        chosen_tokens = _chosen_tokens(o, labels, cu_seqlens, None, num_pairs, ignore_index)

    def of_group(values: Tensor | None, first: int, last: int) -> Tensor | None:
        return None if values is None else values.view(2, num_pairs)[:, first:last].reshape(-1)

    def group_loss(logps: Tensor, offsets: Tensor, rows: Tensor, first: int, last: int, log_sum_sq=None):
        pair_weights = None
        if log_sum_sq is not None:
            sizes = offsets.diff()
            sums = segment_sums(logps, sizes), segment_sums(log_sum_sq, sizes)
            pair_weights = pair_confidence(*sums, sizes).to(logps.dtype)
        return backend_for(logps).paired_loss(
            logps, None, offsets, of_group(ref_logps, first, last), of_group(lengths, first, last), pair_weights,
            chosen_tokens, o, num_pairs=last - first, total_pairs=num_pairs, ignore_index=ignore_index,
            token_weights=None if token_weights is None else token_weights[rows],
        )  # fmt: skip

    head = head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap)
    loss, metrics, gradients = fused.forward_units(
        hidden, head, labels, cu_seqlens,
        2 * num_pairs, 2, plans.Needs(need_hidden, need_weight, need_bias), workspace_bytes,
        separable=not set(o.losses) & set(SEPARABLE_EXCEPT), group_loss=group_loss,
        statistics=("log_sum_sq",) if confidence else (), edges=edges,
    )  # fmt: skip
    return loss, metrics, *present(gradients, hidden)


@linear_paired_loss.register_fake
def _(
    hidden, weight, labels, bias, ref_logps, cu_seqlens, ignore_index, temperature, logit_scale, softcap, objective,
    num_pairs, workspace_bytes, need_hidden, need_weight, need_bias, *_,
):  # fmt: skip
    dtype = wide(hidden.dtype)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    loss, metrics = hidden.new_empty((), dtype=dtype), hidden.new_empty(6, num_pairs, dtype=dtype)
    return loss, metrics, *fake_gradients(hidden, weight, bias, needs)


register_ready_gradients(linear_paired_loss, num_inputs=22)
