"""Reward models: scores of sequences, Bradley-Terry and Plackett-Luce losses, and losses on reasoning steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


def _group_mates(group: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mates `[n, K]`, real `[n, K]`, group number `[n]`, sizes `[G]`), where K is the largest group's size.

    `mates` are the members of each response's group. `real` tells them from what fills up smaller groups.
    """
    _, ids, sizes = torch.unique(group, return_inverse=True, return_counts=True)
    order = ids.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    slot = torch.arange(int(sizes.max()), device=group.device)
    real = slot < sizes[ids][:, None]
    return order[(starts[ids][:, None] + slot).where(real, 0)], real, ids, sizes


class Comparisons(NamedTuple):
    """Pairs of responses of one group with different ranks: indices of responses and weights, each `[P]`."""

    winners: Tensor
    losers: Tensor
    weights: Tensor


def comparisons(ranks: Tensor, group: Tensor) -> Comparisons:
    """All pairs to compare, from `ranks` `[n]` (lower is better) and `group` `[n]`.

    In a group of k responses each pair weighs 1 / C(k, 2), divided by the number of groups that compare anything.
    """
    mates, real, ids, sizes = _group_mates(group)
    wins = real & (ranks[:, None] < ranks[mates])
    winners, slots = wins.nonzero(as_tuple=True)
    compares = torch.zeros_like(sizes).index_put_((ids,), wins.sum(1), accumulate=True) > 0
    k = sizes[ids[winners]].double()
    return Comparisons(winners, mates[winners, slots], 2 / (k * (k - 1)) / compares.sum().clamp(min=1))


def ranking_loss(rewards: Tensor, compared: Comparisons, center_coefficient: float = 0.0) -> Tensor:
    """All pairs of each group, 0-d: -1/C(K,2) E log sigma(r_w - r_l), eq. 1 of 2203.02155. `rewards` are `[n]`."""
    winners, losers, weights = compared
    losses = pair_losses(rewards[winners], rewards[losers], None, center_coefficient)
    return (losses * weights.to(losses.dtype)).sum()


def ranking_center(rewards: Tensor, compared: Comparisons, center_coefficient: float) -> Tensor:
    """The regulariser of 2312.09244 on the same pairs, for a loss that is not a sum over pairs."""
    totals = rewards[compared.winners] + rewards[compared.losers]
    return center_coefficient * (totals**2 * compared.weights.to(totals.dtype)).sum()


def plackett_luce(rewards: Tensor, ranks: Tensor, group: Tensor) -> Tensor:
    """-log prod_i exp(r_i) / sum_{j ranked no better than i} exp(r_j), the mean over groups of two or more, 0-d.

    Sources: Plackett 1975, Luce 1959; arXiv 2305.18290, appendix A.3.

    Raises:
        ValueError: two responses of a group have the same rank.
    """
    mates, real, _, sizes = _group_mates(group)
    if bool((real & (ranks[mates] == ranks[:, None])).sum() > len(ranks)):
        raise ValueError("ranks: got a tie within a group, want distinct ranks for method 'plackett_luce'")
    remaining = real & (ranks[mates] >= ranks[:, None])
    losses = rewards[mates].masked_fill(~remaining, float("-inf")).logsumexp(1) - rewards
    return losses.sum() / (sizes > 1).sum().clamp(min=1)


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
