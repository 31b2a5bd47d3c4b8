"""Losses on pairs of responses: DPO and its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairedObjective(NamedTuple):
    """What a paired loss is, besides its tensors: `loss = sum_k weight_k * mean_pairs(loss_k)`."""

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
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


# f'(t) of the f-divergence that regularises, on the log-ratio x = log t (f-DPO, arXiv 2309.16240)
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
    """f'(pi/ref) of chosen and rejected; plain log-ratios for the reverse KL of standard DPO."""
    f = F_DIVERGENCES[o.f_divergence]
    a, b = pairs.log_ratios
    return f(a, o.alpha), f(b, o.alpha)


def _normalized_scores(pairs: Pairs, o: PairedObjective) -> tuple[Tensor, Tensor]:
    a, b = _scores(pairs, o)
    return a / pairs.chosen_lengths.clamp(min=1), b / pairs.rejected_lengths.clamp(min=1)


def _margin(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = _scores(pairs, o)
    return o.beta * (a - b) - o.gamma


def _smoothed_logistic(x: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x)


def sigmoid(pairs: Pairs, o: PairedObjective) -> Tensor:
    return _smoothed_logistic(_margin(pairs, o), o.label_smoothing)  # eq. 3 of cDPO; eps=0: eq. 7 of 2305.18290


def hinge(pairs: Pairs, o: PairedObjective) -> Tensor:
    return torch.relu(1 - _margin(pairs, o))  # SLiC-HF, section 2 of 2305.10425


def ipo(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = _normalized_scores(pairs, o)
    return (a - b - 1 / (2 * o.beta)) ** 2  # eq. 17 of 2310.12036v2 on per-token log-ratios, as in TRL


def ipo_sum(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = _scores(pairs, o)
    return (a - b - 1 / (2 * o.beta)) ** 2  # eq. 17 of 2310.12036v2


def exo_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    x, eps = _margin(pairs, o), o.label_smoothing
    log_q, log_1q = F.logsigmoid(x), F.logsigmoid(-x)
    return log_q.exp() * (log_q - math.log1p(-eps)) + log_1q.exp() * (log_1q - math.log(eps))  # eq. 16 of 2402.00856


def nca_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = (o.beta * x for x in pairs.log_ratios)
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)  # section 4.1 of 2402.05369, K = 2


def robust(pairs: Pairs, o: PairedObjective) -> Tensor:
    x, eps = _margin(pairs, o), o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(x) + eps * F.logsigmoid(-x)) / (1 - 2 * eps)  # section 3.1 of 2403.00409


def bco_pair(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = (o.beta * x for x in pairs.log_ratios)
    return -F.logsigmoid(a) - F.logsigmoid(-b)  # section 4 of 2404.04656, without the running shift


def sppo_hard(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = pairs.log_ratios
    return (a - 0.5 / o.beta) ** 2 + (b + 0.5 / o.beta) ** 2  # eq. 4.7 of 2405.00675 with P in {0, 1}


def aot(pairs: Pairs, o: PairedObjective) -> Tensor:
    policy, ref = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    u = policy.sort().values - ref.sort().values  # optimal transport in 1-d is sorting: section 3 of 2406.05882
    return _smoothed_logistic(o.beta * u, o.label_smoothing)


def aot_unpaired(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = pairs.log_ratios
    u = a.sort().values - b.sort().values  # section 3 of 2406.05882
    return _smoothed_logistic(o.beta * u, o.label_smoothing)


def apo_zero(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = (o.beta * x for x in pairs.log_ratios)
    return 1 - torch.sigmoid(a) + torch.sigmoid(b)  # eq. 7 of 2408.06266


def apo_down(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = (o.beta * x for x in pairs.log_ratios)
    return torch.sigmoid(a) + 1 - torch.sigmoid(a - b)  # eq. 8 of 2408.06266


def discopop(pairs: Pairs, o: PairedObjective) -> Tensor:
    x = _margin(pairs, o)
    log_m = F.logsigmoid(x / o.tau)
    # eq. 5 of 2406.08414: -log sigma(x) (1 - m) + e^-x m, with e^-x m in one exponent: no inf * 0 at x << 0
    return -F.logsigmoid(x) * (1 - log_m.exp()) + torch.exp(log_m - x)


def sigmoid_norm(pairs: Pairs, o: PairedObjective) -> Tensor:
    a, b = _normalized_scores(pairs, o)
    return -F.logsigmoid(o.beta * (a - b))  # length-normalised DPO of Tulu 3, 2411.15124


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact at both ends; a probability within rounding of 1 counts as 1 - eps."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x < -math.log(2), torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))


def log_odds(a: Tensor, b: Tensor) -> Tensor:
    return (a - b) - (_log1mexp(a) - _log1mexp(b))  # eqs. 4 and 5 of ORPO, 2403.07691, of mean log-probs


def odds_ratio(pairs: Pairs, o: PairedObjective) -> Tensor:
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
    """The batch's loss from summed log-probs, everything `[B]`; scalar.

    A group of pairs out of a larger batch passes the batch's `total_pairs` and `chosen_tokens`, so that
    group losses add up to the batch's (all but the two `aot` losses, which sort across the batch). Where token
    weights shape `chosen_sums`, `chosen_nll_sums` are the unweighted ones, for the `sft` term.
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
    """LD-DPO's weight of each token (arXiv 2409.06411): 1 up to the shorter response's length, then alpha.

    `[N]` for `labels` `[2B, T]` or packed `[N]`; 0 on ignored rows.
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
    """WPO's weight of each pair (arXiv 2406.11827, aligned by log sum p^2), `[B]`, a constant.

    `exp(mean_t(log p(y_t) - log sum_v p(v)^2))` of chosen times rejected; the arguments are summed per sequence.
    """
    confidence = ((token_logps - log_sum_sq) / lengths.clamp(min=1)).exp()
    chosen, rejected = confidence.chunk(2)
    return (chosen * rejected).detach()
