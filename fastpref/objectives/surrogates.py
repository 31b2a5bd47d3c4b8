"""Surrogate losses of policy gradients from token log-probs: every `loss_type` of TRL 1.16's GRPO, and RLOO's.

All values are `[N]`, one for each scored token, packed sequence after sequence; `sizes` `[S]` says how many tokens a
sequence has. With any of these losses the head costs three products, two where it is frozen: what they need of it are
token log-probs, with any upstream gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.common.segments import segment_sums
from fastpref.reference import clipped_surrogate

LEVELS = ("token", "sequence", "sum")  # a ratio of each token, of a sequence's mean log-prob (GSPO), of its sum (RLOO)
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo")


class Surrogate(NamedTuple):
    """Which loss, and its constants; see `GRPOConfig`."""

    loss_type: str = "dapo"
    level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    sapo: tuple[float, float] = (1.05, 1.0)  # temperatures of negative and of other advantages
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)  # k and lambda of positive, then of negative ones


class Surrogates(NamedTuple):
    """Token losses (differentiable), and what is looked at."""

    losses: Tensor
    ratio: Tensor  # to the policy before the update, differentiable
    low: Tensor  # bool: clipped from below
    high: Tensor  # bool: clipped from above
    phi: Tensor | None = None  # VESPO's weight


def spread(values: Tensor, sizes: Tensor, tokens: int) -> Tensor:
    """One value for each sequence `[S]`, repeated for its tokens `[N]`."""
    return values.repeat_interleave(sizes, output_size=tokens)


def log_ratios(logps: Tensor, old_logps: Tensor, sizes: Tensor, level: str) -> Tensor:
    """The log of the importance ratio of each token `[N]`; by sequence, its tokens have the same one."""
    ratio = logps - old_logps
    if level == "token":
        return ratio
    sums = segment_sums(ratio, sizes)
    sums = sums / sizes.clamp(min=1) if level == "sequence" else sums
    return spread(sums.to(logps.dtype), sizes, logps.numel())


def surrogates(
    logps: Tensor, old_logps: Tensor | None, advantages: Tensor, sizes: Tensor, settings: Surrogate,
    sampler_log_ratio: Tensor | None = None,
) -> Surrogates:  # fmt: skip
    """The loss of every token, before weights.

    Sources: PPO, arXiv 1707.06347; GRPO 2402.03300; DAPO 2503.14476; Dr. GRPO 2503.20783; GSPO 2507.18071; CISPO
    2506.13585; SAPO 2511.20347; LUSPO 2602.05261; VESPO 2602.10693; RLOO 2402.14740; two-sided clipping 2505.07291.

    Args:
        logps: the policy's log-probs of the sampled tokens, differentiable.
        old_logps: those of the policy before the update; None if it is this policy.
        advantages: one for each token.
        sizes: `[S]` tokens of each sequence.
        settings: which loss.
        sampler_log_ratio: `[S]` log-prob of each sequence before the update minus that by the sampler, for VESPO.
    """
    old = logps.detach() if old_logps is None else old_logps
    ratio = log_ratios(logps, old, sizes, settings.level).exp()
    low = (ratio < 1 - settings.epsilon_low) & (advantages < 0)
    high = (ratio > 1 + settings.epsilon_high) & (advantages > 0)
    kind, phi = settings.loss_type, None
    if kind == "cispo":
        high = (ratio > settings.epsilon_high) & (advantages > 0)
        losses = -ratio.clamp(max=settings.epsilon_high).detach() * advantages * logps
    elif kind == "sapo":
        temperature = torch.where(advantages > 0, settings.sapo[1], settings.sapo[0])
        losses = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    elif kind == "vespo":
        phi = _vespo_weight((logps - old).detach(), advantages, sizes, settings.vespo, sampler_log_ratio)
        losses = -phi * advantages * logps
    else:
        losses, low, high = clipped_surrogate(
            ratio, advantages, settings.epsilon_low, settings.epsilon_high, settings.delta
        )
    return Surrogates(losses, ratio, low, high, phi)


def _vespo_weight(
    log_ratio: Tensor, advantages: Tensor, sizes: Tensor, constants: tuple[float, ...], sampler_log_ratio: Tensor | None
) -> Tensor:
    """`exp(lambda) w^k exp(-lambda w)` of a sequence's ratio w to the sampler, in the log domain."""
    least = math.log(1e-8)
    total = segment_sums(log_ratio.clamp(-20, 20), sizes)
    total = total if sampler_log_ratio is None else total + sampler_log_ratio
    log_w = spread(total.clamp(least, 20).to(log_ratio.dtype), sizes, log_ratio.numel())
    good = advantages >= 0
    k, decay = (torch.where(good, constants[i], constants[i + 2]) for i in (0, 1))
    decay = decay.clamp(min=1e-4)
    return (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class BatchSize:
    """What a batch holds, all its parts together; its loss is a sum over tokens with weights that follow from this.

    In an evaluation `sequences` and `tokens` are means over ranks, which need not hold as many.
    """

    sequences: float
    tokens: float  # scored
    scored: float  # what dapo, cispo and vespo divide by: the scored tokens of an update, per rank
    longest: int  # the most tokens that a response can have
    batches: int = 1  # of an update


def token_weights(sizes: Tensor, tokens: int, loss_type: str, batch: BatchSize, dtype: torch.dtype) -> Tensor:
    """What each token of a part of a batch weighs in an update's loss, `[N]`.

    `loss_type` is one of `LOSS_TYPES`, or `rloo`: the mean over sequences, whose tokens share one loss.
    """
    ones = torch.full((tokens,), 1 / batch.batches, dtype=dtype, device=sizes.device)
    if loss_type in ("grpo", "sapo", "rloo"):
        return ones / spread(sizes.clamp(min=1).to(dtype), sizes, tokens) / batch.sequences
    if loss_type == "bnpo":
        return ones / max(1, batch.tokens)
    if loss_type == "dr_grpo":
        return ones / (batch.sequences * batch.longest)
    if loss_type == "luspo":
        return ones / batch.sequences
    return torch.full_like(ones, 1 / batch.scored)


def off_policy_kept(
    logps: Tensor, sampler_logps: Tensor, advantages: Tensor, sizes: Tensor, threshold: float
) -> Tensor:
    """1 for tokens of sequences to learn from `[N]`, else 0 (off-policy sequence masking, arXiv 2512.02556).

    A sequence with a negative advantage is left out where its mean log-ratio of the sampler to the policy is above the
    threshold. Tokens that the sampler could not score (NaN) count as equal.
    """
    distance = (sampler_logps - logps.detach()).nan_to_num(nan=0.0)
    mean = segment_sums(distance, sizes) / sizes.clamp(min=1)
    near = spread((mean <= threshold).to(logps.dtype), sizes, logps.numel())
    return torch.where(advantages >= 0, torch.ones_like(near), near)


def sampler_ratios(
    logps: Tensor, sampler_logps: Tensor, sizes: Tensor, mode: str, low: float | None, high: float | None
) -> Tensor:
    """What corrects for a sampler whose probabilities are not the trainer's `[N]`: the ratio of both, bounded.

    Args:
        logps: by the trainer, before the update.
        sampler_logps: by the sampler; NaN where it gave none.
        sizes: `[S]` tokens of each sequence.
        mode: `token_` ratios or `sequence_` ones (of the summed log-probs), which are clipped to the bounds
            (`truncate`), or 0 beyond them (`mask`).
        low, high: the bounds; None is none.
    """
    difference = (logps - sampler_logps).nan_to_num(nan=0.0)
    if mode.startswith("sequence"):
        difference = spread(segment_sums(difference, sizes).to(logps.dtype), sizes, logps.numel())
    ratio = difference.exp()
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    beyond = (ratio < (-math.inf if low is None else low)) | (ratio > (math.inf if high is None else high))
    return ratio.masked_fill(beyond, 0.0)


def sampler_log_ratio(ratios: Tensor, sizes: Tensor, mode: str) -> Tensor:
    """The log of `sampler_ratios`, of a whole sequence `[S]`, bounded as VESPO has it."""
    total = segment_sums(ratios.log().clamp(math.log(1e-8), 20), sizes)
    return total / sizes.clamp(min=1) if mode.startswith("sequence") else total
