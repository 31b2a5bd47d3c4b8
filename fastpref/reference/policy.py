"""Clipped policy-gradient losses per token: PPO, GRPO, DAPO."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.reference.kl import kl_estimate


class PolicyObjective(NamedTuple):
    """The settings of `sum_t weight_t * (-clipped_t + beta * kl_t - entropy_coef * H_t)`.

    `clipped_t` is PPO's clipped surrogate, `kl_t` the k3 estimate of the KL to the reference, `H_t` the entropy.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0  # weight of the KL to the reference
    entropy_coef: float = 0.0


POLICY_METRICS = ("ratio", "kl", "clipped")


class ClippedSurrogate(NamedTuple):
    """Token losses, and which tokens are clipped, all `[N]`."""

    losses: Tensor
    low: Tensor  # bool: from below
    high: Tensor  # bool: from above


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None = None
) -> ClippedSurrogate:
    """`-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)` of every token `[N]`.

    Sources: eq. 7 of PPO, arXiv 1707.06347; DAPO 2503.14476, eq. 10. `delta` limits the ratio of negative advantages,
    too (two-sided clipping, 2505.07291).
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    limited = ratio if delta is None else ratio.clamp(max=delta)
    return ClippedSurrogate(
        -torch.minimum(limited * advantages, clipped * advantages),
        (limited < 1 - epsilon_low) & (advantages < 0),
        (limited > 1 + epsilon_high) & (advantages > 0),
    )


def policy_token_losses(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    entropy: Tensor | None,
    objective: PolicyObjective,
) -> tuple[Tensor, Tensor]:
    """(loss `[N]`, POLICY_METRICS `[3, N]`) of every token. All tensors are `[N]`.

    Without `old_logps` the policy itself sampled: the ratio is 1, and only its gradient counts. Without `ref_logps`
    there is no KL term, without `entropy` no bonus.
    """
    o = objective
    log_ratio = logps - (logps.detach() if old_logps is None else old_logps)
    ratio = log_ratio.exp()
    loss, low, high = clipped_surrogate(ratio, advantages, o.epsilon_low, o.epsilon_high)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        kl = kl_estimate(logps, ref_logps, "k3")  # eq. 4 of GRPO, 2402.03300
        loss = loss + o.beta * kl
    if entropy is not None:
        loss = loss - o.entropy_coef * entropy  # eq. 9 of PPO
    return loss, torch.stack([ratio, kl, (low | high).to(ratio.dtype)]).detach()


def policy_token_weights(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    reduction: str,
    ignore_index: int,
    normalizer: float | Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each token weighs in the loss `[N]`. Ignored rows weigh 0. `labels` are `[S, T]`, or packed `[N]`.

    - `sequence`: the mean of the sequences' token means (GRPO, arXiv 2402.03300, eq. 3).
    - `token`: the mean over all tokens (BNPO). With the global token count as `normalizer` it is DAPO's (arXiv
      2503.14476, eq. 8).
    - `constant`: the sum divided by `normalizer`, which is sequences times the maximal length (Dr. GRPO, arXiv
      2503.20783).
    """
    scored = (labels != ignore_index).reshape(-1).to(dtype)
    if reduction != "sequence":
        total = scored.sum().clamp(min=1) if normalizer is None else normalizer
        return scored / total
    if cu_seqlens is None:
        sequence = torch.arange(labels.shape[0], device=labels.device).repeat_interleave(labels.shape[1])
        sequences = labels.shape[0]
    else:
        every = torch.arange(scored.numel(), device=labels.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), every, right=True)
        sequences = cu_seqlens.numel() - 1
    lengths = scored.new_zeros(sequences).index_add(0, sequence, scored)  # of small integers: exact in any order
    return scored / lengths.clamp(min=1)[sequence] / sequences
