"""Losses on several responses to a prompt, which are ranked: Plackett-Luce, all pairs, and models that know ties.

Each formula takes scores `[n]` of responses and their `Mates`, and returns a loss of each response `[n]`: a prompt's
loss is the sum over its responses. A score is a reward, or for DPO `beta` times the log-ratio log(pi / pi_ref). Ranks
are lower for better responses, and equal for ties; only their order within a group counts. Numbers such as 2305.18290
are arXiv papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ListObjective(NamedTuple):
    """The settings of a loss on lists, all but its tensors. `loss` is a name in `LIST_LOSSES`."""

    loss: str = "plackett_luce"
    beta: float = 0.1
    nu: float = 1.0  # how likely ties are, for those who model them


ASKED = 512  # responses, whose [n, n] takes 2 MB of fp64


class Mates(NamedTuple):
    """The other responses to the same prompt, `[n, K]` with K the largest group's size.

    `who` says which they are. K may be larger. Where a group is smaller, and at a response itself, no mask is set.
    """

    who: Tensor
    worse: Tensor  # the mate is ranked worse than the response
    better: Tensor
    tied: Tensor
    sizes: Tensor  # [n], how many responses the prompt has


def mates_of(ranks: Tensor, group: Tensor) -> Mates:
    """Whom each response is compared with, from `ranks` `[n]` and `group` `[n]`: integers, in any order.

    Beyond `ASKED` responses the device is asked for the largest group's size. Up to there K is n, and nothing waits.
    """
    n = len(group)
    ordered, order = group.sort(stable=True)
    starts, ends = (torch.searchsorted(ordered, group.contiguous(), right=right) for right in (False, True))
    sizes = ends - starts
    slot = torch.arange(n if n <= ASKED else int(sizes.max()), device=group.device)
    real = slot < sizes[:, None]
    who = order[(starts[:, None] + slot).clamp(max=n - 1)]
    real &= who != torch.arange(n, device=group.device)[:, None]
    own, other = ranks[:, None], ranks[who]
    return Mates(who, real & (own < other), real & (own > other), real & (own == other), sizes)


def plackett_luce(scores: Tensor, mates: Mates, nu: float) -> Tensor:
    """-log prod_i exp(s_i) / (exp(s_i) + sum_{j ranked worse} exp(s_j)): the likelihood of the ranking.

    Sources: Plackett 1975, Luce 1959; arXiv 2305.18290, appendix A.3, eq. 18-20. There ranks are distinct. Here
    responses of equal rank are in no order: each is compared with those ranked worse. Ties for the last rank thus have
    the exact likelihood of a ranking of the best ones.
    """
    behind = scores[mates.who].masked_fill(~mates.worse, float("-inf")).logsumexp(1) - scores
    return -F.logsigmoid(-behind)  # log(1 + e^behind)


def _differences(scores: Tensor, mates: Mates) -> Tensor:
    """By how much each response scores more than its mates, `[n, K]`."""
    return scores[:, None] - scores[mates.who]


def _of_pairs(wins: Tensor, ties: Tensor | None, mates: Mates) -> Tensor:
    """The mean over all pairs of a prompt, which weigh 1 / C(k, 2): a win at the winner, half a tie at each."""
    k = mates.sizes.to(wins.dtype)
    total = torch.where(mates.worse, wins, 0)
    if ties is not None:
        total = total + torch.where(mates.tied, ties, 0) / 2
    return total.sum(1) * 2 / (k * (k - 1)).clamp(min=1)


def all_pairs(scores: Tensor, mates: Mates, nu: float) -> Tensor:
    """-1 / C(k, 2) sum log sigmoid(s_w - s_l), all pairs of different ranks: eq. 1 of 2203.02155 (InstructGPT)."""
    return _of_pairs(-F.logsigmoid(_differences(scores, mates)), None, mates)


def rao_kupper(scores: Tensor, mates: Mates, nu: float) -> Tensor:
    """All pairs, where P(win) = sigmoid(d - log nu), and a tie is what neither wins. nu > 1.

    Sources: Rao and Kupper 1967; section 3 of 2409.17431.
    """
    d, alpha = _differences(scores, mates), math.log(nu)
    wins = -F.logsigmoid(d - alpha)
    return _of_pairs(wins, wins - F.logsigmoid(-d - alpha) - math.log(nu * nu - 1), mates)


def davidson(scores: Tensor, mates: Mates, nu: float) -> Tensor:
    """All pairs, where P(tie) = 2 nu sqrt(P(win) P(loss)). nu > 0.

    With h = d / 2, P(win) = e^h / Z and P(tie) = 2 nu / Z, where Z = e^h + e^-h + 2 nu. Sources: Davidson 1970;
    section 3 of 2409.17431.
    """
    h = _differences(scores, mates) / 2
    log_z = torch.stack([h, -h, torch.full_like(h, math.log(2 * nu))]).logsumexp(0)
    return _of_pairs(log_z - h, log_z - math.log(2 * nu), mates)


LIST_LOSSES: dict[str, Callable[[Tensor, Mates, float], Tensor]] = {
    f.__name__: f for f in (plackett_luce, all_pairs, rao_kupper, davidson)
}
TIE_MODELS = {"rao_kupper": 3.0, "davidson": 1.0}  # and the paper's nu: equal scores tie half of the time


def compared_groups(ranks: Tensor, group: Tensor, objective: ListObjective) -> Tensor:
    """How many groups say anything, 0-d: where two ranks differ, or for a model of ties where there are two at all.

    It looks at all pairs `[n, n]`, and waits for no device.
    """
    same = group[:, None] == group[None, :]
    others = same.tril(-1) | same.triu(1)
    if objective.loss not in TIE_MODELS:
        others &= ranks[:, None] != ranks[None, :]
    first = ~same.tril(-1).any(1)
    return (first & others.any(1)).sum()


def list_loss(
    scores: Tensor, ranks: Tensor, group: Tensor, objective: ListObjective, *, total_groups: Tensor | None = None
) -> Tensor:
    """The mean over groups that say anything (see `compared_groups`), 0-d, from scores `[n]`.

    Some groups out of a larger batch pass the batch's `total_groups` (0-d). Their losses then add up to the batch's.
    """
    total = compared_groups(ranks, group, objective) if total_groups is None else total_groups
    losses = LIST_LOSSES[objective.loss](scores, mates_of(ranks, group), objective.nu)
    return losses.sum() / total.clamp(min=1)


def list_metrics(sums: Tensor, ref_sums: Tensor | None, ranks: Tensor, group: Tensor, objective: ListObjective):
    """`[6, n]`: log-probs, rewards; the worse ranked mates that score less, and how many worse ranked mates there are;
    the response's share of its group's best, and of its group's worst ones.

    A share is 1 / m for one of m tied responses. In a group of a single rank nobody is best or worst.
    """
    rewards = objective.beta * (sums if ref_sums is None else sums - ref_sums)
    mates = mates_of(ranks, group)
    right = mates.worse & (_differences(rewards, mates) > 0)
    worse, better, tied = (mask.sum(1) for mask in (mates.worse, mates.better, mates.tied))
    best, worst = (better == 0) & (worse > 0), (worse == 0) & (better > 0)
    counts = [x.to(rewards.dtype) for x in (right.sum(1), worse)]
    return torch.stack([sums, rewards, *counts, best / (tied + 1).to(sums.dtype), worst / (tied + 1).to(sums.dtype)])
