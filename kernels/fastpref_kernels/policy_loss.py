"""Clipped policy-gradient losses of tokens (PPO, GRPO, DAPO): loss, metrics and both coefficients in one pass.

Formulas and their sources: `fastpref/reference/policy.py`. The derivative with respect to the log-prob is written here.
The one with respect to the entropy is a constant, `-entropy_coef * weight`.

Memory traffic for each token: up to 5 reads and 5 writes of 4 bytes.
"""

import torch
import triton
import triton.language as tl

from ._launch import accumulator, dense, on_device_of
from ._math import exp, expm1


@triton.jit(do_not_specialize=["N"])
def _policy_loss_kernel(
    # data
    logps_ptr, old_ptr, ref_ptr, advantages_ptr, entropy_ptr, weights_ptr,
    loss_ptr, coef_ptr, coef_entropy_ptr, metrics_ptr,
    # sizes
    N,
    # objective
    LOW: tl.constexpr, HIGH: tl.constexpr, KL_BETA: tl.constexpr, ENTROPY_COEF: tl.constexpr,
    # constants
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = t < N
    logp = tl.load(logps_ptr + t, mask=real, other=0.0)
    advantage = tl.load(advantages_ptr + t, mask=real, other=0.0)
    weight = tl.load(weights_ptr + t, mask=real, other=0.0)
    ratio = tl.full([BLOCK], 1.0, ACC)
    if HAS_OLD:
        ratio = exp(logp - tl.load(old_ptr + t, mask=real, other=0.0))
    low = tl.full([BLOCK], LOW, ACC)  # as a literal, 0.8 would be an fp32 constant in an fp64 run
    high = tl.full([BLOCK], HIGH, ACC)
    clipped = tl.minimum(tl.maximum(ratio, low), high)
    outside = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    loss = -tl.minimum(ratio * advantage, clipped * advantage)
    coef = tl.where(outside, 0.0, -ratio * advantage)
    kl = tl.zeros([BLOCK], ACC)
    if HAS_REF:
        difference = tl.load(ref_ptr + t, mask=real, other=0.0) - logp
        gain = expm1(difference)
        kl = gain - difference
        loss += KL_BETA * kl
        coef -= KL_BETA * gain
    if HAS_ENTROPY:
        loss -= ENTROPY_COEF * tl.load(entropy_ptr + t, mask=real, other=0.0)
        tl.store(coef_entropy_ptr + t, -ENTROPY_COEF * weight, mask=real)
    tl.store(loss_ptr + t, loss * weight, mask=real)
    tl.store(coef_ptr + t, coef * weight, mask=real)
    tl.store(metrics_ptr + t, ratio, mask=real)
    tl.store(metrics_ptr + N + t, kl, mask=real)
    tl.store(metrics_ptr + 2 * N + t, outside.to(ACC), mask=real)


def policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor | None, ref_logps: torch.Tensor | None, advantages: torch.Tensor,
    entropy: torch.Tensor | None, weights: torch.Tensor, objective,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(weighted losses `[N]`, metrics `[3, N]`, d loss / d logp `[N]`, d loss / d entropy `[N]` or empty).

    All tensors are `[N]`. `objective` has the fields of `fastpref.reference.PolicyObjective`. Metrics are ratio, kl and
    clipped.
    """
    n = logps.numel()
    logps, old_logps, ref_logps, advantages, entropy, weights = dense(
        logps, old_logps, ref_logps, advantages, entropy, weights
    )
    loss, coef, metrics = torch.empty_like(logps), torch.empty_like(logps), logps.new_empty(3, n)
    coef_entropy = logps.new_empty(0 if entropy is None else n)
    if n == 0:
        return loss, metrics, coef, coef_entropy
    with on_device_of(logps):
        _policy_loss_kernel[(triton.cdiv(n, 1024),)](
            logps, old_logps, ref_logps, advantages, entropy, weights, loss, coef, coef_entropy, metrics, n,
            LOW=1 - objective.epsilon_low, HIGH=1 + objective.epsilon_high, KL_BETA=objective.beta,
            ENTROPY_COEF=objective.entropy_coef, HAS_OLD=old_logps is not None, HAS_REF=ref_logps is not None,
            HAS_ENTROPY=entropy is not None, ACC=accumulator(logps.dtype), BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return loss, metrics, coef, coef_entropy
