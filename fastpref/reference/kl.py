"""KL penalties: estimates from sampled tokens, the penalised reward, and the exact divergence of two rows of logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.reference.tokens import LogitTransform

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")
KL_DIRECTIONS = ("reverse", "forward")
DIVERGENCES = (*KL_DIRECTIONS, "jsd")


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator="k1") -> Tensor:
    """KL(policy || reference) estimated at each sampled token: any shape -> the same shape, in nats.

    It is differentiable in `logps` only. Source: Schulman, "Approximating KL Divergence"
    (joschu.net/blog/kl-approx.html, 2020). Its r is reference / policy, so log r = -log_ratio.
    """
    log_ratio = logps - ref_logps.detach()
    if estimator == "k1":
        return log_ratio  # -log r
    if estimator == "k2":
        return log_ratio.square() / 2  # (log r)^2 / 2
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio  # (r - 1) - log r
    return log_ratio.abs()  # TRL's and verl's "abs"


def kl_penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float | Tensor, estimator="k1"
) -> tuple[Tensor, Tensor]:
    """(per-token rewards `[S, T]`, their sums `[S]`) of R = r - beta KL.

    Sources: Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 2 without its pre-training term; Ziegler et al.
    2019, arXiv 1909.08593, section 2.2: R(x, y) = r(x, y) - beta log(pi(y|x) / rho(y|x)).

    The score `[S]` is paid at the last scored token. A sequence without scored tokens has no place for it, so its
    score is in the sum alone.
    """
    penalties = -beta * kl_estimate(logps, ref_logps, estimator).masked_fill(~mask, 0)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, steps, -1).amax(1) if mask.shape[1] else scores.new_full(scores.shape, -1)
    return penalties + scores[:, None] * (steps == last[:, None]), scores + penalties.sum(1)


def token_kl(
    policy_logits: Tensor, ref_logits: Tensor, direction="reverse", *, temperature=1.0, logit_scale=1.0,
    softcap=None, mask=None, beta=0.5,
) -> Tensor:  # fmt: skip
    """sum_v p_v log(p_v / q_v) over the vocabulary: `[..., V]` -> `[...]`, in nats (Kullback & Leibler 1951).

    `"reverse"` is KL(policy || reference), the penalty of RLHF. `"forward"` is KL(reference || policy). `"jsd"` is the
    generalised Jensen-Shannon divergence (Agarwal et al. 2024, arXiv 2306.13649, eq. 1):
    beta KL(reference || m) + (1 - beta) KL(policy || m), with the mixture m = beta reference + (1 - beta) policy.
    0 log 0 counts as 0.
    """
    transform = LogitTransform(temperature, logit_scale, softcap)
    log_p = transform(policy_logits).log_softmax(-1)
    log_q = transform(ref_logits.detach()).log_softmax(-1)
    if direction == "jsd":
        nowhere = (log_p == -math.inf) & (log_q == -math.inf)  # impossible under both: -inf would have no gradient
        own, other = (x.masked_fill(nowhere, 0) for x in (log_p, log_q))
        log_m = torch.logaddexp(own + math.log1p(-beta), other + math.log(beta))
        kl = beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)
    else:
        kl = _kl(log_q, log_p) if direction == "forward" else _kl(log_p, log_q)
    return kl if mask is None else kl.masked_fill(~mask, 0)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    possible = log_p.exp() != 0  # NaN stays
    # masked on both sides of the product, so that neither it nor its gradient meets 0 * inf
    terms = log_p.masked_fill(~possible, 0) - log_q.masked_fill(~possible, 0)
    return (log_p.exp() * terms).sum(-1)


def linear_token_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias=None, ref_bias=None, **options
) -> Tensor:
    """`token_kl` from both models' hidden states `[..., d]` and heads `[V, d]` -> `[...]`."""
    return token_kl(F.linear(hidden, weight, bias), F.linear(ref_hidden, ref_weight, ref_bias), **options)
