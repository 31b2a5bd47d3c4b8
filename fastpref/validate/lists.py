"""Rows of the table for losses on ranked lists: from sequence log-probs, and from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.plans.units import UnitRows, unit_rows
from fastpref.validate import inputs
from fastpref.validate.ideal import Exact, Partition
from fastpref.validate.inputs import IGNORE, Draw, Inputs
from fastpref.validate.operator import Operator, Results, hidden_logps

BETA = 0.125  # a power of two, as in the paired rows
LOSSES = {
    "ListDPO plackett_luce": fastpref.ListDPOLoss(BETA),
    "ListDPO all_pairs": fastpref.ListDPOLoss(BETA, "all_pairs"),
    "ListDPO rao_kupper": fastpref.ListDPOLoss(BETA, "rao_kupper"),
    "ListDPO davidson": fastpref.ListDPOLoss(BETA, "davidson"),
}
HEAD = ("hidden", "weight", "bias")


def operators() -> tuple[Operator, ...]:
    return tuple(row for name, loss in LOSSES.items() for row in _lists(name, loss))


def _sizes(sequences: int) -> list[int]:
    """Of the groups: one response alone, then five or three of them each, ties among them."""
    sizes = [1]
    while sum(sizes) < sequences:
        sizes.append(min(5 if len(sizes) % 2 else 3, sequences - sum(sizes)))
    return sizes


def _ranked(draw: Draw, x: Inputs, sequences: int) -> Inputs:
    ranks = draw.integers(0, 4, sequences)
    sizes = _sizes(sequences)
    ranks[sum(sizes[:-1]) :] = 0  # the last group is of one rank alone
    return x._replace(fixed=x.fixed | {"ranks": ranks, "sizes": torch.tensor(sizes, device=draw.device)})


def _list_sums(draw: Draw) -> Inputs:
    x = inputs.pair_sums(draw)
    floats = {"logps": torch.cat([x.chosen, x.rejected])}
    fixed = {"ref_logps": torch.cat([x.ref_chosen, x.ref_rejected])}
    return _ranked(draw, Inputs(floats, fixed, {}), floats["logps"].numel())


def _list_hidden(draw: Draw) -> Inputs:
    x = inputs.pair_hidden(draw)
    return _ranked(draw, x, x.ref_logps.numel())


def _lists(name: str, loss: fastpref.ListDPOLoss) -> tuple[Operator, ...]:
    o = loss.objective

    def results(out: fastpref.ListOutput, x: Inputs) -> Results:
        # Who is right is the sign of a difference, which may round to either side: held to the rewards.
        held = reference.list_metrics(out.rewards / o.beta, None, x.ranks, _group(x), o)[2]
        return out._asdict() | {"correct": out.correct == held}

    def from_sums(x: Inputs) -> Results:
        return results(loss(x.logps, x.ref_logps, x.ranks, sizes=x.sizes.tolist()), x)

    def specified(spec: Exact, x: Inputs, sums: Tensor) -> Results:
        scores = o.beta * spec.stored(sums - x.ref_logps)
        total = reference.list_loss(scores, x.ranks, _group(x), o)
        metrics = reference.list_metrics(sums.detach(), x.ref_logps, x.ranks, _group(x), o)
        return results(fastpref.ListOutput(total, *metrics.unbind(0)), x)

    def units(x: Inputs) -> tuple[UnitRows, int]:
        """Where the groups' rows are, and how many the largest group has."""
        bounds = [0, *x.sizes.cumsum(0).tolist()]
        found = unit_rows(x.labels, x.cu_seqlens, bounds[-1], 1, IGNORE, bounds=bounds)
        return found, max(found.size(i, i + 1) for i in range(found.number))

    def from_hidden(x: Inputs) -> Results:
        out = loss.from_hidden(
            labels=x.labels, ranks=x.ranks, ref_logps=x.ref_logps, sizes=x.sizes.tolist(), cu_seqlens=x.cu_seqlens,
            plan="pair", workspace_bytes=units(x)[1] * x.weight.shape[0] * x.weight.element_size(),
            **x.floats, **x.transform,
        )  # fmt: skip
        return results(out, x)

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        found, rows = units(x)
        pieces = Partition(row_groups=tuple(found.of(found.rows, *group) for group in found.groups(rows)))
        return specified(spec, x, spec.sequence_logprobs(hidden_logps(spec, x, pieces), x.labels, x.cu_seqlens))

    always = frozenset(("correct", "compared", "best", "worst"))
    exact = frozenset(("logps", "rewards"))  # the losses are sigmoids and their logarithms
    return (
        Operator(
            f"{name} from log-probs", _list_sums, from_sums,
            lambda spec, x: specified(spec, x, spec.keep(x.logps)), ("logps",),
            ("random", "tie", "extreme", "empty", "integers"), always, exact, half=False,
            group="losses on lists from log-probs",
        ),
        Operator(
            f"{name} from hidden", _list_hidden, from_hidden, hidden_formula, HEAD, ("random", "empty", "integers"),
            always, exact, group="losses on lists from hidden states", composed=True,
        ),
    )  # fmt: skip


def _group(x: Inputs) -> Tensor:
    return torch.arange(x.sizes.numel(), device=x.sizes.device).repeat_interleave(x.sizes)
