"""Reward models: scores of sequences, the Bradley-Terry loss, and losses on reasoning steps. Rankings: `lists`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.reference.lists import mates_of


def row_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, layout: str) -> Tensor:
    """The reward `[S]`: the head `[d]` on one row of each sequence. Layouts as in `fastpref_kernels.row_scores`.

    Source: InstructGPT, arXiv 2203.02155, section 3.5, where a scalar head replaces the unembedding layer.
    """
    if layout == "positions":
        rows = hidden[torch.arange(index.shape[0], device=index.device), index]
    else:
        rows = hidden[index[1:] - 1 if layout == "edges" else index]
    scores = (rows * weight).sum(-1)
    return scores if bias is None else scores + bias


def pair_losses(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) + center_coefficient (r_w + r_l)^2 of each pair. All tensors are `[B]`."""
    x = chosen - rejected
    if margin is not None:
        x = x - margin  # eq. 2 of 2307.09288 (Llama 2)
    losses = -F.logsigmoid(x)  # eq. 1 of 2203.02155 with K = 2
    if center_coefficient:
        losses = losses + center_coefficient * (chosen + rejected) ** 2  # the regulariser of 2312.09244
    return losses


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """The mean of `pair_losses`, 0-d."""
    return pair_losses(chosen, rejected, margin, center_coefficient).mean()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`[4, B]`: chosen and rejected rewards, margins, accuracies."""
    margins = chosen - rejected
    return torch.stack([chosen, rejected, margins, (margins > 0).to(margins.dtype)])


class Comparisons(NamedTuple):
    """Pairs of responses of one group with different ranks: indices of responses and weights, each `[P]`."""

    winners: Tensor
    losers: Tensor
    weights: Tensor


def comparisons(ranks: Tensor, group: Tensor) -> Comparisons:
    """All pairs to compare, from `ranks` `[n]` (lower is better) and `group` `[n]`.

    In a group of k responses each pair weighs 1 / C(k, 2), divided by the number of groups that compare anything.
    """
    mates = mates_of(ranks, group)
    winners, slots = mates.worse.nonzero(as_tuple=True)
    k = mates.sizes[winners].double()
    groups = group[winners].unique().numel()
    return Comparisons(winners, mates.who[winners, slots], 2 / (k * (k - 1)) / max(1, groups))


def ranking_center(rewards: Tensor, compared: Comparisons, center_coefficient: float) -> Tensor:
    """The regulariser of 2312.09244 on all pairs of different ranks, 0-d. `rewards` are `[n]`."""
    totals = rewards[compared.winners] + rewards[compared.losers]
    return center_coefficient * (totals**2 * compared.weights.to(totals.dtype)).sum()


def soft_step_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each step's score with the probability that the step is right, any shape.

    Source: Math-Shepherd, arXiv 2312.08935, eq. 2, with labels from its eq. 3 (hard) or 4 (soft).
    """
    return -labels * F.logsigmoid(scores) - (1 - labels) * F.logsigmoid(-scores)


def hard_step_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each step's class: `[*, C]` logits and `[*]` labels -> `[*]`.

    Source: Let's Verify Step by Step, arXiv 2305.20050, section 2.6; TRL's PRMTrainer.
    """
    return -logits.log_softmax(-1).gather(-1, labels[..., None].long())[..., 0]


def aggregate_steps(step_scores: Tensor, mask: Tensor, method: str) -> Tensor:
    """The scores of sequences `[S]` from those of their steps `[S, K]`.

    `mask` `[S, K]` tells which are steps. A sequence without steps scores 0.
    """
    if mask.shape[1] == 0:
        return step_scores.sum(1)
    if method == "min":  # appendix F of 2305.20050; section 3.4 of 2312.08935
        scores = step_scores.masked_fill(~mask, float("inf")).amin(1)
    elif method == "product":  # section 2.6 of 2305.20050: the probability that every step is right
        zero = mask & (step_scores == 0)  # their logarithm has no gradient
        scores = step_scores.masked_fill(~mask | zero, 1.0).log().sum(1).exp().masked_fill(zero.any(1), 0)
    else:  # "last"
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1, keepdim=True)
        scores = step_scores.gather(1, last)[:, 0]
    return scores.masked_fill(~mask.any(1), 0)
