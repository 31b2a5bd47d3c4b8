"""Losses on ranked responses: token log-probs of S sequences -> loss, metrics and coefficients, in one launch.

Each sequence belongs to a group, and is compared with all others of it. As in `paired_loss`, one program does it all in
a fixed order: S^2 comparisons, and each sequence adds up its own gradient.

Formulas and their sources: `fastpref/reference/lists.py`. The branches here add the derivatives.
"""

import math

import torch
import triton
import triton.language as tl

from ._launch import accumulator, dense, on_device_of
from ._math import exp, expm1, log1p, log_sigmoid, sigmoid
from ._sequences import spread_coefs, sum_sequences

LOSSES = ("plackett_luce", "all_pairs", "rao_kupper", "davidson")  # the order is the code that the kernel branches on


@triton.jit
def _load_block(ranks_ptr, group_ptr, scores_ptr, first, S, BLOCK: tl.constexpr):
    """A block of sequences, which of them are real, and their ranks, groups and scores."""
    seqs = first + tl.arange(0, BLOCK)
    real = seqs < S
    rank = tl.load(ranks_ptr + seqs, mask=real, other=0)
    group = tl.load(group_ptr + seqs, mask=real, other=0)
    return seqs, real, rank, group, tl.load(scores_ptr + seqs, mask=real, other=0.0)


@triton.jit
def _compare(seqs, real, rank, group, mates, there, mate_rank, mate_group):
    """Which mates `[BLOCK, BLOCK]` of each sequence are worse, better, or tied with it, and which are itself or in its
    group."""
    same = (group[:, None] == mate_group[None, :]) & real[:, None] & there[None, :]
    rank, other = rank[:, None], mate_rank[None, :]
    tied = same & (rank == other) & (seqs[:, None] != mates[None, :])
    return same & (rank < other), same & (rank > other), tied, same


@triton.jit
def _count(x, ACC: tl.constexpr):
    return tl.sum(x.to(ACC), axis=1)


@triton.jit
def _tie_slope(h, cosh):
    """sinh(h) / (cosh(h) + cosh), from e^-|h|, and that denominator's logarithm less |h| and log 2."""
    q = exp(-tl.abs(h))
    rest = q * q + 2.0 * cosh * q
    slope = -expm1(-2.0 * tl.abs(h)) / (1.0 + rest)
    return tl.where(h >= 0, slope, -slope), log1p(rest)


@triton.jit
def _pair_loss(
    d, worse, better, tied, KIND: tl.constexpr, NU: tl.constexpr, ALPHA: tl.constexpr, LOG_TIE: tl.constexpr
):
    """Loss of the pairs that the row's sequence wins or ties, and the derivative of all its pairs by its own score."""
    if KIND == 1:  # all_pairs
        loss = tl.where(worse, -log_sigmoid(d), 0.0)
        return loss, tl.where(worse, -sigmoid(-d), 0.0) + tl.where(better, sigmoid(d), 0.0)
    elif KIND == 2:  # rao_kupper: P(tie) = (nu^2 - 1) sigmoid(d - alpha) sigmoid(-d - alpha)
        win = -log_sigmoid(d - ALPHA)
        tie = win - log_sigmoid(-d - ALPHA) - LOG_TIE
        slope, _ = _tie_slope(d, 0.5 * (NU + 1.0 / NU))
        gradient = tl.where(worse, -sigmoid(ALPHA - d), 0.0) + tl.where(better, sigmoid(d + ALPHA), 0.0)
        return tl.where(worse, win, 0.0) + tl.where(tied, 0.5 * tie, 0.0), gradient + tl.where(tied, slope, 0.0)
    else:  # davidson: P(win) = e^h / Z, P(tie) = 2 nu / Z, Z = e^h + e^-h + 2 nu
        h = 0.5 * d
        slope, log_rest = _tie_slope(h, NU)
        q = exp(-tl.abs(h))
        z = 1.0 + q * q + 2.0 * NU * q
        lost = tl.where(h >= 0, q * q + NU * q, 1.0 + NU * q) / z  # -d log P(win) / dd
        gained = tl.where(h >= 0, 1.0 + NU * q, q * q + NU * q) / z  # the same, seen from the loser
        win = log_rest + (tl.abs(h) - h)
        tie = log_rest + tl.abs(h) - LOG_TIE
        gradient = tl.where(worse, -lost, 0.0) + tl.where(better, gained, 0.0) + tl.where(tied, 0.5 * slope, 0.0)
        return tl.where(worse, win, 0.0) + tl.where(tied, 0.5 * tie, 0.0), gradient


@triton.jit(do_not_specialize=["S", "seq_len", "ignore_index"])
def _list_loss_kernel(
    # data
    logps_ptr, labels_ptr, cu_seqlens_ptr, ref_ptr, ranks_ptr, group_ptr, total_ptr,
    loss_ptr, metrics_ptr, coefs_ptr, sums_ptr, counts_ptr, scores_ptr, behind_ptr, seq_coefs_ptr,
    # sizes
    S, seq_len, ignore_index,
    # objective
    KIND: tl.constexpr, BETA: tl.constexpr, NU: tl.constexpr, ALPHA: tl.constexpr, LOG_TIE: tl.constexpr,
    # constants
    HAS_LABELS: tl.constexpr, PACKED: tl.constexpr, HAS_REF: tl.constexpr, HAS_TOTAL: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sum_sequences(
        logps_ptr, labels_ptr, cu_seqlens_ptr, sums_ptr, counts_ptr, S, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()  # what one thread stored, the others load
    for first in range(0, S, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        real = seqs < S
        logps = tl.load(sums_ptr + seqs, mask=real, other=0.0)
        score = logps
        if HAS_REF:
            score -= tl.load(ref_ptr + seqs, mask=real, other=0.0).to(ACC)
        score *= BETA
        tl.store(scores_ptr + seqs, score, mask=real)
        tl.store(metrics_ptr + seqs, logps, mask=real)
        tl.store(metrics_ptr + S + seqs, score, mask=real)
    tl.debug_barrier()

    groups = tl.full((), 0.0, ACC)
    for first in range(0, S, BLOCK):
        seqs, real, rank, group, score = _load_block(ranks_ptr, group_ptr, scores_ptr, first, S, BLOCK)
        num_worse = tl.zeros([BLOCK], ACC)
        num_better = tl.zeros([BLOCK], ACC)
        num_tied = tl.zeros([BLOCK], ACC)
        num_right = tl.zeros([BLOCK], ACC)
        before = tl.zeros([BLOCK], ACC)
        top = tl.full([BLOCK], float("-inf"), ACC)  # of the scores of those ranked worse, and their log-sum-exp
        total = tl.zeros([BLOCK], ACC)
        for start in range(0, S, BLOCK):
            mates, there, their_rank, their_group, other = _load_block(
                ranks_ptr, group_ptr, scores_ptr, start, S, BLOCK
            )
            worse, better, tied, same = _compare(seqs, real, rank, group, mates, there, their_rank, their_group)
            other = other[None, :]
            num_worse += _count(worse, ACC)
            num_better += _count(better, ACC)
            num_tied += _count(tied, ACC)
            num_right += _count(worse & (score[:, None] - other > 0), ACC)
            before += _count(same & (mates[None, :] < seqs[:, None]), ACC)
            if KIND == 0:
                most = tl.maximum(top, tl.max(tl.where(worse, other, float("-inf")), axis=1))
                finite = tl.where(most == float("-inf"), 0.0, most)
                total = total * exp(top - finite)
                total += tl.sum(tl.where(worse, exp(tl.where(worse, other - finite[:, None], 0.0)), 0.0), axis=1)
                top = most
        if KIND == 0:
            behind = tl.where(num_worse > 0, top + tl.log(tl.maximum(total, 1.0)) - score, float("-inf"))
            tl.store(behind_ptr + seqs, behind, mask=real)
        compared = num_worse + num_better
        if KIND >= 2:
            compared += num_tied
        groups += tl.sum(tl.where(real & (compared > 0) & (before == 0), 1.0, 0.0).to(ACC), axis=0)
        share = 1.0 / (num_tied + 1.0)
        tl.store(metrics_ptr + 2 * S + seqs, num_right, mask=real)
        tl.store(metrics_ptr + 3 * S + seqs, num_worse, mask=real)
        tl.store(metrics_ptr + 4 * S + seqs, tl.where((num_better == 0) & (num_worse > 0), share, 0.0), mask=real)
        tl.store(metrics_ptr + 5 * S + seqs, tl.where((num_worse == 0) & (num_better > 0), share, 0.0), mask=real)
    if HAS_TOTAL:
        groups = tl.load(total_ptr).to(ACC)
    scale = 1.0 / tl.maximum(groups, 1.0)
    tl.debug_barrier()

    batch_loss = tl.full((), 0.0, ACC)
    for first in range(0, S, BLOCK):
        seqs, real, rank, group, score = _load_block(ranks_ptr, group_ptr, scores_ptr, first, S, BLOCK)
        loss = tl.zeros([BLOCK], ACC)
        coef = tl.zeros([BLOCK], ACC)
        size = tl.zeros([BLOCK], ACC)
        for start in range(0, S, BLOCK):
            mates, there, their_rank, their_group, other = _load_block(
                ranks_ptr, group_ptr, scores_ptr, start, S, BLOCK
            )
            worse, better, tied, same = _compare(seqs, real, rank, group, mates, there, their_rank, their_group)
            other = other[None, :]
            size += _count(same, ACC)
            if KIND == 0:  # a better mate's denominator: its score plus log(1 + e^behind)
                behind = tl.load(behind_ptr + mates, mask=there, other=0.0)[None, :]
                share = tl.where(better, score[:, None] - other + log_sigmoid(-behind), 0.0)
                coef += tl.sum(tl.where(better, exp(share), 0.0), axis=1)
            else:
                losses, slopes = _pair_loss(score[:, None] - other, worse, better, tied, KIND, NU, ALPHA, LOG_TIE)
                loss += tl.sum(losses, axis=1)
                coef += tl.sum(slopes, axis=1)
        if KIND == 0:
            behind = tl.load(behind_ptr + seqs, mask=real, other=0.0)
            loss = tl.where(behind == float("-inf"), 0.0, -log_sigmoid(-behind))
            coef -= tl.where(behind == float("-inf"), 0.0, sigmoid(behind))
            weight = tl.full([BLOCK], 1.0, ACC) * scale
        else:
            weight = scale * 2.0 / tl.maximum(size * (size - 1.0), 1.0)
        batch_loss += tl.sum(tl.where(real, loss * weight, 0.0), axis=0)
        tl.store(seq_coefs_ptr + seqs, BETA * weight * coef, mask=real)
    tl.store(loss_ptr, batch_loss)
    tl.debug_barrier()

    spread_coefs(
        coefs_ptr, seq_coefs_ptr, labels_ptr, cu_seqlens_ptr, S, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T,
    )  # fmt: skip


def list_loss(
    token_logps: torch.Tensor, labels: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None, ranks: torch.Tensor, group: torch.Tensor, total_groups: torch.Tensor | None,
    objective, *, ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, metrics `[6, S]`, d loss / d token_logps `[N]`) of whole groups of sequences, in one launch.

    Sequences are `cu_seqlens[s]:cu_seqlens[s + 1]`, or N / S rows each. `ranks` `[S]` are lower for better ones, and
    `group` `[S]` are integers, in any order. `objective` has the fields of `fastpref.reference.ListObjective`. The loss
    is divided by `total_groups` (0-d), by default the number of groups here that say anything. Metrics are those of
    `fastpref.reference.list_metrics`.
    """
    o, n, sequences = objective, token_logps.numel(), ranks.numel()
    inputs = dense(token_logps, labels, cu_seqlens, ref_logps, ranks, group, total_groups)
    loss, metrics, coefs = (token_logps.new_empty(shape) for shape in ((), (6, sequences), (n,)))
    per_sequence = token_logps.new_empty(5, sequences)
    log_tie = {"rao_kupper": lambda: math.log(o.nu * o.nu - 1), "davidson": lambda: math.log(2 * o.nu)}
    with on_device_of(token_logps):
        _list_loss_kernel[(1,)](
            *inputs, loss, metrics, coefs, *per_sequence,
            sequences, 0 if cu_seqlens is not None else n // sequences, ignore_index,
            KIND=LOSSES.index(o.loss), BETA=o.beta, NU=o.nu, ALPHA=math.log(o.nu),
            LOG_TIE=log_tie.get(o.loss, float)(), HAS_LABELS=labels is not None, PACKED=cu_seqlens is not None,
            HAS_REF=ref_logps is not None, HAS_TOTAL=total_groups is not None,
            ACC=accumulator(token_logps.dtype), BLOCK=16, BLOCK_T=128, num_warps=8,
        )  # fmt: skip
    return loss, metrics, coefs
