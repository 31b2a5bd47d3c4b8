"""DPO and its family: token log-probs of `[B chosen; B rejected]` -> loss, metrics and coefficients in one launch.

The whole batch is a few hundred kilobytes, so one program does it all in a fixed order. That is deterministic to the
bit, and needs no second kernel to add up the pairs. The coefficient of a token, d loss / d log-prob, is what the head's
gradient is scaled by.

Formulas and their sources: `fastpref/reference/paired.py`. The branches here add the derivatives.
"""

import math

import torch
import triton
import triton.language as tl

from ._launch import accumulator, dense, on_device_of
from ._math import LN2, exp, expm1, log1p, log_sigmoid, sigmoid
from ._sequences import spread_coefs, sum_sequences

# the order is the code that the kernel branches on
LOSSES = (
    "sigmoid", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm", "odds_ratio",
)  # fmt: skip
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@triton.jit
def _divergence(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """f'(e^x) and its derivative with respect to x."""
    if KIND == 0:
        return x, tl.full(x.shape, 1.0, x.dtype)
    elif KIND == 1:
        return 1.0 - exp(-x), exp(-x)
    elif KIND == 2:
        return LN2 + log_sigmoid(x), sigmoid(-x)
    else:
        y = x * (ALPHA - 1.0)
        e = exp(tl.minimum(y, 80.0))
        return (e - 1.0) / (ALPHA - 1.0), tl.where(y <= 80.0, e, 0.0)


@triton.jit
def _log1mexp(x):
    """log(1 - e^x) and its derivative for x <= 0. Probabilities within rounding of 1 count as 1 - eps."""
    if x.dtype == tl.float64:
        limit: tl.constexpr = -2.220446049250313e-16
    else:
        limit: tl.constexpr = -1.1920928955078125e-07
    y = tl.minimum(x, limit)
    complement = -expm1(y)
    value = tl.where(y < -LN2, log1p(-exp(y)), tl.log(complement))
    return value, tl.where(x <= limit, -exp(y) / complement, 0.0)


@triton.jit
def _smoothed_logistic(x, EPS: tl.constexpr):
    loss = -(1.0 - EPS) * log_sigmoid(x) - EPS * log_sigmoid(-x)
    return loss, EPS * sigmoid(x) - (1.0 - EPS) * sigmoid(-x)


@triton.jit
def _pair_loss(
    a, b, len_a, len_b, u_a, u_b,
    KIND: tl.constexpr, BETA: tl.constexpr, EPS: tl.constexpr, LOG_EPS: tl.constexpr, LOG_1_EPS: tl.constexpr,
    GAMMA: tl.constexpr, TAU: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Loss of each pair and its derivatives with respect to the log-ratios a (chosen) and b (rejected)."""
    sa, da = _divergence(a, DIVERGENCE, ALPHA)
    sb, db = _divergence(b, DIVERGENCE, ALPHA)
    x = BETA * (sa - sb) - GAMMA
    if KIND == 0:  # sigmoid
        loss, dx = _smoothed_logistic(x, EPS)
        return loss, dx * BETA * da, -dx * BETA * db
    elif KIND == 1:  # hinge
        dx = tl.where(x < 1.0, -1.0, 0.0).to(x.dtype)  # or BETA would meet an fp32 constant in an fp64 run
        return tl.maximum(1.0 - x, 0.0), dx * BETA * da, -dx * BETA * db
    elif KIND == 2:  # ipo, per token
        y = sa / len_a - sb / len_b - 0.5 / BETA
        return y * y, 2.0 * y * da / len_a, -2.0 * y * db / len_b
    elif KIND == 3:  # ipo_sum
        y = sa - sb - 0.5 / BETA
        return y * y, 2.0 * y * da, -2.0 * y * db
    elif KIND == 4:  # exo_pair
        q = sigmoid(x)
        q1 = sigmoid(-x)
        loss = q * (log_sigmoid(x) - LOG_1_EPS) + q1 * (log_sigmoid(-x) - LOG_EPS)
        dx = q * q1 * (x - LOG_1_EPS + LOG_EPS)
        return loss, dx * BETA * da, -dx * BETA * db
    elif KIND == 5:  # nca_pair
        x = BETA * a
        y = BETA * b
        loss = -log_sigmoid(x) - 0.5 * log_sigmoid(-x) - 0.5 * log_sigmoid(-y)
        return loss, BETA * (0.5 * sigmoid(x) - sigmoid(-x)), BETA * 0.5 * sigmoid(y)
    elif KIND == 6:  # robust
        loss = (EPS * log_sigmoid(-x) - (1.0 - EPS) * log_sigmoid(x)) / (1.0 - 2.0 * EPS)
        dx = -(EPS * sigmoid(x) + (1.0 - EPS) * sigmoid(-x)) / (1.0 - 2.0 * EPS)
        return loss, dx * BETA * da, -dx * BETA * db
    elif KIND == 7:  # bco_pair
        x = BETA * a
        y = BETA * b
        return -log_sigmoid(x) - log_sigmoid(-y), -BETA * sigmoid(-x), BETA * sigmoid(y)
    elif KIND == 8:  # sppo_hard
        x = a - 0.5 / BETA
        y = b + 0.5 / BETA
        return x * x + y * y, 2.0 * x, 2.0 * y
    elif KIND == 9 or KIND == 10:  # aot, aot_unpaired: each side meets its match in the sorted order
        loss, dx = _smoothed_logistic(BETA * u_a, EPS)
        _, dy = _smoothed_logistic(BETA * u_b, EPS)
        return loss, BETA * dx, -BETA * dy
    elif KIND == 11:  # apo_zero
        p = sigmoid(BETA * a)
        q = sigmoid(BETA * b)
        return 1.0 - p + q, -BETA * p * (1.0 - p), BETA * q * (1.0 - q)
    elif KIND == 12:  # apo_down
        p = sigmoid(BETA * a)
        q = sigmoid(BETA * (a - b))
        dq = BETA * q * (1.0 - q)
        return p + 1.0 - q, BETA * p * (1.0 - p) - dq, dq
    elif KIND == 13:  # discopop
        log_m = log_sigmoid(x / TAU)
        m = exp(log_m)
        e = exp(log_m - x)
        loss = -log_sigmoid(x) * (1.0 - m) + e
        dlog_m = sigmoid(-x / TAU) / TAU
        dx = -sigmoid(-x) * (1.0 - m) + log_sigmoid(x) * m * dlog_m + e * (dlog_m - 1.0)
        return loss, dx * BETA * da, -dx * BETA * db
    elif KIND == 14:  # sigmoid_norm
        x = BETA * (sa / len_a - sb / len_b)
        return -log_sigmoid(x), -sigmoid(-x) * BETA * da / len_a, sigmoid(-x) * BETA * db / len_b
    else:  # odds_ratio
        log_not_a, slope_a = _log1mexp(a)
        log_not_b, slope_b = _log1mexp(b)
        log_odds = (a - b) - (log_not_a - log_not_b)
        push = sigmoid(-log_odds)
        return -log_sigmoid(log_odds), -push * (1.0 - slope_a), push * (1.0 - slope_b)


@triton.jit
def _load_pairs(
    sums_ptr, lengths_ptr, ref_ptr, pairs, real, B,
    HAS_REF: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Scores, reference scores and lengths of a block of pairs."""
    len_a = tl.maximum(tl.load(lengths_ptr + pairs, mask=real, other=1.0).to(ACC), 1.0)
    len_b = tl.maximum(tl.load(lengths_ptr + B + pairs, mask=real, other=1.0).to(ACC), 1.0)
    chosen = tl.load(sums_ptr + pairs, mask=real, other=0.0)
    rejected = tl.load(sums_ptr + B + pairs, mask=real, other=0.0)
    if AVERAGE:
        chosen = chosen / len_a
        rejected = rejected / len_b
    ref_a = tl.zeros(chosen.shape, ACC)
    ref_b = tl.zeros(chosen.shape, ACC)
    if HAS_REF:
        ref_a = tl.load(ref_ptr + pairs, mask=real, other=0.0).to(ACC)
        ref_b = tl.load(ref_ptr + B + pairs, mask=real, other=0.0).to(ACC)
    return chosen, rejected, ref_a, ref_b, len_a, len_b


@triton.jit
def _sort_keys(chosen, rejected, ref_a, ref_b, UNPAIRED: tl.constexpr):
    """The two samples whose sorted values AOT matches: (a, b), or (policy margin, reference margin)."""
    if UNPAIRED:
        return chosen - ref_a, rejected - ref_b
    else:
        return chosen - rejected, ref_a - ref_b


@triton.jit
def _rank(key, index, keys_ptr, B, BLOCK: tl.constexpr):
    """Each key's position in the sorted order of keys_ptr[:B]. Ties are in the order of their index."""
    rank = tl.zeros(key.shape, tl.int32)
    for first in range(0, B, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(keys_ptr + j, mask=j < B, other=0.0)
        before = (other[None, :] < key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < index[:, None]))
        rank += tl.sum((before & (j < B)[None, :]).to(tl.int32), axis=1)
    return rank


@triton.jit
def _sort_samples(
    sums_ptr, lengths_ptr, ref_ptr, scratch_ptr, B,
    UNPAIRED: tl.constexpr, HAS_REF: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write both samples' keys to scratch[:2B], and both sorted to scratch[2B:4B].

    Each key is stored at its rank, which is deterministic.
    """
    for first in range(0, B, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        real = pairs < B
        chosen, rejected, ref_a, ref_b, _, _ = _load_pairs(
            sums_ptr, lengths_ptr, ref_ptr, pairs, real, B, HAS_REF, AVERAGE, ACC
        )
        x, y = _sort_keys(chosen, rejected, ref_a, ref_b, UNPAIRED)
        tl.store(scratch_ptr + pairs, x, mask=real)
        tl.store(scratch_ptr + B + pairs, y, mask=real)
    tl.debug_barrier()
    for first in range(0, B, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        real = pairs < B
        x = tl.load(scratch_ptr + pairs, mask=real, other=0.0)
        y = tl.load(scratch_ptr + B + pairs, mask=real, other=0.0)
        tl.store(scratch_ptr + 2 * B + _rank(x, pairs, scratch_ptr, B, BLOCK), x, mask=real)
        tl.store(scratch_ptr + 3 * B + _rank(y, pairs, scratch_ptr + B, B, BLOCK), y, mask=real)
    tl.debug_barrier()


@triton.jit
def _matched_margins(
    pairs, real, scratch_ptr, B, KIND: tl.constexpr, AOT: tl.constexpr, UNPAIRED: tl.constexpr, BLOCK: tl.constexpr
):
    """AOT's margin u of each pair's chosen and rejected side: its key minus the other sample's key of the same rank."""
    if KIND == UNPAIRED:
        keys_ptr = scratch_ptr + 4 * B
    else:
        keys_ptr = scratch_ptr
    x = tl.load(keys_ptr + pairs, mask=real, other=0.0)
    y = tl.load(keys_ptr + B + pairs, mask=real, other=0.0)
    if KIND == AOT or KIND == UNPAIRED:
        u_a = x - tl.load(keys_ptr + 3 * B + _rank(x, pairs, keys_ptr, B, BLOCK), mask=real, other=0.0)
        if KIND == AOT:
            return u_a, u_a  # one key, the policy's margin, moves both sides
        else:
            u_b = tl.load(keys_ptr + 2 * B + _rank(y, pairs, keys_ptr + B, B, BLOCK), mask=real, other=0.0) - y
            return u_a, u_b
    else:
        return x, y


@triton.jit(do_not_specialize=["B", "seq_len", "total_pairs", "ignore_index"])
def _paired_loss_kernel(
    # data
    logps_ptr, labels_ptr, cu_seqlens_ptr, ref_ptr, lengths_ptr, token_weights_ptr, pair_weights_ptr,
    chosen_tokens_ptr, loss_ptr, metrics_ptr, coefs_ptr, sums_ptr, counts_ptr, seq_coefs_ptr, nll_sums_ptr, scratch_ptr,
    # sizes
    B, seq_len, total_pairs, ignore_index,
    # objective
    KINDS: tl.constexpr, WEIGHTS: tl.constexpr, NUM_KINDS: tl.constexpr, SFT_WEIGHT: tl.constexpr,
    BETA: tl.constexpr, EPS: tl.constexpr, LOG_EPS: tl.constexpr, LOG_1_EPS: tl.constexpr, GAMMA: tl.constexpr,
    TAU: tl.constexpr, DIVERGENCE: tl.constexpr, ALPHA: tl.constexpr, AVERAGE: tl.constexpr,
    # constants
    HAS_AOT: tl.constexpr, HAS_AOT_UNPAIRED: tl.constexpr, HAS_LABELS: tl.constexpr, PACKED: tl.constexpr,
    HAS_REF: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_TOKEN_WEIGHTS: tl.constexpr, HAS_PAIR_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sum_sequences(
        logps_ptr, labels_ptr, cu_seqlens_ptr, sums_ptr, counts_ptr, 2 * B, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T, token_weights_ptr, HAS_TOKEN_WEIGHTS,
    )  # fmt: skip
    if HAS_TOKEN_WEIGHTS and SFT_WEIGHT != 0.0:  # weights shape the score of a sequence, not its likelihood
        sum_sequences(
            logps_ptr, labels_ptr, cu_seqlens_ptr, nll_sums_ptr, counts_ptr, 2 * B, seq_len, ignore_index,
            HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T,
        )  # fmt: skip
    else:
        nll_sums_ptr = sums_ptr
    tl.debug_barrier()  # what one thread stored, the others load
    if not HAS_LENGTHS:
        lengths_ptr = counts_ptr
    if HAS_AOT:
        _sort_samples(sums_ptr, lengths_ptr, ref_ptr, scratch_ptr, B, False, HAS_REF, AVERAGE, ACC, BLOCK)
    if HAS_AOT_UNPAIRED:
        _sort_samples(sums_ptr, lengths_ptr, ref_ptr, scratch_ptr + 4 * B, B, True, HAS_REF, AVERAGE, ACC, BLOCK)

    batch_loss = tl.full((), 0.0, ACC)
    sft_coef = tl.full((), 0.0, ACC)
    if SFT_WEIGHT != 0.0:
        sft_coef = -SFT_WEIGHT / tl.maximum(tl.load(chosen_tokens_ptr).to(ACC), 1.0)
    for first in range(0, B, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        real = pairs < B
        chosen, rejected, ref_a, ref_b, len_a, len_b = _load_pairs(
            sums_ptr, lengths_ptr, ref_ptr, pairs, real, B, HAS_REF, AVERAGE, ACC
        )
        a = chosen - ref_a
        b = rejected - ref_b
        loss = tl.zeros([BLOCK], ACC)
        coef_a = tl.zeros([BLOCK], ACC)
        coef_b = tl.zeros([BLOCK], ACC)
        for i in tl.static_range(NUM_KINDS):
            u_a = a
            u_b = b
            if KINDS[i] == 9 or KINDS[i] == 10:
                u_a, u_b = _matched_margins(pairs, real, scratch_ptr, B, KINDS[i], 9, 10, BLOCK)
            one, d_a, d_b = _pair_loss(
                a, b, len_a, len_b, u_a, u_b, KINDS[i], BETA, EPS, LOG_EPS, LOG_1_EPS, GAMMA, TAU, DIVERGENCE, ALPHA
            )
            loss += WEIGHTS[i] * one
            coef_a += WEIGHTS[i] * d_a
            coef_b += WEIGHTS[i] * d_b
        if AVERAGE:
            coef_a = coef_a / len_a
            coef_b = coef_b / len_b
        scale = tl.full((), 1.0, ACC) / total_pairs
        if HAS_PAIR_WEIGHTS:
            scale = scale * tl.load(pair_weights_ptr + pairs, mask=real, other=0.0).to(ACC)
        tl.store(seq_coefs_ptr + pairs, coef_a * scale, mask=real)
        tl.store(seq_coefs_ptr + B + pairs, coef_b * scale, mask=real)
        sft_loss = sft_coef * tl.load(nll_sums_ptr + pairs, mask=real, other=0.0)
        batch_loss += tl.sum(tl.where(real, loss * scale + sft_loss, 0.0), axis=0)

        margin = BETA * a - BETA * b
        tl.store(metrics_ptr + pairs, chosen, mask=real)
        tl.store(metrics_ptr + B + pairs, rejected, mask=real)
        tl.store(metrics_ptr + 2 * B + pairs, BETA * a, mask=real)
        tl.store(metrics_ptr + 3 * B + pairs, BETA * b, mask=real)
        tl.store(metrics_ptr + 4 * B + pairs, margin, mask=real)
        tl.store(metrics_ptr + 5 * B + pairs, (margin > 0).to(ACC), mask=real)
    tl.store(loss_ptr, batch_loss)
    tl.debug_barrier()

    spread_coefs(
        coefs_ptr, seq_coefs_ptr, labels_ptr, cu_seqlens_ptr, 2 * B, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T, token_weights_ptr, HAS_TOKEN_WEIGHTS, B, sft_coef,
    )  # fmt: skip


def paired_loss(
    token_logps: torch.Tensor, labels: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor | None, lengths: torch.Tensor | None, pair_weights: torch.Tensor | None,
    chosen_tokens: torch.Tensor | None, objective, *, num_pairs: int, total_pairs: int, ignore_index: int,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, metrics `[6, B]`, d loss / d token_logps `[N]`) of a group of `num_pairs` pairs, in one launch.

    Sequences are `cu_seqlens[s]:cu_seqlens[s + 1]`, or N / 2B rows each. `objective` has the fields of
    `fastpref.reference.PairedObjective`. Losses are divided by `total_pairs`, the batch's number of pairs. Metrics are
    chosen and rejected log-probs, chosen and rejected rewards, margins and accuracies. `chosen_tokens` (0-d) is the
    denominator of an `sft` term. `token_weights` `[N]` weigh the tokens of a sequence's score, not of the `sft` term.
    """
    o, n, dtype = objective, token_logps.numel(), token_logps.dtype
    inputs = dense(token_logps, labels, cu_seqlens, ref_logps, lengths, token_weights, pair_weights, chosen_tokens)
    terms = dict(zip(o.losses, o.weights, strict=True))
    sft_weight = terms.pop("sft", 0.0)
    kinds = tuple(LOSSES.index(name) for name in terms)
    loss, metrics, coefs = (token_logps.new_empty(shape) for shape in ((), (6, num_pairs), (n,)))
    per_sequence = token_logps.new_empty(4, 2 * num_pairs)
    sorts = "aot" in terms or "aot_unpaired" in terms
    eps = o.label_smoothing
    with on_device_of(token_logps):
        _paired_loss_kernel[(1,)](
            *inputs, loss, metrics, coefs, *per_sequence, token_logps.new_empty(8, num_pairs) if sorts else None,
            num_pairs, 0 if cu_seqlens is not None else n // (2 * num_pairs), total_pairs, ignore_index,
            KINDS=kinds, WEIGHTS=tuple(terms.values()), NUM_KINDS=len(kinds), SFT_WEIGHT=sft_weight,
            BETA=o.beta, EPS=eps, LOG_EPS=math.log(eps) if eps else 0.0, LOG_1_EPS=math.log1p(-eps), GAMMA=o.gamma,
            TAU=o.tau, DIVERGENCE=_divergence_code(o), ALPHA=o.alpha, AVERAGE=o.average,
            HAS_AOT="aot" in terms, HAS_AOT_UNPAIRED="aot_unpaired" in terms, HAS_LABELS=labels is not None,
            PACKED=cu_seqlens is not None, HAS_REF=ref_logps is not None, HAS_LENGTHS=lengths is not None,
            HAS_TOKEN_WEIGHTS=token_weights is not None, HAS_PAIR_WEIGHTS=pair_weights is not None,
            ACC=accumulator(dtype), BLOCK=16, BLOCK_T=128, num_warps=8,
        )  # fmt: skip
    return loss, metrics, coefs


def _divergence_code(objective) -> int:
    if objective.f_divergence == "alpha_divergence" and abs(objective.alpha - 1) < 1e-6:
        return 0  # its limit is the reverse KL
    return DIVERGENCES.index(objective.f_divergence)
