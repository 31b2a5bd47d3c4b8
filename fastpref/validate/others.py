"""Rows of the table for unpaired and policy-gradient losses, together with those of `lists`, `rewards` and
`divergences`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.objectives.policy import REDUCTIONS
from fastpref.plans import plans
from fastpref.plans.compact import compact
from fastpref.plans.head import tile_rows
from fastpref.plans.units import UnitRows, unit_rows
from fastpref.reference import LogitTransform
from fastpref.validate import divergences, inputs, lists, rewards
from fastpref.validate.ideal import Exact, Partition
from fastpref.validate.inputs import IGNORE, Draw, Inputs
from fastpref.validate.operator import Operator, Results, hidden_logps

BETA = 0.125  # a power of two, as in the paired rows
Z0 = 0.5
DELTA = 0.25
HEAD = ("hidden", "weight", "bias")


def operators() -> tuple[Operator, ...]:
    return (
        *(row for name, loss in UNPAIRED.items() for row in _unpaired(name, loss)),
        *lists.operators(),
        *rewards.operators(),
        *divergences.operators(),
        *(row for name, loss in POLICY.items() for row in _policy(name, loss)),
    )


def _bco() -> fastpref.BCOLoss:
    loss = fastpref.BCOLoss(BETA)
    loss.class_means, loss.class_counts = torch.tensor([2 * DELTA, 0.0]), torch.tensor([1, 1])  # DELTA is halfway
    return loss


UNPAIRED: dict[str, fastpref.KTOLoss | fastpref.BCOLoss] = {
    "KTO": fastpref.KTOLoss(BETA, 1.0, 1.5),
    "KTO apo_zero_unpaired": fastpref.KTOLoss(BETA, loss_type="apo_zero_unpaired"),
    "KTO class means": fastpref.KTOLoss(BETA, mean="class"),
    "BCO": _bco(),
}


def _with_classes(draw: Draw, x: Inputs, sequences: int) -> Inputs:
    desirable = torch.arange(sequences, device=draw.device) % 3 != 0
    if draw.family == "empty":  # so is a class
        desirable[:] = True
    return x._replace(fixed=x.fixed | {"desirable": desirable, "z0": torch.tensor(Z0, device=draw.device)})


def _unpaired_sums(draw: Draw) -> Inputs:
    x = inputs.pair_sums(draw)
    floats = {"logps": torch.cat([x.chosen, x.rejected])}
    fixed = {"ref_logps": torch.cat([x.ref_chosen, x.ref_rejected])}
    return _with_classes(draw, Inputs(floats, fixed, {}), floats["logps"].numel())


def _unpaired_hidden(draw: Draw) -> Inputs:
    x = inputs.pair_hidden(draw)
    return _with_classes(draw, x, x.ref_logps.numel())


def _unpaired(name: str, loss: fastpref.KTOLoss | fastpref.BCOLoss) -> tuple[Operator, ...]:
    def point(x: Inputs) -> dict[str, Any]:
        return {"update": False} if isinstance(loss, fastpref.BCOLoss) else {"kl": x.z0}

    def results(out: fastpref.UnpairedOutput) -> Results:
        return {"loss": out.loss, "logps": out.logps, "rewards": out.rewards}

    def from_sums(x: Inputs) -> Results:
        return results(loss(x.logps, x.desirable, x.ref_logps, **point(x)))

    def specified(spec: Exact, x: Inputs, sums: Tensor) -> Results:
        o, zero = loss.objective, torch.zeros_like(x.ref_logps)
        shift = {"kto": x.z0, "bco": x.z0 * (DELTA / Z0)}.get(o.loss)
        total = reference.unpaired_loss(spec.stored(sums - x.ref_logps), zero, x.desirable, shift, o)
        logps, rewards = reference.unpaired_metrics(sums.detach(), x.ref_logps, o)
        return {"loss": total, "logps": logps, "rewards": rewards}

    def edges(x: Inputs) -> tuple[UnitRows, int]:
        """Where the sequences' rows are, and how many two of the longest have."""
        units = unit_rows(x.labels, x.cu_seqlens, x.cu_seqlens.numel() - 1, 1, IGNORE)
        return units, 2 * max(units.size(i, i + 1) for i in range(units.number))

    def from_hidden(x: Inputs) -> Results:
        out = loss.from_hidden(
            labels=x.labels, desirable=x.desirable, ref_logps=x.ref_logps, cu_seqlens=x.cu_seqlens, plan="pair",
            workspace_bytes=edges(x)[1] * x.weight.shape[0] * x.weight.element_size(),
            **point(x), **x.floats, **x.transform,
        )  # fmt: skip
        return results(out)

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        units, rows = edges(x)
        pieces = Partition(row_groups=tuple(units.of(units.rows, *group) for group in units.groups(rows)))
        logps = hidden_logps(spec, x, pieces)
        return specified(spec, x, spec.sequence_logprobs(logps, x.labels, x.cu_seqlens))

    exact = frozenset(("logps", "rewards"))  # the losses are sigmoids and their logarithms
    return (
        Operator(
            f"{name} from log-probs", _unpaired_sums, from_sums,
            lambda spec, x: specified(spec, x, spec.keep(x.logps)), ("logps",),
            ("random", "tie", "extreme", "empty", "integers"), exact=exact, half=False,
            group="unpaired losses from log-probs",
        ),
        Operator(
            f"{name} from hidden", _unpaired_hidden, from_hidden, hidden_formula, HEAD, ("random", "empty", "integers"),
            exact=exact, group="unpaired losses from hidden states", composed=True,
        ),
    )  # fmt: skip


POLICY = {
    "PolicyGradient grpo": fastpref.PolicyGradientLoss(0.2, 0.28, beta=0.04, entropy_coef=0.01, loss_type="grpo"),
    "PolicyGradient dapo": fastpref.PolicyGradientLoss(0.2, 0.28, loss_type="dapo"),
}
# log-ratios on either side of both ends of the clip range, further from them than rounding moves a log-prob
LOG_RATIOS = (-0.6, -0.1, 0.1, 0.6)


def _advantaged(draw: Draw, x: Inputs) -> Inputs:
    """With log-probs of the sampling policy and the reference, and an advantage per sequence."""
    if "logits" in x.floats:
        logps = reference.token_logprobs(x.logits.double(), x.labels, **x.transform)
    else:
        wide = {name: value.double() for name, value in x.floats.items()}
        logps = reference.linear_token_logprobs(labels=x.labels, **wide, **x.transform)
    away = torch.tensor(LOG_RATIOS, device=draw.device)[draw.integers(0, len(LOG_RATIOS), *logps.shape)]
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    fixed = {
        "old_logps": (logps - away).to(dtype),
        "ref_logps": (logps + draw.normal(*logps.shape)).to(dtype),
        "advantages": draw.normal(x.ref_logps.numel()),
    }
    return x._replace(fixed=x.fixed | fixed)


def _policy(name: str, loss: fastpref.PolicyGradientLoss) -> tuple[Operator, ...]:
    o = loss.objective

    def results(out: fastpref.PolicyOutput) -> Results:
        # together, since one number has no norm that an error could be judged by
        return {"loss": out.loss, "logps": out.logps, "means": torch.stack(out[2:])}

    def given(x: Inputs) -> dict[str, Any]:
        names = ("labels", "advantages", "old_logps", "ref_logps", "cu_seqlens")
        return {name: x.fixed[name] for name in names} | x.floats | x.transform

    def specified(spec: Exact, x: Inputs, logps: Tensor, entropy: Tensor) -> Results:
        lengths = [b - a for a, b in reference.sequence_bounds(x.labels, x.cu_seqlens)]
        advantages = x.advantages.repeat_interleave(torch.tensor(lengths, device=x.labels.device))
        ref = x.ref_logps.reshape(-1) if o.beta else None
        bonus = spec.keep(entropy).reshape(-1) if o.entropy_coef else None
        losses, metrics = reference.policy_token_losses(
            spec.keep(logps).reshape(-1), x.old_logps.reshape(-1), ref, advantages, bonus, o
        )
        weights = reference.policy_token_weights(
            x.labels, x.cu_seqlens, REDUCTIONS[loss.loss_type], IGNORE, None, losses.dtype
        )
        scored = (x.labels != IGNORE).reshape(-1)
        ratio, kl, clipped = metrics
        per_token = torch.stack([entropy.detach().reshape(-1), kl, ratio, clipped])
        means = (per_token * scored).sum(1) / scored.sum().clamp(min=1)
        return {"loss": (losses * weights).sum(), "logps": logps.detach(), "means": means}

    def logits_formula(spec: Exact, x: Inputs) -> Results:
        found = spec.token_statistics(x.logits, x.labels, **x.transform)
        assert found.entropy is not None
        return specified(spec, x, found.logps, found.entropy)

    def tile(x: Inputs) -> int:
        """Rows in half of the batch's logits, which come in two tiles."""
        return max(16, int((x.labels != IGNORE).sum()) // 2)

    def from_hidden(x: Inputs) -> Results:
        room = tile(x) * x.weight.shape[0] * x.weight.element_size()
        return results(loss.from_hidden(workspace_bytes=room, **given(x)))

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        rows = compact(x.labels, IGNORE)
        head = plans.Head(x.weight, None, LogitTransform(), IGNORE)
        step = tile_rows(head, rows.numel(), tile(x) * x.weight.shape[0] * x.weight.element_size())
        pieces = Partition(row_groups=rows.split(step))
        bias = x.floats.get("bias")
        logps, entropy = spec.linear_token_statistics(x.hidden, x.weight, x.labels, bias, pieces, **x.transform)
        return specified(spec, x, logps, entropy)

    # integers: a token mean is not exact; extreme: a spacing of 1e-3 in a log-prob, then the exponential of it
    return (
        Operator(
            f"{name} from logits", lambda draw: _advantaged(draw, inputs.pair_logits(draw)),
            lambda x: results(loss.from_logits(**given(x))), logits_formula, ("logits",),
            ("random", "peaky", "masked", "empty", "transform"), group="policy gradient from logits", composed=True,
        ),
        Operator(
            f"{name} from hidden", lambda draw: _advantaged(draw, inputs.pair_hidden(draw)),
            from_hidden, hidden_formula, HEAD, ("random", "peaky", "empty", "transform"),
            group="policy gradient from hidden states", composed=True,
        ),
    )  # fmt: skip
