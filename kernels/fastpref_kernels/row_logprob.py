"""Rows of logits -> the label's log-prob, and if wanted U = d logp / d logits, written over the logits.

For a row z (after scale, softcap and temperature) with label y:

    logp = z_y - lse,   lse = log sum_v exp(z_v),   U_v = [v = y] - exp(z_v - lse)

U is never multiplied by the upstream gradient. That factor is one scalar for each row, and the callers apply it to
something of size d instead of size V. One sweep gives logp, lse and the requested statistics. A second writes U.

Memory traffic, for elements of b bytes: N V b in the forward. With U it is 3 N V b, or 2 N V b where the second sweep
finds the row in the L2 cache. 2 N V b in the backward from a saved lse.
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
def _rebase(m_new, m, s, zp, pp, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """(m_new, or 0 if it is -inf; the sums relative to that) from the sums relative to the maximum m."""
    m_ref = finite_max(m_new)
    rescale = exp(m - m_ref)
    if ENTROPY:  # sum of e (z - m): with z itself a confident row's entropy would be a difference of large numbers
        zp = (zp + tl.where(s > 0, s * (m - m_ref), 0.0)) * rescale
    s = s * rescale
    if SUM_SQ:
        pp = pp * rescale * rescale
    return m_ref, s, zp, pp


@triton.jit
def _fold_block(
    z, cols, label, z_label, m, s, zp, pp, total, above,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Fold one block of logits into each lane's running maximum m, sum of exponentials s and statistics."""
    z = as_lanes(z, LANES, VECTOR)
    m_new = tl.maximum(m, lane_max(z))
    m_ref, s, zp, pp = _rebase(m_new, m, s, zp, pp, ENTROPY, SUM_SQ)
    shifted = z - m_ref[None, :, None]  # subtract first: exact for logits in the thousands
    e = tl.exp2(shifted * LOG2E)
    s += lane_sum(e)
    if ENTROPY:
        zp += lane_sum(tl.where(e > 0, e * shifted, 0.0))
    if SUM_SQ:
        pp += lane_sum(e * e)
    if MEAN:
        total += lane_sum(z)
    if TOP1:  # how many columns beat the label; the first index wins a tie
        before = as_lanes(cols, LANES, VECTOR) < label
        above += lane_sum(((z > z_label) | ((z == z_label) & before)).to(tl.int32))
    return m_new, s, zp, pp, total, above


@triton.jit
def _merge_lanes(m, s, zp, pp, ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr):
    """The row's maximum and sums from its lanes'."""
    m_row = tl.max(m, axis=0)
    _, s, zp, pp = _rebase(m_row, m, s, zp, pp, ENTROPY, SUM_SQ)
    return m_row, tl.sum(s, axis=0), tl.sum(zp, axis=0), tl.sum(pp, axis=0)


@triton.jit(do_not_specialize=["inner", "ignore_index"], do_not_specialize_on_alignment=["labels_ptr", "target_ptr"])
def _row_logprob_kernel(
    # data
    logits_ptr, labels_ptr, target_ptr,
    logp_ptr, lse_ptr, entropy_ptr, log_sum_sq_ptr, mean_ptr, top1_ptr,
    # sizes and strides
    inner, stride_outer, stride_inner, V, ignore_index,
    # constants
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_TARGET: tl.constexpr, WRITE_U: tl.constexpr,
    ENTROPY: tl.constexpr, SUM_SQ: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, REREAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(logp_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if SUM_SQ:
            tl.store(log_sum_sq_ptr + row, 0.0)
        if MEAN:
            tl.store(mean_ptr + row, 0.0)
        if TOP1:
            tl.store(top1_ptr + row, False)
        return

    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    in_range = (label >= 0) & (label < V)
    column = label.to(tl.int32)
    # read before the second sweep overwrites it; an out-of-range label has no logit and ends as NaN
    z_label = tl.load(logits_ptr + column, mask=in_range, other=float("nan")).to(ACC)
    z_label = transform_logit(z_label, LOGIT_SCALE, SOFTCAP, TEMPERATURE)

    m = tl.full([LANES], float("-inf"), ACC)
    s = tl.zeros([LANES], ACC)
    zp = tl.zeros([LANES], ACC)
    pp = tl.zeros([LANES], ACC)
    total = tl.zeros([LANES], ACC)
    above = tl.zeros([LANES], tl.int32)
    offs = tl.arange(0, BLOCK)
    few = tl.arange(0, LANES * VECTOR)  # a row's end is taken in small steps, which need fewer registers
    first_read: tl.constexpr = "evict_last" if REREAD else ""
    last_read: tl.constexpr = "evict_first" if REREAD else ""
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        cols = start + offs
        z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, first_read)
        m, s, zp, pp, total, above = _fold_block(
            z, cols, column, z_label, m, s, zp, pp, total, above, ENTROPY, SUM_SQ, MEAN, TOP1, LANES, VECTOR
        )
    for start in range(full, V, LANES * VECTOR):
        cols = start + few
        inside = cols < V
        z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, first_read)
        if MEAN:
            total += lane_sum(as_lanes(tl.where(inside, z, 0.0), LANES, VECTOR))
        m, s, zp, pp, total, above = _fold_block(
            tl.where(inside, z, float("-inf")), cols, column, z_label, m, s, zp, pp, total, above,
            ENTROPY, SUM_SQ, False, TOP1, LANES, VECTOR,
        )  # fmt: skip
    m, s, zp, pp = _merge_lanes(m, s, zp, pp, ENTROPY, SUM_SQ)

    if ENTROPY:
        tl.store(entropy_ptr + row, tl.log(s) - zp / s)
    if SUM_SQ:
        tl.store(log_sum_sq_ptr + row, tl.log(pp / (s * s)))
    if MEAN:
        tl.store(mean_ptr + row, tl.sum(total, axis=0) / V)
    if TOP1:
        tl.store(top1_ptr + row, tl.sum(above, axis=0) == 0)
    z_exact = z_label
    if HAS_TARGET:
        # The label's logit in fp32 replaces its bf16-rounded self inside the sum too; replacing it only in
        # the numerator is worse than not at all (peaked rows: rms error 2.5e-2, against 1.1e-2 and 7e-4 this way).
        z_exact = transform_logit(tl.load(target_ptr + row).to(ACC), LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        m_new = tl.maximum(m, z_exact)
        m_ref = finite_max(m_new)
        rest = tl.maximum(s * exp(m - m_ref) - exp(z_label - m_ref), 0.0)
        s = rest + exp(z_exact - m_ref)
        m = m_new
        z_exact = tl.where(in_range, z_exact, z_label)
    log_s = tl.log(s)
    lse = m + log_s
    logp = (z_exact - m) - log_s  # not z - lse: a common offset of 1e4 would cost 5e-4
    tl.store(logp_ptr + row, logp)
    tl.store(lse_ptr + row, lse)

    if WRITE_U:  # -softmax everywhere, then the label's element: no comparison with the label in the loop
        for start in range(0, full, BLOCK):
            cols = start + offs
            z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, last_read)
            u = _minus_softmax(z, lse) * transform_slope(z, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
            tl.store(logits_ptr + cols, u, eviction_policy=last_read)
        for start in range(full, V, LANES * VECTOR):
            cols = start + few
            z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, last_read)
            u = _minus_softmax(z, lse) * transform_slope(z, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
            tl.store(logits_ptr + cols, u, mask=cols < V, eviction_policy=last_read)
        tl.debug_barrier()  # whichever thread has just stored the label's element, it is overwritten after that
        u_label = (1.0 - exp(logp)) * transform_slope(z_label, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        tl.store(logits_ptr + column, u_label, mask=in_range)


@triton.jit
def _minus_softmax(z, lse):
    """d logp / d logit of every token but the label, whose is 1 - exp(logp)."""
    return -tl.exp2((z - lse) * LOG2E)


@triton.jit(
    do_not_specialize=["inner", "first_column", "ignore_index"],
    do_not_specialize_on_alignment=[
        "labels_ptr", "logp_ptr", "lse_ptr", "entropy_ptr", "grad_logp_ptr", "grad_entropy_ptr",
    ],
)  # fmt: skip
def _row_gradient_kernel(
    # data
    logits_ptr, labels_ptr, logp_ptr, lse_ptr, entropy_ptr, grad_logp_ptr, grad_entropy_ptr, out_ptr,
    # sizes and strides
    inner, stride_outer, stride_inner, stride_out, V, first_column, ignore_index,
    # constants
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_ENTROPY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row).to(tl.int64)
    out_ptr += row * stride_out
    if label == ignore_index:
        tl.store(out_ptr + cols, tl.zeros([BLOCK], ACC), mask=cols < V)
        return

    logits_ptr += (row // inner) * stride_outer + (row % inner) * stride_inner
    # its column in this slice, if it is there: as int32, for one instruction a comparison
    column = tl.where((label >= first_column) & (label < first_column + V), label - first_column, -1).to(tl.int32)
    logp = tl.load(logp_ptr + row)
    lse = tl.load(lse_ptr + row)
    g = tl.full((), 1.0, ACC)
    g_entropy = tl.full((), 0.0, ACC)
    entropy = tl.full((), 0.0, ACC)
    if HAS_GRAD:
        g = tl.load(grad_logp_ptr + row)
    if HAS_ENTROPY:
        g_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    if start + BLOCK <= V:  # unmasked where it can be, as in the forward
        z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, False, "")
        out = _mixed_gradient(
            z, cols == column, logp, lse, entropy, g, g_entropy, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_ENTROPY
        )
        tl.store(out_ptr + cols, out)
    else:
        z = load_logits(logits_ptr, cols, V, LOGIT_SCALE, SOFTCAP, TEMPERATURE, ACC, True, "")
        out = _mixed_gradient(
            z, cols == column, logp, lse, entropy, g, g_entropy, LOGIT_SCALE, SOFTCAP, TEMPERATURE, HAS_ENTROPY
        )
        tl.store(out_ptr + cols, out, mask=cols < V)


@triton.jit
def _mixed_gradient(
    z, is_label, logp, lse, entropy, g, g_entropy,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """g * d logp / d raw + g_entropy * dH / d raw, with dH / dz_v = -p_v (log p_v + H)."""
    minus_p = _minus_softmax(z, lse)
    gradient = g * tl.where(is_label, 1.0 - exp(logp), minus_p)
    if HAS_ENTROPY:
        gradient += g_entropy * tl.where(minus_p < 0, minus_p * (z - lse + entropy), 0.0)
    return gradient * transform_slope(z, LOGIT_SCALE, SOFTCAP, TEMPERATURE)


@triton.jit(do_not_specialize_on_alignment=["labels_ptr"])
def _target_logit_kernel(
    # data
    hidden_ptr, weight_ptr, bias_ptr, labels_ptr, out_ptr,
    # sizes and strides
    d, V, stride_hidden, stride_hidden_col, stride_weight, stride_weight_col, stride_bias,
    # constants
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    in_range = (label >= 0) & (label < V)
    label = tl.where(in_range, label, 0)
    hidden_ptr += row * stride_hidden
    weight_ptr += label * stride_weight
    dot = tl.zeros([BLOCK], ACC)
    for start in range(0, d, BLOCK):
        k = (start + tl.arange(0, BLOCK)).to(tl.int64)  # a transposed weight's columns lie V elements apart
        h = tl.load(hidden_ptr + k * stride_hidden_col, mask=k < d, other=0.0).to(ACC)
        dot += h * tl.load(weight_ptr + k * stride_weight_col, mask=k < d, other=0.0).to(ACC)
    z = tl.sum(dot, axis=0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + label * stride_bias).to(ACC)
    tl.store(out_ptr + row, tl.where(in_range, z, float("nan")))


def row_logprob(
    logits: torch.Tensor, labels: torch.Tensor, *, transform, ignore_index: int, statistics=(),
    target_logits: torch.Tensor | None = None, write_u: bool = False,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """`logps`, `lse` and the requested statistics, each `[N]` in fp32 (fp64 for fp64 logits), in one launch.

    `logits` are `[N, V]` or `[B, T, V]` with any strides, `labels` `[N]`. `transform` is (temperature, logit_scale,
    softcap or None). `target_logits` `[N]`, if given, are the labels' head outputs in fp32. With `write_u` the logits
    are overwritten by U; their columns must then lie side by side.
    """
    n, vocab = labels.numel(), logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    out = {name: logits.new_empty(n, dtype=dtype) for name in ("logps", "lse")}
    for name in statistics:
        out[name] = logits.new_empty(n, dtype=torch.bool if name == "is_top1" else dtype)
    if n == 0:
        return out
    if write_u:
        check_writable("logits", logits)
    logits = readable(logits)
    temperature, logit_scale, softcap = transform
    tile = row_tile("row_logprob_u" if write_u else "row_logprob", logits)
    with on_device_of(logits):
        _row_logprob_kernel[(n,)](
            logits, *dense(labels, target_logits),
            out["logps"], out["lse"], out.get("entropy"), out.get("log_sum_sq"),
            out.get("mean_logit"), out.get("is_top1"),
            *row_strides(logits), vocab, ignore_index,
            LOGIT_SCALE=logit_scale, SOFTCAP=softcap or 0.0, TEMPERATURE=temperature,
            HAS_TARGET=target_logits is not None, WRITE_U=write_u,
            ENTROPY="entropy" in statistics, SUM_SQ="log_sum_sq" in statistics,
            MEAN="mean_logit" in statistics, TOP1="is_top1" in statistics, REREAD=write_u and stays_in_cache(logits),
            ACC=accumulator(logits.dtype), BLOCK=tile.block, LANES=tile.lanes, VECTOR=tile.vector,
            num_warps=tile.num_warps,
        )  # fmt: skip
    return out


def row_gradient(
    logits: torch.Tensor, labels: torch.Tensor, logps: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, *,
    transform, ignore_index: int, first_column: int = 0, grad_logps: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None, grad_entropy: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write grad_logps * U + grad_entropy * dH/dz to `out` `[N, V]`, row by row. Without `grad_logps` its factor is 1.

    `out` may be the logits themselves. `first_column` is the vocabulary index of column 0 when `logits` is a slice of
    the vocabulary.
    """
    n, vocab = labels.numel(), logits.shape[-1]
    if n == 0 or vocab == 0:
        return
    check_writable("out", out)
    logits = readable(logits)
    temperature, logit_scale, softcap = transform
    tile = row_tile("row_gradient", logits)
    with on_device_of(logits):
        _row_gradient_kernel[(n, triton.cdiv(vocab, tile.block))](
            logits, *dense(labels, logps, lse, entropy, grad_logps, grad_entropy), out,
            *row_strides(logits), out.stride(0), vocab, first_column, ignore_index,
            LOGIT_SCALE=logit_scale, SOFTCAP=softcap or 0.0, TEMPERATURE=temperature,
            HAS_GRAD=grad_logps is not None, HAS_ENTROPY=grad_entropy is not None,
            ACC=accumulator(logits.dtype), BLOCK=tile.block, num_warps=tile.num_warps,
        )  # fmt: skip


def target_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """`hidden_i . weight[label_i] + bias[label_i]` in fp32 `[n]`: the labels' logits. It reads 4 n d bytes in bf16."""
    n, d = hidden.shape
    out = hidden.new_empty(n, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if n == 0:
        return out
    with on_device_of(hidden):
        _target_logit_kernel[(n,)](
            hidden, weight, bias, *dense(labels), out,
            d, weight.shape[0], *hidden.stride(), *weight.stride(), 1 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None, ACC=accumulator(hidden.dtype),
            BLOCK=min(1024, triton.next_power_of_2(d)), num_warps=4,
        )  # fmt: skip
    return out
