"""The exact divergence over the vocabulary between two rows of logits, a policy's and a reference's.

For a policy row z and a reference row y (both after scale, softcap and temperature), p = softmax z, q = softmax y:

    reverse  KL(p || q) = sum_v p_v (log p_v - log q_v)     d / d z_v = p_v (log p_v - log q_v - KL)
    forward  KL(q || p) = sum_v q_v (log q_v - log p_v)     d / d z_v = p_v - q_v
    jsd      beta KL(q || m) + (1 - beta) KL(p || m)        d / d z_v = (1 - beta) p_v (log p_v - log m_v - KL(p || m))

where m = beta q + (1 - beta) p (generalised Jensen-Shannon divergence, arXiv 2306.13649, eq. 1).

One sweep over both rows gives a KL. A mixture needs both distributions, so the jsd takes a second one. K = d / d head
output is not scaled by the upstream gradient. It is written over the policy's row in one more sweep, or by a backward
from the saved log-sum-exps. The reference has no gradient.

Memory traffic, for elements of b bytes: 2 N V b in the forward (jsd: 4), 3 more with K, 3 N V b in the backward.
"""

import torch
import triton
import triton.language as tl

from ._lanes import as_lanes, finite_max, lane_max, lane_sum, load_logits
from ._launch import (
    accumulator,
    check_writable,
    dense,
    on_device_of,
    readable,
    row_strides,
    row_tile,
    stays_in_cache,
)
from ._math import LOG2E, exp, transform_logit, transform_slope


@triton.jit
def _rebase(ma_new, mb_new, ma, sa, mb, sb, t):
    """(ma_ref, sa, mb_ref, sb, t): the sums relative to the new maxima, from those relative to ma and mb.

    A new maximum that is -inf counts as 0.
    """
    ma_ref = finite_max(ma_new)
    mb_ref = finite_max(mb_new)
    rescale = exp(ma - ma_ref)
    moved = (finite_max(ma) - ma_ref) - (finite_max(mb) - mb_ref)
    t = tl.where(rescale > 0, rescale * (t + sa * moved), 0.0)  # t may be +inf
    return ma_ref, sa * rescale, mb_ref, sb * exp(mb - mb_ref), t


@triton.jit
def _fold_blocks(za, zb, ma, sa, mb, sb, t, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Fold one block of each row into each lane's KL(a || b).

    A lane has running maxima ma and mb, sums of exponentials sa and sb, and
    t = sum e^(za - ma) ((za - ma) - (zb - mb)). Differences of shifted logits keep the KL exact to its own size,
    however large the logits are.
    """
    za = as_lanes(za, LANES, VECTOR)
    zb = as_lanes(zb, LANES, VECTOR)
    ma_new = tl.maximum(ma, lane_max(za))
    mb_new = tl.maximum(mb, lane_max(zb))
    ma_ref, sa, mb_ref, sb, t = _rebase(ma_new, mb_new, ma, sa, mb, sb, t)
    a = za - ma_ref[None, :, None]
    b = zb - mb_ref[None, :, None]
    e = tl.exp2(a * LOG2E)
    # 0 log 0 = 0: impossible tokens add nothing, whatever the other row says of them
    t += lane_sum(tl.where(e > 0, e * (a - b), 0.0))
    sa += lane_sum(e)
    sb += lane_sum(tl.exp2(b * LOG2E))
    return ma_new, sa, mb_new, sb, t


@triton.jit
def _merge_lanes(ma, sa, mb, sb, t):
    """The rows' maxima and sums from their lanes'."""
    ma_row = tl.max(ma, axis=0)
    mb_row = tl.max(mb, axis=0)
    _, sa, _, sb, t = _rebase(ma_row, mb_row, ma, sa, mb, sb, t)
    return ma_row, tl.sum(sa, axis=0), mb_row, tl.sum(sb, axis=0), tl.sum(t, axis=0)


@triton.jit
def _log_ratios(log_p, log_q, BETA: tl.constexpr):
    """(log(p / m), log(q / m)) of each token, where m = BETA q + (1 - BETA) p.

    The larger of p and q comes first, so that nothing overflows.
    """
    d = log_p - log_q
    away = 1.0 - tl.exp2(-tl.abs(d) * LOG2E)
    larger = -tl.log(1.0 - tl.where(d >= 0, BETA * away, (1.0 - BETA) * away))
    return tl.where(d >= 0, larger, larger + d), tl.where(d >= 0, larger - d, larger)


@triton.jit
def _fold_mixture(
    zp, zq, mp, log_sp, mq, log_sq, tp, tq, BETA: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Fold one block of each row into each lane's tp, of KL(p || m), and tq, of KL(q || m)."""
    log_p = as_lanes(zp, LANES, VECTOR) - mp - log_sp
    log_q = as_lanes(zq, LANES, VECTOR) - mq - log_sq
    of_p, of_q = _log_ratios(log_p, log_q, BETA)
    p = tl.exp2(log_p * LOG2E)
    q = tl.exp2(log_q * LOG2E)
    tp += lane_sum(tl.where(p > 0, p * of_p, 0.0))
    tq += lane_sum(tl.where(q > 0, q * of_q, 0.0))
    return tp, tq


@triton.jit
def _load_pair(
    policy_ptr, ref_ptr, cols, V,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, ACC: tl.constexpr,
    MASKED: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    zp = load_logits(policy_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, MASKED, EVICTION)
    return zp, load_logits(ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, MASKED, EVICTION)


@triton.jit
def _kl_gradient(
    zp, zq, lse_p, lse_q, kl,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    FORWARD: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """d divergence / d policy's head output. With a mixture (BETA > 0) `kl` is KL(policy || mixture)."""
    p = tl.exp2((zp - lse_p) * LOG2E)
    if FORWARD:
        gradient = p - tl.exp2((zq - lse_q) * LOG2E)
    elif BETA > 0.0:
        of_p, _ = _log_ratios(zp - lse_p, zq - lse_q, BETA)
        gradient = tl.where(p > 0, (1.0 - BETA) * p * (of_p - kl), 0.0)
    else:
        gradient = tl.where(p > 0, p * ((zp - lse_p) - (zq - lse_q) - kl), 0.0)
    return gradient * transform_slope(zp, LOGIT_SCALE, SOFTCAP, TEMPERATURE)


@triton.jit
def _label_logprob(
    logits_ptr, target_ptr, row, label, V, m, s,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_TARGET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The label's log-prob from a finished sweep.

    With a target its fp32 logit replaces the rounded one, inside the sum too, as in `row_logprob`.
    """
    in_range = (label >= 0) & (label < V)
    z = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(ACC)
    z = transform_logit(z, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
    if HAS_TARGET:
        exact = transform_logit(tl.load(target_ptr + row).to(ACC), LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        m_new = finite_max(tl.maximum(m, exact))
        s = tl.maximum(s * exp(m - m_new) - exp(z - m_new), 0.0) + exp(exact - m_new)
        m = m_new
        z = tl.where(in_range, exact, z)
    return z - m - tl.log(s)


@triton.jit(
    do_not_specialize=["inner"],
    do_not_specialize_on_alignment=["mask_ptr", "labels_ptr", "target_ptr", "ref_target_ptr"],
)
def _token_kl_kernel(
    # data
    policy_ptr, ref_ptr, mask_ptr, labels_ptr, target_ptr, ref_target_ptr,
    kl_ptr, lse_ptr, ref_lse_ptr, logp_ptr, ref_logp_ptr, policy_kl_ptr,
    # sizes and strides
    inner, stride_outer, stride_inner, ref_stride_outer, ref_stride_inner, V,
    # constants
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, FORWARD: tl.constexpr,
    BETA: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_TARGET: tl.constexpr,
    WRITE_K: tl.constexpr, REREAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(kl_ptr + row, 0.0)
            tl.store(lse_ptr + row, 0.0)
            tl.store(ref_lse_ptr + row, 0.0)
            if BETA > 0.0:
                tl.store(policy_kl_ptr + row, 0.0)
            if HAS_LABELS:
                tl.store(logp_ptr + row, 0.0)
                tl.store(ref_logp_ptr + row, 0.0)
            return

    policy_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    ref_ptr += (row // inner) * ref_stride_outer + (row % inner) * ref_stride_inner
    ma = tl.full([LANES], float("-inf"), ACC)  # a weighs the terms: the policy, or forward the reference
    sa = tl.zeros([LANES], ACC)
    mb = tl.full([LANES], float("-inf"), ACC)
    sb = tl.zeros([LANES], ACC)
    t = tl.zeros([LANES], ACC)
    offs = tl.arange(0, BLOCK)
    few = tl.arange(0, LANES * VECTOR)  # for the rows' ends, as in row_logprob
    first_read: tl.constexpr = "evict_last" if REREAD else ""
    last_read: tl.constexpr = "evict_first" if REREAD else ""
    a_ptr = ref_ptr if FORWARD else policy_ptr
    b_ptr = policy_ptr if FORWARD else ref_ptr
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        za, zb = _load_pair(a_ptr, b_ptr, start + offs, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, first_read)
        ma, sa, mb, sb, t = _fold_blocks(za, zb, ma, sa, mb, sb, t, LANES, VECTOR)
    for start in range(full, V, LANES * VECTOR):
        cols = start + few
        za, zb = _load_pair(a_ptr, b_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, first_read)
        za = tl.where(cols < V, za, float("-inf"))
        zb = tl.where(cols < V, zb, float("-inf"))
        ma, sa, mb, sb, t = _fold_blocks(za, zb, ma, sa, mb, sb, t, LANES, VECTOR)
    ma, sa, mb, sb, t = _merge_lanes(ma, sa, mb, sb, t)

    # KL(a || b) = t / sa - log sa + log sb: the maxima have cancelled
    kl = t / sa - tl.log(sa) + tl.log(sb)
    mp, sp, mq, sq = (mb, sb, ma, sa) if FORWARD else (ma, sa, mb, sb)
    lse_p = mp + tl.log(sp)
    lse_q = mq + tl.log(sq)
    mean_ratio = kl  # under the policy: what K subtracts
    if BETA > 0.0:
        again: tl.constexpr = first_read if WRITE_K else last_read
        mp, mq = finite_max(mp), finite_max(mq)
        log_sp, log_sq = tl.log(sp), tl.log(sq)
        tp = tl.zeros([LANES], ACC)
        tq = tl.zeros([LANES], ACC)
        for start in range(0, full, BLOCK):
            cols = start + offs
            zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, again)
            tp, tq = _fold_mixture(zp, zq, mp, log_sp, mq, log_sq, tp, tq, BETA, LANES, VECTOR)
        for start in range(full, V, LANES * VECTOR):
            cols = start + few
            zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, again)
            zp = tl.where(cols < V, zp, float("-inf"))
            zq = tl.where(cols < V, zq, float("-inf"))
            tp, tq = _fold_mixture(zp, zq, mp, log_sp, mq, log_sq, tp, tq, BETA, LANES, VECTOR)
        mean_ratio = tl.sum(tp, axis=0)
        kl = BETA * tl.sum(tq, axis=0) + (1.0 - BETA) * mean_ratio
        tl.store(policy_kl_ptr + row, mean_ratio)
    tl.store(kl_ptr + row, kl)
    tl.store(lse_ptr + row, lse_p)
    tl.store(ref_lse_ptr + row, lse_q)
    if HAS_LABELS:
        label = tl.load(labels_ptr + row).to(tl.int64)
        logp = _label_logprob(
            policy_ptr, target_ptr, row, label, V, mp, sp, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_TARGET, ACC
        )
        ref_logp = _label_logprob(
            ref_ptr, ref_target_ptr, row, label, V, mq, sq, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_TARGET, ACC
        )
        tl.store(logp_ptr + row, logp)
        tl.store(ref_logp_ptr + row, ref_logp)

    if WRITE_K:
        if HAS_LABELS:
            tl.debug_barrier()  # every thread has the label's logit before any of them overwrites it
        for start in range(0, full, BLOCK):
            cols = start + offs
            zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, last_read)
            k = _kl_gradient(zp, zq, lse_p, lse_q, mean_ratio, LOGIT_SCALE, SOFTCAP, TEMPERATURE, FORWARD, BETA)
            tl.store(policy_ptr + cols, k, eviction_policy=last_read)
        for start in range(full, V, LANES * VECTOR):
            cols = start + few
            zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, last_read)
            k = _kl_gradient(zp, zq, lse_p, lse_q, mean_ratio, LOGIT_SCALE, SOFTCAP, TEMPERATURE, FORWARD, BETA)
            tl.store(policy_ptr + cols, k, mask=cols < V, eviction_policy=last_read)


@triton.jit(
    do_not_specialize=["inner"],
    do_not_specialize_on_alignment=["mask_ptr", "kl_ptr", "lse_ptr", "ref_lse_ptr", "grad_ptr"],
)
def _token_kl_gradient_kernel(
    # data
    policy_ptr, ref_ptr, mask_ptr, kl_ptr, lse_ptr, ref_lse_ptr, grad_ptr, out_ptr,
    # sizes and strides
    inner, stride_outer, stride_inner, ref_stride_outer, ref_stride_inner, stride_out, V,
    # constants
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, FORWARD: tl.constexpr,
    BETA: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    out_ptr += row * stride_out
    if HAS_MASK:
        if tl.load(mask_ptr + row) == 0:
            tl.store(out_ptr + cols, tl.zeros([BLOCK], ACC), mask=cols < V)
            return

    policy_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    ref_ptr += (row // inner) * ref_stride_outer + (row % inner) * ref_stride_inner
    kl = tl.load(kl_ptr + row)
    lse_p = tl.load(lse_ptr + row)
    lse_q = tl.load(ref_lse_ptr + row)
    g = tl.full((), 1.0, ACC)
    if HAS_GRAD:
        g = tl.load(grad_ptr + row)
    if start + BLOCK <= V:
        zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, "")
        k = _kl_gradient(zp, zq, lse_p, lse_q, kl, LOGIT_SCALE, SOFTCAP, TEMPERATURE, FORWARD, BETA)
        tl.store(out_ptr + cols, g * k)
    else:
        zp, zq = _load_pair(policy_ptr, ref_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, "")
        k = _kl_gradient(zp, zq, lse_p, lse_q, kl, LOGIT_SCALE, SOFTCAP, TEMPERATURE, FORWARD, BETA)
        tl.store(out_ptr + cols, g * k, mask=cols < V)


def _mixture(direction: str, beta: float) -> float:
    """The kernels' BETA: the reference's weight in the mixture, or 0 where there is none."""
    return beta if direction == "jsd" else 0.0


def token_kl(
    policy: torch.Tensor, ref: torch.Tensor, *, direction: str, transform, beta: float = 0.5,
    mask: torch.Tensor | None = None, labels: torch.Tensor | None = None, target_logits: torch.Tensor | None = None,
    ref_target_logits: torch.Tensor | None = None, write_k: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`kl`, `lse` and `ref_lse`, each `[N]` in fp32 (fp64 if either input is), in one launch.

    `kl` is the divergence of `direction`: `"reverse"`, `"forward"` or `"jsd"`. For the last one there is also
    `policy_kl`, KL(policy || mixture), which its gradient takes. `beta` is the reference's weight in the mixture.

    Both logits are `[N, V]` or `[B, T, V]`, with any strides and float dtypes. With `labels` `[N]` there are also
    `logps` and `ref_logps`; for those `target_logits` and `ref_target_logits` `[N]`, if given, are the labels' head
    outputs in fp32. Rows whose `mask` `[N]` is False give 0. With `write_k` the policy's logits are overwritten by K;
    their columns must then lie side by side.
    """
    n, vocab = policy.shape[:-1].numel(), policy.shape[-1]
    wide = torch.float64 if torch.float64 in (policy.dtype, ref.dtype) else torch.float32
    mixture = _mixture(direction, beta)
    names = ("kl", "lse", "ref_lse") + (("logps", "ref_logps") if labels is not None else ())
    names += ("policy_kl",) if mixture else ()
    out = {name: policy.new_empty(n, dtype=wide) for name in names}
    if n == 0:
        return out
    if write_k:
        check_writable("policy", policy)
    policy, ref = readable(policy), readable(ref)
    temperature, logit_scale, softcap = transform
    swept_again = write_k or mixture > 0
    tile = row_tile("token_kl_k" if swept_again else "token_kl", policy, ref)
    with on_device_of(policy):
        _token_kl_kernel[(n,)](
            policy, ref, *dense(mask, labels, target_logits, ref_target_logits),
            out["kl"], out["lse"], out["ref_lse"], out.get("logps"), out.get("ref_logps"),
            out.get("policy_kl"),
            *row_strides(policy), *row_strides(ref)[1:], vocab,
            LOGIT_SCALE=logit_scale, SOFTCAP=softcap or 0.0, TEMPERATURE=temperature, FORWARD=direction == "forward",
            BETA=mixture, HAS_MASK=mask is not None, HAS_LABELS=labels is not None,
            HAS_TARGET=target_logits is not None, WRITE_K=write_k,
            REREAD=swept_again and stays_in_cache(policy, ref), ACC=accumulator(wide), BLOCK=tile.block,
            LANES=tile.lanes, VECTOR=tile.vector, num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def token_kl_gradient(
    policy: torch.Tensor, ref: torch.Tensor, kl: torch.Tensor, lse: torch.Tensor, ref_lse: torch.Tensor,
    out: torch.Tensor, *, direction: str, transform, beta: float = 0.5, mask: torch.Tensor | None = None,
    grad: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write grad * K to `out` `[N, V]`, row by row. Without `grad` its factor is 1.

    `kl` is that of `token_kl`, for `"jsd"` its `policy_kl`.

    `out` may be the policy's logits themselves. All three may be a slice of the vocabulary.
    """
    n, vocab = kl.numel(), policy.shape[-1]
    if n == 0 or vocab == 0:
        return
    check_writable("out", out)
    policy, ref = readable(policy), readable(ref)
    temperature, logit_scale, softcap = transform
    tile = row_tile("token_kl_gradient", policy)
    with on_device_of(policy):
        _token_kl_gradient_kernel[(n, triton.cdiv(vocab, tile.block))](
            policy, ref, *dense(mask, kl, lse, ref_lse, grad), out,
            *row_strides(policy), *row_strides(ref)[1:], out.stride(0), vocab,
            LOGIT_SCALE=logit_scale, SOFTCAP=softcap or 0.0, TEMPERATURE=temperature, FORWARD=direction == "forward",
            BETA=_mixture(direction, beta), HAS_MASK=mask is not None, HAS_GRAD=grad is not None,
            ACC=accumulator(kl.dtype), BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip
