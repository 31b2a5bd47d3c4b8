"""Rows of the objectives that are not paired: unpaired, reward model, process reward, KL penalty, policy gradient."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import fastpref
from fastpref import kl_plans, plans, reference
from fastpref.policy import REDUCTIONS
from fastpref.reference import KL_DIRECTIONS, KL_ESTIMATORS, LogitTransform
from fastpref.unpaired import UnpairedLoss
from fastpref.validate import inputs
from fastpref.validate.ideal import Exact, HeadInputs, Partition
from fastpref.validate.inputs import FAMILIES, IGNORE, Draw, Inputs
from fastpref.validate.operator import Operator, Results, hidden_logps

BETA = 0.125  # a power of two, as in the paired rows
Z0 = 0.5
DELTA = 0.25
MARGIN_CENTER = 0.25
HEAD = ("hidden", "weight", "bias")


def operators() -> tuple[Operator, ...]:
    return (*_unpaired(), *_rewards(), *_process_rewards(), *_kl(), *_policy())


# ---- unpaired


def _bco() -> fastpref.BCOLoss:
    loss = fastpref.BCOLoss(BETA)
    loss.class_means, loss.class_counts = torch.tensor([2 * DELTA, 0.0]), torch.tensor([1, 1])  # halfway: DELTA
    return loss


UNPAIRED: dict[str, UnpairedLoss] = {
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


def _unpaired() -> list[Operator]:
    return [row for name, loss in UNPAIRED.items() for row in _unpaired_rows(name, loss)]


def _unpaired_rows(name: str, loss: UnpairedLoss) -> tuple[Operator, ...]:
    def point(x: Inputs) -> dict[str, Any]:
        return {"update": False} if isinstance(loss, fastpref.BCOLoss) else {"kl": x.z0}

    def results(out: fastpref.UnpairedOutput) -> Results:
        return {"loss": out.loss, "logps": out.logps, "rewards": out.rewards}

    def specified(spec: Exact, x: Inputs, sums: Tensor) -> Results:
        o, zero = loss.objective, torch.zeros_like(x.ref_logps)
        shift = {"kto": x.z0, "bco": x.z0 * (DELTA / Z0)}.get(o.loss)
        total = reference.unpaired_loss(spec.stored(sums - x.ref_logps), zero, x.desirable, shift, o)
        logps, rewards = reference.unpaired_metrics(sums.detach(), x.ref_logps, o)
        return {"loss": total, "logps": logps, "rewards": rewards}

    def edges(x: Inputs) -> tuple[plans.UnitRows, int]:
        """Where the sequences' rows are, and how many two of the longest have."""
        units = plans.unit_rows(x.labels, x.cu_seqlens, x.cu_seqlens.numel() - 1, 1, IGNORE)
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
        pieces = Partition(row_groups=tuple(units.rows[units.of(*group)] for group in units.groups(rows)))
        logps = hidden_logps(spec, x, pieces)
        return specified(spec, x, spec.sequence_logprobs(logps, x.labels, x.cu_seqlens))

    exact = frozenset(("logps", "rewards"))  # the losses are sigmoids and their logarithms
    return (
        Operator(
            f"{name} from log-probs", _unpaired_sums, lambda x: results(loss(x.logps, x.desirable, x.ref_logps, **point(x))),
            lambda spec, x: specified(spec, x, spec.keep(x.logps)), ("logps",),
            ("random", "tie", "extreme", "empty", "integers"), exact=exact, half=False,
            group="unpaired losses from log-probs",
        ),
        Operator(
            f"{name} from hidden", _unpaired_hidden, from_hidden, hidden_formula, HEAD, ("random", "empty", "integers"),
            exact=exact, group="unpaired losses from hidden states", composed=True,
        ),
    )  # fmt: skip


# ---- reward models

BRADLEY_TERRY = fastpref.BradleyTerryLoss(MARGIN_CENTER)


def _reward_pairs(draw: Draw) -> Inputs:
    pairs, size = 16, 800 if draw.family == "extreme" else 2
    chosen, rejected = draw.normal(pairs) * size, draw.normal(pairs) * size
    margin = draw.uniform(pairs)
    if draw.family == "tie":
        rejected = chosen
    elif draw.family == "integers":
        chosen, rejected, margin = chosen.round(), rejected.round(), margin.round()
    return Inputs({"chosen": chosen.to(draw.dtype), "rejected": rejected.to(draw.dtype)}, {"margin": margin}, {})


def _reward_hidden(draw: Draw) -> Inputs:
    sequences, length, d = 2 * draw.size.pairs, draw.size.tokens, draw.size.hidden
    shapes = {"hidden": (sequences, length, d), "head_weight": (1, d), "head_bias": (1,)}
    if draw.family == "integers":
        floats = {name: draw.integers(-3, 4, *shape) for name, shape in shapes.items()}
    else:
        floats = {name: draw.normal(*shape) for name, shape in shapes.items()}
        floats["head_weight"] = floats["head_weight"] / d**0.5
    fixed = {
        "last_index": draw.integers(0, length, sequences),
        "margin": draw.uniform(sequences // 2).round(decimals=2),
    }
    return Inputs({name: value.to(draw.dtype) for name, value in floats.items()}, fixed, {})


def _rewards() -> tuple[Operator, ...]:
    def results(out: fastpref.RewardOutput) -> Results:
        # held to the margin, as in the paired rows
        return out._asdict() | {"accuracies": out.accuracies == (out.margins > 0)}

    def specified(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Results:
        loss = reference.bradley_terry(chosen, rejected, margin, MARGIN_CENTER)
        metrics = reference.reward_metrics(chosen.detach(), rejected.detach())
        return results(fastpref.RewardOutput(loss, *metrics.unbind(0)))

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        scores = reference.row_scores(x.hidden, x.head_weight[0], x.head_bias, x.last_index, "positions")
        return specified(*spec.keep(spec.stored(scores)).chunk(2), x.margin)

    always, exact = frozenset(("accuracies",)), frozenset(("chosen_rewards", "rejected_rewards", "margins"))
    return (
        Operator(
            "BradleyTerry from rewards", _reward_pairs,
            lambda x: results(BRADLEY_TERRY(x.chosen, x.rejected, x.margin)),
            lambda spec, x: specified(spec.keep(x.chosen), spec.keep(x.rejected), x.margin), ("chosen", "rejected"),
            ("random", "tie", "extreme", "integers"), always, exact, half=False,
        ),
        Operator(  # extreme rewards would put d_head_weight beyond fp16
            "BradleyTerry from hidden", _reward_hidden,
            lambda x: results(BRADLEY_TERRY.from_hidden(last_index=x.last_index, margin=x.margin, **x.floats)),
            hidden_formula, ("hidden", "head_weight", "head_bias"), ("random", "integers"), always, exact,
        ),
    )  # fmt: skip


# ---- process rewards

PROCESS = fastpref.ProcessRewardLoss()
CLASSES = 3


def _steps(draw: Draw, *, hard: bool) -> dict[str, Tensor]:
    """Labels `[S, K]`, some of them or all ignored, and where the steps end."""
    sequences, steps = 2 * draw.size.pairs, 5
    shape = (sequences, steps)
    labels = draw.integers(0, CLASSES, *shape) if hard else draw.uniform(*shape)
    ignored = draw.uniform(*shape) < (1 if draw.family == "empty" else 0.2)
    ends = draw.integers(0, draw.size.tokens // steps, *shape) + torch.arange(steps, device=draw.device) * (
        draw.size.tokens // steps
    )
    return {"step_labels": labels.masked_fill(ignored, IGNORE), "step_index": ends}


def _step_scores(draw: Draw, *, hard: bool) -> Inputs:
    fixed = _steps(draw, hard=hard)
    shape = fixed["step_labels"].shape
    scores = draw.normal(*shape, CLASSES) if hard else draw.normal(*shape)
    if draw.family == "tie":
        scores.zero_()
    elif draw.family == "extreme":
        scores *= 1e4
    return Inputs({"scores": scores.to(draw.dtype)}, fixed, {})


def _step_hidden(draw: Draw, *, hard: bool) -> Inputs:
    fixed, d = _steps(draw, hard=hard), draw.size.hidden
    hidden = draw.normal(fixed["step_labels"].shape[0], draw.size.tokens, d)
    rows = CLASSES if hard else 1
    floats = {"hidden": hidden, "head_weight": draw.normal(rows, d) / d**0.5, "head_bias": draw.normal(rows)}
    return Inputs({name: value.to(draw.dtype) for name, value in floats.items()}, fixed, {})


def _process_rewards() -> list[Operator]:
    return [row for hard in (True, False) for row in _process_rows(hard)]


def _process_rows(hard: bool) -> tuple[Operator, ...]:
    def specified(spec: Exact, scores: Tensor, labels: Tensor) -> Results:
        scored = labels != IGNORE
        if hard:
            losses = -spec.token_logprobs(scores, labels)
            right = scores.argmax(-1) == labels
        else:
            losses = reference.soft_step_losses(spec.keep(scores), labels.masked_fill(~scored, 0))
            losses, right = losses.masked_fill(~scored, 0), (scores > 0) == (labels > 0.5)
        steps = scored.sum()
        loss = losses.sum() / steps.clamp(min=1)
        accuracies = (right & scored).to(losses.dtype)
        return {"loss": loss, "step_losses": losses.detach(), "accuracies": accuracies, "num_steps": steps}

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        rows = x.hidden.gather(1, x.step_index[:, :, None].expand(-1, -1, x.hidden.shape[2]))
        scores = spec.stored(torch.nn.functional.linear(rows, x.head_weight, x.head_bias))
        return specified(spec, scores if hard else scores[..., 0], x.step_labels)

    name = f"ProcessReward {'hard' if hard else 'soft'}"
    always = frozenset(("accuracies", "num_steps"))
    return (
        Operator(  # a mean over steps is not exact on integers
            f"{name} from scores", lambda draw: _step_scores(draw, hard=hard),
            lambda x: PROCESS(x.scores, x.step_labels)._asdict(),
            lambda spec, x: specified(spec, x.scores, x.step_labels), ("scores",),
            ("random", "tie", "extreme", "empty"), always, group="process rewards",
        ),
        Operator(
            f"{name} from hidden", lambda draw: _step_hidden(draw, hard=hard),
            lambda x: PROCESS.from_hidden(step_labels=x.step_labels, step_index=x.step_index, **x.floats)._asdict(),
            hidden_formula, ("hidden", "head_weight", "head_bias"), ("random", "empty"), always,
            group="process rewards", composed=True,
        ),
    )  # fmt: skip


# ---- KL penalty


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
    """A reference's tensor: some of its rows are the policy's own."""
    near = value + (draw.normal(*value.shape) * size).to(value.dtype)
    if draw.family == "integers":  # the same spikes, but in another row
        return value.roll(1, 0)
    if draw.family == "tie":
        near[::3] = value[::3]
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
        return {"kl": fastpref.token_kl(x.logits, x.ref_logits, direction, mask=x.mask, **x.transform)}

    def formula(spec: Exact, x: Inputs) -> Results:
        return {"kl": spec.token_kl(x.logits, x.ref_logits, x.mask, direction, **x.transform)}

    return Operator(f"token_kl {direction}", _kl_logits, fused, formula, ("logits",), large=True, group="token_kl")


def _linear_token_kl(direction: str, plan: str, wrt: tuple[str, ...]) -> Operator:
    def a_third(x: Inputs) -> int:
        """Room for a third of either model's logits."""
        return max(1, 2 * x.labels.numel() // 3) * x.weight.shape[0] * x.weight.element_size()

    def fused(x: Inputs) -> Results:
        out = fastpref.linear_token_kl(
            labels=x.labels, direction=direction, plan=plan, workspace_bytes=a_third(x), **x.floats, **x.transform
        )
        return {name: value for name, value in out._asdict().items() if value is not None}

    def slice_width(x: Inputs) -> int:
        """As `fastpref.kl_plans.backward_recompute` cuts the vocabulary."""
        vocab, scored = x.weight.shape[0], int((x.labels != IGNORE).sum())
        head = plans.Head(x.weight, None, LogitTransform(), IGNORE)
        width = kl_plans._tile_rows(head, scored, a_third(x)) * vocab // max(1, scored)
        return min(vocab, max(128, width // 128 * 128))

    def formula(spec: Exact, x: Inputs) -> Results:
        own, ref = (
            HeadInputs(x.floats[f"{of}hidden"], x.floats[f"{of}weight"], x.floats.get(f"{of}bias"))
            for of in ("", "ref_")
        )
        pieces = Partition(plan == "frozen", (), slice_width(x) if plan == "recompute" else None)
        kl = spec.linear_token_kl(own, ref, x.labels != IGNORE, direction, pieces, **x.transform)
        found = {"kl": kl}
        for name, head in (("logps", own), ("ref_logps", ref)):  # constants, which no loss is made of
            aside = copy.copy(spec)
            aside.logps = []
            hidden, weight, bias = (None if t is None else t.detach() for t in head)
            found[name] = aside.linear_token_logprobs(hidden, weight, x.labels, bias, Partition(), **x.transform)
        return found

    # reverse: K is as large as the log-ratio, thousands here, and d_weight beyond fp16
    families = tuple(f for f in FAMILIES if f != "extreme" or direction == "forward")
    return Operator(
        f"linear_token_kl {direction} {plan}", _kl_head, fused, formula, wrt, families,
        group=f"linear_token_kl {plan}", composed=plan != "store",
    )  # fmt: skip


def _kl() -> tuple[Operator, ...]:
    return (
        *(row for name in KL_ESTIMATORS for row in _estimates(name)),
        *(_token_kl(direction) for direction in KL_DIRECTIONS),
        *(
            _linear_token_kl(direction, plan, wrt)
            for plan, wrt in (("frozen", ("hidden",)), ("store", HEAD), ("recompute", HEAD))
            for direction in KL_DIRECTIONS
        ),
    )


# ---- policy gradient

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


def _policy() -> list[Operator]:
    return [row for name, loss in POLICY.items() for row in _policy_rows(name, loss)]


def _policy_rows(name: str, loss: fastpref.PolicyGradientLoss) -> tuple[Operator, ...]:
    o = loss.objective

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
        means = [(m * scored).sum() / scored.sum().clamp(min=1) for m in (entropy.detach().reshape(-1), *metrics)]
        found = dict(zip(("entropy", "ratio", "kl", "clip_fraction"), means, strict=True))
        return {"loss": (losses * weights).sum(), "logps": logps.detach(), **found}

    def logits_formula(spec: Exact, x: Inputs) -> Results:
        found = spec.token_statistics(x.logits, x.labels, **x.transform)
        assert found.entropy is not None
        return specified(spec, x, found.logps, found.entropy)

    def tile(x: Inputs) -> int:
        """Rows in half of the batch's logits, which come in two tiles."""
        return max(16, int((x.labels != IGNORE).sum()) // 2)

    def from_hidden(x: Inputs) -> Results:
        room = tile(x) * x.weight.shape[0] * x.weight.element_size()
        return loss.from_hidden(workspace_bytes=room, **given(x))._asdict()

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        rows = plans.compact(x.labels, IGNORE)
        head = plans.Head(x.weight, None, LogitTransform(), IGNORE)
        step = plans.tile_rows(head, rows.numel(), tile(x) * x.weight.shape[0] * x.weight.element_size())
        pieces = Partition(row_groups=rows.split(step))
        bias = x.floats.get("bias")
        logps, entropy = spec.linear_token_statistics(x.hidden, x.weight, x.labels, bias, pieces, **x.transform)
        return specified(spec, x, logps, entropy)

    # integers: a token mean is not exact; extreme: a spacing of 1e-3 in a log-prob, then the exponential of it
    return (
        Operator(
            f"{name} from logits", lambda draw: _advantaged(draw, inputs.pair_logits(draw)),
            lambda x: loss.from_logits(**given(x))._asdict(), logits_formula, ("logits",),
            ("random", "peaky", "masked", "empty", "transform"), group="policy gradient from logits", composed=True,
        ),
        Operator(
            f"{name} from hidden", lambda draw: _advantaged(draw, inputs.pair_hidden(draw)),
            from_hidden, hidden_formula, HEAD, ("random", "peaky", "empty", "transform"),
            group="policy gradient from hidden states", composed=True,
        ),
    )  # fmt: skip
