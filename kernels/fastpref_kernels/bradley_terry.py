"""The reward of one row of each sequence, and the Bradley-Terry loss of the pairs.

The forward takes two launches. The first has a program for each sequence, for the d-sized products: B = 512, d = 16384
in bf16 is 32 MiB, too much for one program. The second has one program for everything of size B.

The backward takes one launch, with a program for each block of columns. It writes the scored rows of dH, which starts
as zeros, and adds up dW in a fixed order.

Formulas and their sources: `fastpref/reference/reward.py`. The branches here add the derivatives.
"""

import torch
import triton
import triton.language as tl

from ._launch import accumulator, dense, on_device_of, row_block
from ._math import log_sigmoid, sigmoid


@triton.jit
def _row_of(index_ptr, seqs, real, limit, EDGES: tl.constexpr):
    """The row that scores each sequence, and whether there is such a row."""
    if EDGES:
        begin = tl.load(index_ptr + seqs, mask=real, other=0).to(tl.int64)
        row = tl.load(index_ptr + seqs + 1, mask=real, other=0).to(tl.int64) - 1
        return row, real & (row >= begin) & (row < limit)
    else:
        row = tl.load(index_ptr + seqs, mask=real, other=0).to(tl.int64)
        return row, real & (row >= 0) & (row < limit)


@triton.jit(do_not_specialize=["limit"])
def _row_scores_kernel(
    # data
    hidden_ptr, weight_ptr, bias_ptr, index_ptr, scores_ptr,
    # sizes and strides
    d, limit, stride_seq, stride_row, stride_col,
    # constants
    EDGES: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    row, found = _row_of(index_ptr, seq, seq >= 0, limit, EDGES)
    hidden_ptr += seq * stride_seq + row * stride_row
    dot = tl.zeros([BLOCK], ACC)
    for start in range(0, d, BLOCK):
        k = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + k.to(tl.int64) * stride_col, mask=(k < d) & found, other=0.0).to(ACC)
        dot += h * tl.load(weight_ptr + k, mask=k < d, other=0.0).to(ACC)
    score = tl.sum(dot, axis=0)
    if HAS_BIAS:
        score += tl.load(bias_ptr).to(ACC)
    tl.store(scores_ptr + seq, tl.where(found, score, float("nan")))


@triton.jit(do_not_specialize=["S", "limit"])
def _row_scores_gradient_kernel(
    # data
    grad_ptr, row_grad_ptr, scale_ptr, hidden_ptr, weight_ptr, index_ptr, d_hidden_ptr, d_weight_ptr, d_bias_ptr,
    # sizes and strides
    S, d, limit, stride_seq, stride_row, stride_col, stride_d_seq, stride_d_row,
    # constants
    EDGES: tl.constexpr, HAS_SCALE: tl.constexpr, NEED_HIDDEN: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * BLOCK_D
    k = first_column + tl.arange(0, BLOCK_D)
    inside = k < d
    w = tl.load(weight_ptr + k, mask=inside, other=0.0).to(ACC)
    scale = tl.full((), 1.0, ACC)
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(ACC)
    d_weight = tl.zeros([BLOCK_S, BLOCK_D], ACC)
    d_bias = tl.zeros([BLOCK_S], ACC)
    for first in range(0, S, BLOCK_S):
        seqs = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        real = seqs < S
        row, found = _row_of(index_ptr, seqs, real, limit, EDGES)
        tile = found[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + seqs, mask=real, other=0.0).to(ACC) * scale
        d_bias += grad
        if NEED_WEIGHT:
            at = (seqs * stride_seq + row * stride_row)[:, None] + k.to(tl.int64)[None, :] * stride_col
            d_weight += grad[:, None] * tl.load(hidden_ptr + at, mask=tile, other=0.0).to(ACC)
        if NEED_HIDDEN:
            row_grad = tl.load(row_grad_ptr + seqs, mask=real, other=0.0).to(ACC) * scale
            at = (seqs * stride_d_seq + row * stride_d_row)[:, None] + k[None, :]
            tl.store(d_hidden_ptr + at, row_grad[:, None] * w[None, :], mask=tile)
    if NEED_WEIGHT:
        tl.store(d_weight_ptr + k, tl.sum(d_weight, axis=0), mask=inside)
    if NEED_BIAS:
        tl.store(d_bias_ptr, tl.sum(d_bias, axis=0), mask=first_column == 0)


@triton.jit(do_not_specialize=["B"])
def _bradley_terry_kernel(
    # data
    rewards_ptr, margin_ptr, loss_ptr, metrics_ptr, coefs_ptr,
    # sizes
    B,
    # constants
    CENTER: tl.constexpr, HAS_MARGIN: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch_loss = tl.full((), 0.0, ACC)
    for first in range(0, B, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        real = pairs < B
        chosen = tl.load(rewards_ptr + pairs, mask=real, other=0.0).to(ACC)
        rejected = tl.load(rewards_ptr + B + pairs, mask=real, other=0.0).to(ACC)
        x = chosen - rejected
        tl.store(metrics_ptr + pairs, chosen, mask=real)
        tl.store(metrics_ptr + B + pairs, rejected, mask=real)
        tl.store(metrics_ptr + 2 * B + pairs, x, mask=real)
        tl.store(metrics_ptr + 3 * B + pairs, (x > 0).to(ACC), mask=real)
        if HAS_MARGIN:
            x -= tl.load(margin_ptr + pairs, mask=real, other=0.0).to(ACC)
        loss = -log_sigmoid(x)
        d_chosen = -sigmoid(-x)
        d_rejected = sigmoid(-x)
        if CENTER != 0.0:
            total = chosen + rejected
            loss += CENTER * total * total
            d_chosen += 2.0 * CENTER * total
            d_rejected += 2.0 * CENTER * total
        tl.store(coefs_ptr + pairs, d_chosen / B, mask=real)
        tl.store(coefs_ptr + B + pairs, d_rejected / B, mask=real)
        batch_loss += tl.sum(tl.where(real, loss, 0.0), axis=0)
    tl.store(loss_ptr, batch_loss / B)


def _accumulate_in(*tensors: torch.Tensor | None) -> torch.dtype:
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _addresses(hidden: torch.Tensor, layout: str) -> tuple[int, int, int]:
    """(rows that an index may name, stride of a sequence, stride of a row)."""
    if layout == "positions":
        return hidden.shape[1], hidden.stride(0), hidden.stride(1)
    return hidden.shape[0], 0, hidden.stride(0)


def row_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor, *, layout: str
) -> torch.Tensor:
    """`hidden[row_s] . weight + bias` of one row of each sequence, `[S]` in fp32 (fp64 if an input is), in one launch.

    `layout` says how `index` names the rows:

    - `"positions"`: `index` `[S]` are positions within each sequence of hidden `[S, T, d]`.
    - `"rows"`: `index` `[S]` are rows of hidden `[N, d]`, which may repeat.
    - `"edges"`: `index` `[S + 1]` are the `cu_seqlens` of hidden `[N, d]`. The last row of each sequence counts.

    A row that does not exist scores NaN. Hidden may have any strides.
    """
    sequences, d = index.shape[0] - int(layout == "edges"), hidden.shape[-1]
    dtype = _accumulate_in(hidden, weight, bias)
    scores = torch.empty(sequences, dtype=dtype, device=hidden.device)
    if sequences == 0:
        return scores
    limit, stride_seq, stride_row = _addresses(hidden, layout)
    block, warps = row_block(d, "row_scores", hidden.device)
    with on_device_of(hidden):
        _row_scores_kernel[(sequences,)](
            hidden, *dense(weight, bias, index), scores,
            d, limit, stride_seq, stride_row, hidden.stride(-1),
            EDGES=layout == "edges", HAS_BIAS=bias is not None, ACC=accumulator(dtype), BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return scores


def row_scores_gradient(
    grad: torch.Tensor, scale: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor | None, index: torch.Tensor, *, layout: str,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(dH, dW, db) of `row_scores` for the upstream gradient `grad` `[S]` times `scale` (0-d), in one launch."""
    d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
    if grad.shape[0] == 0:
        return d_hidden, d_weight, d_bias
    (grad,), d = dense(grad), hidden.shape[-1]
    limit, stride_seq, stride_row = _addresses(hidden, layout)
    row_grad, stride_d_seq, stride_d_row = grad, 0, d
    if layout == "positions":
        stride_d_seq = limit * d
    elif layout == "rows" and need_hidden:
        row_grad = gradient_of_rows(grad, index, limit)
    with on_device_of(hidden):
        _row_scores_gradient_kernel[(triton.cdiv(d, 64),)](
            grad, row_grad, scale, hidden, *dense(weight, index), d_hidden, d_weight, d_bias,
            grad.shape[0], d, limit, stride_seq, stride_row, hidden.stride(-1), stride_d_seq, stride_d_row,
            EDGES=layout == "edges", HAS_SCALE=scale is not None, NEED_HIDDEN=need_hidden, NEED_WEIGHT=need_weight,
            NEED_BIAS=d_bias is not None, ACC=accumulator(_accumulate_in(hidden, weight, bias)),
            BLOCK_S=16, BLOCK_D=64, num_warps=4,
        )  # fmt: skip
    return d_hidden, d_weight, d_bias


def gradient_of_rows(grad: torch.Tensor, rows: torch.Tensor, limit: int) -> torch.Tensor:
    """The gradient of each entry's row: the sum over all entries that name the row.

    So whichever of them writes the row writes the same. torch adds them up sorted, not by atomics: deterministic.
    """
    found = (rows >= 0) & (rows < limit)
    rows = rows.where(found, 0).long()
    totals = grad.new_zeros(max(1, limit)).index_put_((rows,), grad.masked_fill(~found, 0), accumulate=True)
    return totals[rows]


def bradley_terry(
    rewards: torch.Tensor, margin: torch.Tensor | None, *, center_coefficient: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, metrics `[4, B]`, d loss / d rewards `[2B]`) of `[B chosen; B rejected]` rewards, in one launch.

    Metrics are chosen rewards, rejected rewards, margins and accuracies.
    """
    pairs = rewards.shape[0] // 2
    loss, metrics, coefs = rewards.new_empty(()), rewards.new_empty(4, pairs), torch.empty_like(rewards)
    with on_device_of(rewards):
        _bradley_terry_kernel[(1,)](
            *dense(rewards, margin), loss, metrics, coefs, pairs,
            CENTER=center_coefficient, HAS_MARGIN=margin is not None, ACC=accumulator(rewards.dtype),
            BLOCK=512, num_warps=4,
        )  # fmt: skip
    return loss, metrics, coefs
