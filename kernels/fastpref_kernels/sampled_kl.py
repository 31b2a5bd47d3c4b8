"""KL penalties estimated from the log-probs of sampled tokens: k1, k2, k3 and abs, and the reward penalised by them.

A token has one number. So the whole reward of a sequence (penalties, the score at its last token, their sum) is one
pass of one program.

Formulas and their sources: `fastpref/reference/kl.py`. The branches here add the derivatives.
"""

import torch
import triton
import triton.language as tl

from ._launch import dense, on_device_of
from ._math import expm1


@triton.jit
def _estimate(log_ratio, ESTIMATOR: tl.constexpr):
    """(estimate, its derivative) from log p - log q of a sampled token."""
    if ESTIMATOR == "k1":
        return log_ratio, tl.full(log_ratio.shape, 1.0, log_ratio.dtype)
    elif ESTIMATOR == "k2":
        return 0.5 * log_ratio * log_ratio, log_ratio
    elif ESTIMATOR == "k3":
        x = -log_ratio
        e = expm1(x)
        return e - x, -e
    else:
        sign = tl.where(log_ratio > 0, 1.0, tl.where(log_ratio < 0, -1.0, 0.0)).to(log_ratio.dtype)
        return tl.abs(log_ratio), sign


@triton.jit(do_not_specialize=["N"])
def _kl_estimate_kernel(logps_ptr, ref_ptr, kl_ptr, slope_ptr, N, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    log_ratio = tl.load(logps_ptr + at, mask=inside, other=0.0) - tl.load(ref_ptr + at, mask=inside, other=0.0)
    kl, slope = _estimate(log_ratio, ESTIMATOR)
    tl.store(kl_ptr + at, kl, mask=inside)
    tl.store(slope_ptr + at, slope, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _penalized_rewards_kernel(
    # data
    scores_ptr, logps_ptr, ref_ptr, mask_ptr, beta_ptr, rewards_ptr, sums_ptr,
    # sizes
    T,
    # constants
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    beta = tl.load(beta_ptr)
    score = tl.load(scores_ptr + row)
    total = score
    waiting = True
    for done in range(0, T, BLOCK):  # from the end: the first scored token met is the last of the sequence
        cols = (T - 1) // BLOCK * BLOCK - done + tl.arange(0, BLOCK)
        inside = cols < T
        at = row * T + cols
        scored = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        log_ratio = tl.load(logps_ptr + at, mask=scored, other=0.0) - tl.load(ref_ptr + at, mask=scored, other=0.0)
        kl, _ = _estimate(log_ratio, ESTIMATOR)
        penalty = tl.where(scored, -beta * kl, 0.0)
        last = tl.max(tl.where(scored, cols, -1), axis=0)
        tl.store(rewards_ptr + at, penalty + tl.where(waiting & (cols == last), score, 0.0), mask=inside)
        waiting = waiting & (last < 0)
        total += tl.sum(penalty, axis=0)
    tl.store(sums_ptr + row, total)


@triton.jit(do_not_specialize=["T"])
def _penalized_rewards_backward_kernel(
    # data
    grad_rewards_ptr, grad_sums_ptr, logps_ptr, ref_ptr, mask_ptr, beta_ptr, d_scores_ptr, d_logps_ptr,
    # sizes
    T,
    # constants
    HAS_REWARDS: tl.constexpr, HAS_SUMS: tl.constexpr, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    beta = tl.load(beta_ptr)
    d_score = beta * 0.0
    if HAS_SUMS:
        d_score = tl.load(grad_sums_ptr + row)
    d_sum = d_score
    waiting = True
    for done in range(0, T, BLOCK):
        cols = (T - 1) // BLOCK * BLOCK - done + tl.arange(0, BLOCK)
        inside = cols < T
        at = row * T + cols
        scored = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        log_ratio = tl.load(logps_ptr + at, mask=scored, other=0.0) - tl.load(ref_ptr + at, mask=scored, other=0.0)
        _, slope = _estimate(log_ratio, ESTIMATOR)
        grad = tl.zeros([BLOCK], beta.dtype) + d_sum
        if HAS_REWARDS:
            grad_reward = tl.load(grad_rewards_ptr + at, mask=scored, other=0.0)
            grad += grad_reward
            last = tl.max(tl.where(scored, cols, -1), axis=0)
            d_score += tl.sum(tl.where(waiting & (cols == last), grad_reward, 0.0), axis=0)
            waiting = waiting & (last < 0)
        tl.store(d_logps_ptr + at, tl.where(scored, -beta * slope * grad, 0.0), mask=inside)
    tl.store(d_scores_ptr + row, d_score)


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(estimate, d estimate / d logps), each `[N]`. Both inputs are fp32, or both fp64."""
    logps, ref_logps = dense(logps, ref_logps)
    kl, slope = torch.empty_like(logps), torch.empty_like(logps)
    if logps.numel():
        with on_device_of(logps):
            _kl_estimate_kernel[(triton.cdiv(logps.numel(), 1024),)](
                logps, ref_logps, kl, slope, logps.numel(), ESTIMATOR=estimator, BLOCK=1024, num_warps=4
            )
    return kl, slope


def _sequence_block(length: int) -> tuple[int, int]:
    block = min(2048, max(64, triton.next_power_of_2(length)))
    return block, max(1, min(8, block // 256))


def penalized_rewards(
    scores: torch.Tensor, logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, beta: torch.Tensor,
    estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(rewards `[S, T]`, their sums with the scores `[S]`). All inputs but the mask are fp32, or all fp64.

    beta is a 0-d tensor. A number would be a constant of the kernel, or lose half its digits in fp64.
    """
    scores, logps, ref_logps, mask = dense(scores, logps, ref_logps, mask)
    rewards, sums = torch.empty_like(logps), torch.empty_like(scores)
    block, warps = _sequence_block(logps.shape[1])
    if len(scores):
        with on_device_of(logps):
            _penalized_rewards_kernel[(len(scores),)](
                scores, logps, ref_logps, mask, beta, rewards, sums,
                logps.shape[1], ESTIMATOR=estimator, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return rewards, sums


def penalized_rewards_backward(
    grad_rewards: torch.Tensor | None, grad_sums: torch.Tensor | None, logps: torch.Tensor, ref_logps: torch.Tensor,
    mask: torch.Tensor, beta: torch.Tensor, estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(d scores `[S]`, d logps `[S, T]`) of `penalized_rewards`. An upstream gradient that is None is zero."""
    grad_rewards, grad_sums = dense(grad_rewards, grad_sums)
    logps, ref_logps, mask = dense(logps, ref_logps, mask)
    d_scores, d_logps = logps.new_empty(len(logps)), torch.empty_like(logps)
    block, warps = _sequence_block(logps.shape[1])
    if len(logps):
        with on_device_of(logps):
            _penalized_rewards_backward_kernel[(len(logps),)](
                grad_rewards, grad_sums, logps, ref_logps, mask, beta, d_scores, d_logps,
                logps.shape[1], HAS_REWARDS=grad_rewards is not None, HAS_SUMS=grad_sums is not None,
                ESTIMATOR=estimator, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return d_scores, d_logps
