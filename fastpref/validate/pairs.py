"""Rows of the table for paired objectives, three each: from sequence log-probs, from logits, from hidden states."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import reference
from fastpref.objectives.paired import PairedLoss, PreferenceOutput
from fastpref.ops.paired import SEPARABLE_EXCEPT
from fastpref.plans.units import UnitRows, unit_rows
from fastpref.validate import inputs
from fastpref.validate.ideal import Exact, Partition
from fastpref.validate.inputs import IGNORE, Inputs
from fastpref.validate.operator import EVERYTHING, Operator, Results, hidden_logps, slice_width

METRICS = frozenset(PreferenceOutput._fields[1:])
SUMS_FAMILIES = ("random", "tie", "extreme", "empty", "integers")
LOGITS_FAMILIES = ("random", "empty")
HIDDEN_FAMILIES = ("random", "empty", "integers")


class Objective(NamedTuple):
    """A paired objective, as one entry of the table of cases."""

    name: str
    loss: PairedLoss
    without: tuple[str, ...] = ()  # families that say nothing about this objective
    exact: bool = False  # loss and gradient are exact on integers; the metrics are, but for means


def operators(o: Objective) -> tuple[Operator, ...]:
    exact = EVERYTHING if o.exact else frozenset() if o.loss.objective.average else METRICS  # means are not exact

    def allowed(families: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f for f in families if f not in o.without)

    def from_sums(x: Inputs) -> Results:
        refs = (x.ref_chosen, x.ref_rejected) if o.loss.with_reference else (None, None)
        return _results(o.loss(x.chosen, x.rejected, *refs, x.chosen_lengths, x.rejected_lengths))

    def sums_formula(spec: Exact, x: Inputs) -> Results:
        sums = torch.cat([spec.keep(x.chosen), spec.keep(x.rejected)])
        refs = torch.cat([x.ref_chosen, x.ref_rejected])
        return _specified(spec, o.loss, sums, refs, torch.cat([x.chosen_lengths, x.rejected_lengths]).double())

    def from_logits(x: Inputs) -> Results:
        refs = x.ref_logps if o.loss.with_reference else None
        return _results(o.loss.from_logits(x.logits, x.labels, refs, x.cu_seqlens, **x.transform))

    def logits_formula(spec: Exact, x: Inputs) -> Results:
        return _from_tokens(spec, o.loss, x, spec.token_logprobs(x.logits, x.labels, **x.transform))

    def from_hidden(x: Inputs) -> Results:
        refs = x.ref_logps if o.loss.with_reference else None
        out = o.loss.from_hidden(
            labels=x.labels, ref_logps=refs, cu_seqlens=x.cu_seqlens, plan="pair",
            workspace_bytes=_room_for_one_pair(x), **x.floats, **x.transform,
        )  # fmt: skip
        return _results(out)

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        return _from_tokens(spec, o.loss, x, hidden_logps(spec, x, _pieces(o.loss, x)))

    common: dict[str, Any] = {"always_exact": frozenset(("accuracies",)), "exact": exact}
    return (
        Operator(
            f"{o.name} from log-probs", inputs.pair_sums, from_sums, sums_formula, ("chosen", "rejected"),
            allowed(SUMS_FAMILIES), half=False, group="paired losses from log-probs", **common,
        ),
        Operator(
            f"{o.name} from logits", inputs.pair_logits, from_logits, logits_formula, ("logits",),
            allowed(LOGITS_FAMILIES), group="paired losses from logits", composed=not o.exact, **common,
        ),
        Operator(
            f"{o.name} from hidden", inputs.pair_hidden, from_hidden, hidden_formula, ("hidden", "weight", "bias"),
            allowed(HIDDEN_FAMILIES), group="paired losses from hidden states", composed=not o.exact, **common,
        ),
    )  # fmt: skip


def _results(out: PreferenceOutput) -> Results:
    # An accuracy is the sign of a margin, and a margin near 0 may round to either side: hold it to the margin.
    return out._asdict() | {"accuracies": out.accuracies == (out.margins > 0)}


def _specified(spec: Exact, loss_fn: PairedLoss, sums: Tensor, refs: Tensor, lengths: Tensor) -> Results:
    o = loss_fn.objective
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    chosen, rejected = sums.chunk(2)
    ref_chosen, ref_rejected = refs.chunk(2) if loss_fn.with_reference else (None, None)
    per_pair = (ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, o)
    metrics = reference.paired_metrics(chosen.detach(), rejected.detach(), *per_pair)
    if loss_fn.with_reference and not set(o.losses) & set(SEPARABLE_EXCEPT):  # those compare policy with policy
        a, b = spec.stored(sums - refs).chunk(2)
        loss = reference.paired_loss(a, b, None, None, *per_pair[2:], chosen_nll_sums=chosen)
    else:
        loss = reference.paired_loss(chosen, rejected, *per_pair)
    return _results(PreferenceOutput(loss, *metrics))


def _from_tokens(spec: Exact, loss_fn: PairedLoss, x: Inputs, logps: Tensor) -> Results:
    lengths = reference.sequence_logprobs(torch.ones_like(logps), x.labels, cu_seqlens=x.cu_seqlens)
    return _specified(spec, loss_fn, spec.sequence_logprobs(logps, x.labels, x.cu_seqlens), x.ref_logps, lengths)


def _pair_rows(x: Inputs) -> tuple[UnitRows, int]:
    """Where the pairs' rows are, and how many the largest pair has."""
    pairs = unit_rows(x.labels, x.cu_seqlens, x.cu_seqlens.numel() - 1, 2, IGNORE)
    return pairs, max(pairs.size(i, i + 1) for i in range(pairs.number))


def _room_for_one_pair(x: Inputs) -> int:
    """A workspace so small that there are several groups, which is what the plan is for."""
    return _pair_rows(x)[1] * x.weight.shape[0] * x.weight.element_size()


def _pieces(loss_fn: PairedLoss, x: Inputs) -> Partition:
    pairs, largest = _pair_rows(x)
    if set(loss_fn.objective.losses) & set(SEPARABLE_EXCEPT):  # one group, larger than the workspace: recomputed
        return Partition(slice_width=slice_width(x, _room_for_one_pair(x)))
    return Partition(row_groups=tuple(pairs.of(pairs.rows, *group) for group in pairs.groups(largest)))
