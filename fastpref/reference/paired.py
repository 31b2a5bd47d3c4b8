"""Losses on pairs of responses: DPO and its family, one function for each formula.

Each takes `Pairs` (everything `[B]`) and a `PairedObjective`, and returns the loss of each pair `[B]`. In all of them
`a` and `b` are the log-ratios log(pi / pi_ref) of the chosen and the rejected response. Numbers such as 2305.18290
are arXiv papers. `PAIR_LOSSES` finds a formula by name; `paired_loss` adds them up over a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairedObjective(NamedTuple):
    """The settings of a paired loss, all but its tensors.

    `loss = sum_k weights[k] * mean_pairs(losses[k])`. A loss is a name in `PAIR_LOSSES`, or `"sft"`: the chosen
    responses' negative log-likelihood, a mean over tokens.
    """

    losses: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] = (1.0,)
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0  # target reward margin
    f_divergence: str = "reverse_kl"
    alpha: float = 0.5  # of the alpha-divergence
    tau: float = 0.05  # DiscoPOP's temperature
    average: bool = False  # score a sequence by its mean log-prob instead of the sum


class Pairs(NamedTuple):
    """Sequence-level quantities of `B` pairs, each `[B]`."""

    chosen: Tensor  # log pi(y_w | x): the sum, or the mean if objective.average
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """log(pi / pi_ref) of chosen and rejected, each `[B]`."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


# f'(t) of the f-divergence that keeps the policy near its reference (f-DPO, arXiv 2309.16240).
# t = pi / pi_ref is the ratio; the functions take its logarithm x = log t.
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: 1 - torch.exp(-x),
    "js_divergence": lambda x, alpha: math.log(2) + F.logsigmoid(x),
    # the clamp keeps exp finite in fp32; alpha -> 1 is reverse_kl (TRL 1.16)
    "alpha_divergence": lambda x, alpha: (
        x if abs(alpha - 1) < 1e-6 else (torch.exp(((alpha - 1) * x).clamp(max=80.0)) - 1) / (alpha - 1)
    ),
}


def _scores(pairs: Pairs, o: PairedObjective) -> tuple[Tensor, Tensor]:
    """f'(pi / pi_ref) of chosen and rejected. For the reverse KL of standard DPO these are the log-ratios."""
    f = F_DIVERGENCES[o.f_divergence]
    a, b = pairs.log_ratios
    return f(a, o.alpha), f(b, o.alpha)


def _normalized_scores(pairs: Pairs, o: PairedObjective) -> tuple[Tensor, Tensor]:
    """`_scores` divided by the responses' lengths: per token."""
    a, b = _scores(pairs, o)
    return a / pairs.chosen_lengths.clamp(min=1), b / pairs.rejected_lengths.clamp(min=1)


def _margin(pairs: Pairs, o: PairedObjective) -> Tensor:
    """By how much the chosen response wins, beyond the target margin gamma."""
    a, b = _scores(pairs, o)
    return o.beta * (a - b) - o.gamma


def _smoothed_logistic(x: Tensor, eps: float) -> Tensor:
    """-log sigmoid(x), if a pair's labels are flipped with probability eps."""
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def sigmoid(pairs: Pairs, o: PairedObjective) -> Tensor:
    """DPO, -log sigmoid(beta (a - b)): Rafailov et al. 2023. With label smoothing cDPO: Mitchell 2023."""
    return _smoothed_logistic(_margin(pairs, o), o.label_smoothing)  # eq. 3 of cDPO; eps=0: eq. 7 of 2305.18290


def hinge(pairs: Pairs, o: PairedObjective) -> Tensor:
    """SLiC-HF, max(0, 1 - beta (a - b)): Zhao et al. 2023."""
    return torch.relu(1 - _margin(pairs, o))  # SLiC-HF, section 2 of 2305.10425


def ipo(pairs: Pairs, o: PairedObjective) -> Tensor:
    """IPO on per-token log-ratios, (a - b - 1 / (2 beta))^2: Azar et al. 2023."""
    a, b = _normalized_scores(pairs, o)
    return (a - b - 1 / (2 * o.beta)) ** 2  # eq. 17 of 2310.12036v2 on per-token log-ratios, as in TRL


def ipo_sum(pairs: Pairs, o: PairedObjective) -> Tensor:
    """IPO as in the paper, on summed log-ratios: Azar et al. 2023."""
    a, b = _scores(pairs, o)
    return (a - b - 1 / (2 * o.beta)) ** 2  # eq. 17 of 2310.12036v2


def exo_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    """EXO: the reverse KL between the policy's preference and the smoothed label: Ji et al. 2024."""
    x, eps = _margin(pairs, o), o.label_smoothing
    log_q, log_1q = F.logsigmoid(x), F.logsigmoid(-x)
    return log_q.exp() * (log_q - math.log1p(-eps)) + log_1q.exp() * (log_1q - math.log(eps))  # eq. 16 of 2402.00856


def nca_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    """NCA, noise-contrastive alignment: Chen et al. 2024."""
    a, b = (o.beta * x for x in pairs.log_ratios)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)  # section 4.1 of 2402.05369, K = 2


def robust(pairs: Pairs, o: PairedObjective) -> Tensor:
    """Robust DPO: unbiased where labels are flipped with probability eps: Chowdhury et al. 2024."""
    x, eps = _margin(pairs, o), o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)  # section 3.1 of 2403.00409


def bco_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    """BCO on pairs: each response is classified by itself: Jung et al. 2024."""
    a, b = (o.beta * x for x in pairs.log_ratios)
    return -F.logsigmoid(a) - F.logsigmoid(-b)  # section 4 of 2404.04656, without the running shift


def sppo_hard(pairs: Pairs, o: PairedObjective) -> Tensor:
    """SPPO with hard labels: self-play, each log-ratio towards +-1 / (2 beta): Wu et al. 2024."""
    a, b = pairs.log_ratios
    return (a - 0.5 / o.beta) ** 2 + (b + 0.5 / o.beta) ** 2  # eq. 4.7 of 2405.00675 with P in {0, 1}


def aot(pairs: Pairs, o: PairedObjective) -> Tensor:
    """AOT: the policy's margins dominate the reference's, as distributions over the batch: Melnyk et al. 2024."""
    policy, ref = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    u = policy.sort().values - ref.sort().values  # optimal transport in 1-d is sorting: section 3 of 2406.05882
    return _smoothed_logistic(o.beta * u, o.label_smoothing)


def aot_unpaired(pairs: Pairs, o: PairedObjective) -> Tensor:
    """AOT without pairs: chosen log-ratios dominate rejected ones, as distributions: Melnyk et al. 2024."""
    a, b = pairs.log_ratios
    u = a.sort().values - b.sort().values  # section 3 of 2406.05882
    return _smoothed_logistic(o.beta * u, o.label_smoothing)


def apo_zero(pairs: Pairs, o: PairedObjective) -> Tensor:
    """APO-zero: chosen up, rejected down, for data better than the model: D'Oosterlinck et al. 2024."""
    a, b = (o.beta * x for x in pairs.log_ratios)
    return 1 - torch.sigmoid(a) + torch.sigmoid(b)  # eq. 7 of 2408.06266


def apo_down(pairs: Pairs, o: PairedObjective) -> Tensor:
    """APO-down: both down, rejected more, for data worse than the model: D'Oosterlinck et al. 2024."""
    a, b = (o.beta * x for x in pairs.log_ratios)
    return torch.sigmoid(a) + 1 - torch.sigmoid(a - b)  # eq. 8 of 2408.06266


def discopop(pairs: Pairs, o: PairedObjective) -> Tensor:
    """DiscoPOP: a mixture of logistic and exponential loss, m = sigmoid(x / tau): Lu et al. 2024."""
    x = _margin(pairs, o)
    log_m = F.logsigmoid(x / o.tau)
    # eq. 5 of 2406.08414: -log sigma(x) (1 - m) + e^-x m, with e^-x m in one exponent: no inf * 0 at x << 0
    return -F.logsigmoid(x) * (1 - log_m.exp()) + torch.exp(log_m - x)


def sigmoid_norm(pairs: Pairs, o: PairedObjective) -> Tensor:
    """DPO on per-token log-ratios: Lambert et al. 2024 (Tulu 3)."""
    a, b = _normalized_scores(pairs, o)
    return -F.logsigmoid(o.beta * (a - b))  # length-normalised DPO of Tulu 3, 2411.15124


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact at both ends. A probability within rounding of 1 counts as 1 - eps."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds(a: Tensor, b: Tensor) -> Tensor:
    """log(odds(e^a) / odds(e^b)), where odds(p) = p / (1 - p)."""
    return (a - b) - (_log1mexp(a) - _log1mexp(b))  # eqs. 4 and 5 of ORPO, 2403.07691, of mean log-probs


def odds_ratio(pairs: Pairs, o: PairedObjective) -> Tensor:
    """ORPO's odds-ratio term, -log sigmoid of the log-odds ratio: Hong et al. 2024."""
    return -F.logsigmoid(log_odds(pairs.chosen, pairs.rejected))  # eq. 7 of ORPO, 2403.07691


PAIR_LOSSES: dict[str, Callable[[Pairs, PairedObjective], Tensor]] = {
    f.__name__: f
    for f in (
        sigmoid,
        hinge,
        ipo,
        ipo_sum,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sigmoid_norm,
        odds_ratio,
    )
}


def _pairs(chosen_sums, rejected_sums, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, objective) -> Pairs:
    zero = torch.zeros_like(chosen_sums)
    return Pairs(
        chosen_sums / chosen_lengths.clamp(min=1) if objective.average else chosen_sums,
        rejected_sums / rejected_lengths.clamp(min=1) if objective.average else rejected_sums,
        zero if ref_chosen is None else ref_chosen,
        zero if ref_rejected is None else ref_rejected,
        chosen_lengths,
        rejected_lengths,
    )


def paired_loss(
    chosen_sums: Tensor,
    rejected_sums: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    objective: PairedObjective,
    *,
    chosen_nll_sums: Tensor | None = None,
    pair_weights: Tensor | None = None,
    total_pairs: int | None = None,
    chosen_tokens: Tensor | None = None,
) -> Tensor:
    """The batch's loss, 0-d, from summed log-probs `[B]`. Without a reference `ref_chosen` and `ref_rejected` are None.

    A group of pairs out of a larger batch passes the batch's `total_pairs` and `chosen_tokens`. Group losses then add
    up to the batch's. The two `aot` losses are the exception: they sort across the batch.

    `pair_weights` `[B]` multiply each pair's loss, but not the `sft` term. Where token weights shape `chosen_sums`,
    `chosen_nll_sums` `[B]` are the unweighted ones, for the `sft` term.
    """
    pairs = _pairs(chosen_sums, rejected_sums, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, objective)
    loss = chosen_sums.new_zeros(())
    for name, weight in zip(objective.losses, objective.weights, strict=True):
        if name == "sft":  # token mean over the batch's chosen completions (MPO 2411.10442, RPO 2404.19733)
            tokens = chosen_lengths.sum() if chosen_tokens is None else chosen_tokens
            nll_sums = chosen_sums if chosen_nll_sums is None else chosen_nll_sums
            loss = loss - weight * nll_sums.sum() / tokens.clamp(min=1)
            continue
        losses = PAIR_LOSSES[name](pairs, objective)
        if pair_weights is not None:
            losses = losses * pair_weights
        loss = loss + weight * losses.sum() / (total_pairs or len(chosen_sums))
    return loss


def paired_metrics(
    chosen_sums, rejected_sums, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, objective
) -> Tensor:
    """`[6, B]`: chosen and rejected log-probs, chosen and rejected rewards, margins, accuracies."""
    pairs = _pairs(chosen_sums, rejected_sums, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, objective)
    chosen_rewards, rejected_rewards = (objective.beta * x for x in pairs.log_ratios)
    margins = chosen_rewards - rejected_rewards
    accuracies = (margins > 0).to(margins.dtype)
    return torch.stack([pairs.chosen, pairs.rejected, chosen_rewards, rejected_rewards, margins, accuracies])


def shared_length_weights(labels: Tensor, cu_seqlens: Tensor | None, alpha: float, ignore_index: int) -> Tensor:
    """LD-DPO's weight of each token `[N]` (arXiv 2409.06411): 1 up to the shorter response's length, then alpha.

    `labels` are `[2B, T]`, or packed `[N]` with `cu_seqlens`. Ignored rows weigh 0.
    """
    scored = (labels != ignore_index).reshape(-1)
    edges = cu_seqlens
    if edges is None:
        edges = torch.arange(labels.shape[0] + 1, device=labels.device) * labels.shape[1]
    before = torch.cat([scored.new_zeros(1, dtype=torch.long), scored.long().cumsum(0)])
    first = before[edges[:-1].long()]
    lengths = before[edges[1:].long()] - first
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    sequence = torch.searchsorted(edges[1:].contiguous(), torch.arange(scored.numel(), device=edges.device), right=True)
    position = before[1:] - first[sequence]  # 1 for the first scored token
    return torch.where(position <= shared[sequence], 1.0, alpha) * scored


def pair_confidence(token_logps: Tensor, log_sum_sq: Tensor, lengths: Tensor) -> Tensor:
    """WPO's weight of each pair (arXiv 2406.11827, aligned by log sum p^2), `[B]`, without a gradient.

    It is the product of both responses' `exp(mean_t(log p(y_t) - log sum_v p(v)^2))`. The arguments `[2B]` are sums
    over each sequence, and its number of tokens.
    """
    confidence = ((token_logps - log_sum_sq) / lengths.clamp(min=1)).exp()
    chosen, rejected = confidence.chunk(2)
    return (chosen * rejected).detach()
