"""Rows of the table for reward models: Bradley-Terry pairs, and the steps of process reward models."""

from __future__ import annotations

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.validate.ideal import Exact
from fastpref.validate.inputs import IGNORE, Draw, Inputs
from fastpref.validate.operator import Operator, Results

CENTER = 0.25
BRADLEY_TERRY = fastpref.BradleyTerryLoss(CENTER)
PROCESS = fastpref.ProcessRewardLoss()
CLASSES = 3


def operators() -> tuple[Operator, ...]:
    return (*_bradley_terry(), *_process(hard=True), *_process(hard=False))


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


def _bradley_terry() -> tuple[Operator, ...]:
    def results(out: fastpref.RewardOutput) -> Results:
        # held to the margin, as in the paired rows
        return out._asdict() | {"accuracies": out.accuracies == (out.margins > 0)}

    def specified(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Results:
        loss = reference.bradley_terry(chosen, rejected, margin, CENTER)
        metrics = reference.reward_metrics(chosen.detach(), rejected.detach())
        return results(fastpref.RewardOutput(loss, *metrics.unbind(0)))

    def hidden_formula(spec: Exact, x: Inputs) -> Results:
        scores = reference.row_scores(x.hidden, x.head_weight[0], x.head_bias, x.last_index, "positions")
        chosen, rejected = spec.keep(spec.stored(scores)).chunk(2)
        return specified(chosen, rejected, x.margin)

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


def _steps(draw: Draw, *, hard: bool) -> dict[str, Tensor]:
    """Labels `[S, K]`, of which some or all are ignored, and where the steps end."""
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


def _process(hard: bool) -> tuple[Operator, ...]:
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
