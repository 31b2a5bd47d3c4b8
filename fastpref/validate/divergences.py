"""Rows of the table for KL penalties: estimates, penalised rewards, and the exact divergence."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.plans import kl_plans, plans
from fastpref.reference import DIVERGENCES, KL_ESTIMATORS, LogitTransform
from fastpref.validate import inputs
from fastpref.validate.ideal import Exact, HeadInputs, Partition
from fastpref.validate.inputs import FAMILIES, IGNORE, Draw, Inputs
from fastpref.validate.operator import Operator, Results

BETA = 0.125  # a power of two, as in the paired rows
MIXTURE = 0.25  # the reference's weight in the mixture of a jsd
HEAD = ("hidden", "weight", "bias")


def operators() -> tuple[Operator, ...]:
    plans_of = (("frozen", ("hidden",)), ("store", HEAD), ("recompute", HEAD))
    return (
        *(row for name in KL_ESTIMATORS for row in _estimates(name)),
        *(_token_kl(direction) for direction in DIVERGENCES),
        *(_linear_token_kl(direction, *plan) for plan in plans_of for direction in DIVERGENCES),
    )


def _sampled(draw: Draw) -> Inputs:
    shape = (2 * draw.size.pairs, draw.size.tokens)
    logps, away = -3 * draw.uniform(*shape), draw.normal(*shape) * (800 if draw.family == "extreme" else 1)
    scores, mask = draw.normal(shape[0]), draw.uniform(*shape) < (0.5 if draw.family == "masked" else 0.9)
    if draw.family == "tie":
        away = torch.zeros_like(away)
    elif draw.family == "integers":
        logps, away, scores = logps.round(), (4 * away).round(), scores.round()
    elif draw.family == "empty":
        mask[1] = False
    floats = {"logps": logps.to(draw.dtype), "scores": scores.to(draw.dtype)}
    return Inputs(floats, {"ref_logps": floats["logps"] + away.to(draw.dtype), "mask": mask}, {})


def _estimates(name: str) -> tuple[Operator, ...]:
    def rewards_formula(spec: Exact, x: Inputs) -> Results:
        given = (x.scores, x.logps, x.ref_logps, x.mask, BETA, name)
        return dict(zip(("rewards", "sums"), reference.kl_penalized_rewards(*given), strict=True))

    def rewards(x: Inputs) -> Results:
        given = (x.scores, x.logps, x.ref_logps, x.mask, BETA, name)
        return fastpref.kl_penalized_rewards(*given, return_sums=True)._asdict()

    # k3 is an exponential: irrational for integers, beyond fp32 for a log-ratio of hundreds
    families = tuple(f for f in ("random", "tie", "extreme", "integers") if name != "k3" or f in ("random", "tie"))
    return (
        Operator(
            f"kl_estimate {name}", _sampled, lambda x: {"kl": fastpref.kl_estimate(x.logps, x.ref_logps, name)},
            lambda spec, x: {"kl": reference.kl_estimate(x.logps, x.ref_logps, name)}, ("logps",), families,
            half=False, group="kl_estimate",
        ),
        Operator(
            f"kl_penalized_rewards {name}", _sampled, rewards, rewards_formula, ("scores", "logps"),
            (*families, "masked", "empty"), half=False, group="kl_penalized_rewards",
        ),
    )  # fmt: skip


def _near(draw: Draw, value: Tensor, size: float) -> Tensor:
    """The reference's rows: near the policy's."""
    near = value + (draw.normal(*value.shape) * size).to(value.dtype)
    if draw.family == "integers":  # the same spikes, but in another row
        return value.roll(1, 0)
    if draw.family == "tie":  # no divergence at all
        near[::3] = value[::3]
    elif draw.family == "peaky":
        # Where both are sure of the same token the divergence is 1e-5. In fp32 it is known to some 1e-7 only: that is
        # what sums of exponentials near 1 keep. So some rows are less sure, as in any batch, and set the scale.
        near[::2] *= 0.25
    return near


def _kl_logits(draw: Draw) -> Inputs:
    x = inputs.logits(draw)
    floats = {"logits": x.logits, "ref_logits": _near(draw, x.logits, 1.0)}
    return Inputs(floats, {"mask": x.labels != IGNORE}, x.transform)


def _kl_head(draw: Draw) -> Inputs:
    x = inputs.head(draw)
    ref_weight = x.weight if draw.family in ("integers", "tie") else _near(draw, x.weight, 0.3 / draw.size.hidden**0.5)
    ref = {"ref_hidden": _near(draw, x.hidden, 0.3), "ref_weight": ref_weight}
    if "bias" in x.floats:
        ref["ref_bias"] = x.bias.clone()
    return x._replace(floats=x.floats | ref)


def _token_kl(direction: str) -> Operator:
    def fused(x: Inputs) -> Results:
        return {"kl": fastpref.token_kl(x.logits, x.ref_logits, direction, beta=MIXTURE, mask=x.mask, **x.transform)}

    def formula(spec: Exact, x: Inputs) -> Results:
        return {"kl": spec.token_kl(x.logits, x.ref_logits, x.mask, direction, MIXTURE, **x.transform)}

    families = _without_irrational(FAMILIES, direction)
    return Operator(
        f"token_kl {direction}", _kl_logits, fused, formula, ("logits",), families, large=True, group="token_kl"
    )


def _without_irrational(families: Iterable[str], direction: str) -> tuple[str, ...]:
    """Of integers a KL is an integer, bit for bit. A jsd has logarithms of the mixture's weights."""
    return tuple(f for f in families if f != "integers" or direction != "jsd")


def _linear_token_kl(direction: str, plan: str, wrt: tuple[str, ...]) -> Operator:
    def a_third(x: Inputs) -> int:
        """Room for a third of either model's logits."""
        return max(1, 2 * x.labels.numel() // 3) * x.weight.shape[0] * x.weight.element_size()

    def fused(x: Inputs) -> Results:
        out = fastpref.linear_token_kl(
            labels=x.labels, direction=direction, beta=MIXTURE, plan=plan, workspace_bytes=a_third(x), **x.floats,
            **x.transform,
        )  # fmt: skip
        return {name: value for name, value in out._asdict().items() if value is not None}

    def slice_width(x: Inputs) -> int:
        """The vocabulary's slices, as `fastpref.plans.kl_plans.backward_recompute` cuts them."""
        vocab, scored = x.weight.shape[0], int((x.labels != IGNORE).sum())
        head = plans.Head(x.weight, None, LogitTransform(), IGNORE)
        width = kl_plans.pair_tile_rows(head, scored, a_third(x)) * vocab // max(1, scored)
        return min(vocab, max(128, width // 128 * 128))

    def formula(spec: Exact, x: Inputs) -> Results:
        own, ref = (
            HeadInputs(x.floats[f"{of}hidden"], x.floats[f"{of}weight"], x.floats.get(f"{of}bias"))
            for of in ("", "ref_")
        )
        pieces = Partition(plan == "frozen", (), slice_width(x) if plan == "recompute" else None)
        kl = spec.linear_token_kl(own, ref, x.labels != IGNORE, direction, MIXTURE, pieces, **x.transform)
        found = {"kl": kl}
        aside = copy.copy(spec)  # its log-probs are results, and no loss is made of them
        aside.logps = []
        for name, head in (("logps", own), ("ref_logps", ref)):
            given = (head.hidden, head.weight, x.labels, head.bias, Partition())
            found[name] = aside.linear_token_logprobs(*given, **x.transform).detach()
        return found

    # reverse: K is as large as the log-ratio, thousands here, and d_weight beyond fp16. jsd: where one token has all
    # probability, K is the difference of two equal numbers, and none of its digits are known to anyone
    families = tuple(f for f in _without_irrational(FAMILIES, direction) if f != "extreme" or direction == "forward")
    return Operator(
        f"linear_token_kl {direction} {plan}", _kl_head, fused, formula, wrt, families,
        group=f"linear_token_kl {plan}", composed=(plan, direction) != ("store", "reverse"),
    )  # fmt: skip
