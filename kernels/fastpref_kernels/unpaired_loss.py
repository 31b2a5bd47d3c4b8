"""KTO, APO-zero, BCO: token log-probs of S sequences -> loss, metrics and coefficients, in one launch.

Each sequence is desirable or not. As in `paired_loss`, one program does it all in a fixed order.

Formulas and their sources: `fastpref/reference/unpaired.py`. The branches here add the derivatives.
"""

import torch
import triton
import triton.language as tl

from ._launch import accumulator, dense, on_device_of
from ._math import log_sigmoid, sigmoid
from ._sequences import spread_coefs, sum_sequences

LOSSES = ("kto", "apo_zero_unpaired", "bco")  # the order is the code that the kernel branches on


@triton.jit
def _count_desirable(desirable_ptr, total, ACC: tl.constexpr, BLOCK: tl.constexpr):
    count = tl.full((), 0.0, ACC)
    for first in range(0, total, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(desirable_ptr + seqs, mask=seqs < total, other=0).to(ACC), axis=0)
    return count


@triton.jit
def _sequence_loss(log_ratio, desirable, shift, KIND: tl.constexpr, BETA: tl.constexpr):
    """Loss of each sequence and its derivative with respect to the log-ratio.

    All are functions of y, which is x for a desirable sequence and -x for an undesirable one.
    """
    if KIND == 0:  # kto
        x = BETA * (log_ratio - shift)
    elif KIND == 1:  # apo_zero_unpaired
        x = BETA * log_ratio
    else:  # bco
        x = BETA * log_ratio - shift
    y = tl.where(desirable, x, -x)
    if KIND == 2:
        loss = -log_sigmoid(y)
        dy = -sigmoid(-y)
    else:
        loss = sigmoid(-y)  # 1 - sigmoid(y)
        dy = -sigmoid(y) * sigmoid(-y)
    return loss, BETA * tl.where(desirable, dy, -dy)


@triton.jit(do_not_specialize=["S", "seq_len", "first_sequence", "total_sequences", "ignore_index"])
def _unpaired_loss_kernel(
    # data
    logps_ptr, labels_ptr, cu_seqlens_ptr, ref_ptr, desirable_ptr, shift_ptr,
    loss_ptr, metrics_ptr, coefs_ptr, sums_ptr, counts_ptr, seq_coefs_ptr,
    # sizes
    S, seq_len, first_sequence, total_sequences, ignore_index,
    # objective
    KIND: tl.constexpr, BETA: tl.constexpr, DESIRABLE_WEIGHT: tl.constexpr, UNDESIRABLE_WEIGHT: tl.constexpr,
    CLASS_MEANS: tl.constexpr,
    # constants
    HAS_LABELS: tl.constexpr, PACKED: tl.constexpr, HAS_SHIFT: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    sum_sequences(
        logps_ptr, labels_ptr, cu_seqlens_ptr, sums_ptr, counts_ptr, S, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T,
    )  # fmt: skip
    tl.debug_barrier()  # what one thread stored, the others load
    desirable_count = tl.full((), 0.0, ACC) + total_sequences
    undesirable_count = desirable_count
    if CLASS_MEANS:
        desirable_count = _count_desirable(desirable_ptr, total_sequences, ACC, BLOCK)
        undesirable_count = tl.maximum(total_sequences - desirable_count, 1.0)
        desirable_count = tl.maximum(desirable_count, 1.0)
    desirable_scale = DESIRABLE_WEIGHT / desirable_count
    undesirable_scale = UNDESIRABLE_WEIGHT / undesirable_count
    shift = tl.full((), 0.0, ACC)
    if HAS_SHIFT:
        shift = tl.load(shift_ptr).to(ACC)

    batch_loss = tl.full((), 0.0, ACC)
    for first in range(0, S, BLOCK):
        seqs = first + tl.arange(0, BLOCK)
        real = seqs < S
        logps = tl.load(sums_ptr + seqs, mask=real, other=0.0)
        log_ratio = logps - tl.load(ref_ptr + seqs, mask=real, other=0.0).to(ACC)
        desirable = tl.load(desirable_ptr + first_sequence + seqs, mask=real, other=0) != 0
        loss, coef = _sequence_loss(log_ratio, desirable, shift, KIND, BETA)
        scale = tl.where(desirable, desirable_scale, undesirable_scale)
        batch_loss += tl.sum(tl.where(real, loss * scale, 0.0), axis=0)
        tl.store(seq_coefs_ptr + seqs, coef * scale, mask=real)
        tl.store(metrics_ptr + seqs, logps, mask=real)
        tl.store(metrics_ptr + S + seqs, BETA * log_ratio, mask=real)
    tl.store(loss_ptr, batch_loss)
    tl.debug_barrier()

    spread_coefs(
        coefs_ptr, seq_coefs_ptr, labels_ptr, cu_seqlens_ptr, S, seq_len, ignore_index,
        HAS_LABELS, PACKED, ACC, BLOCK, BLOCK_T,
    )  # fmt: skip


def unpaired_loss(
    token_logps: torch.Tensor, labels: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
    ref_logps: torch.Tensor, desirable: torch.Tensor, shift: torch.Tensor | None, objective, *,
    first_sequence: int, num_sequences: int, ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(loss, metrics `[2, S]`, d loss / d token_logps `[N]`) of a group of `num_sequences` sequences, in one launch.

    Sequences are `cu_seqlens[s]:cu_seqlens[s + 1]`, or N / S rows each. `desirable` is the whole batch's, since means
    are over the batch. In it the group begins at `first_sequence`. `objective` has the fields of
    `fastpref.reference.UnpairedObjective`. `shift` (0-d) is KTO's z0 or BCO's delta. Metrics are log-probs and rewards.
    """
    o, n, dtype = objective, token_logps.numel(), token_logps.dtype
    inputs = dense(token_logps, labels, cu_seqlens, ref_logps, desirable, shift)
    loss, metrics, coefs = (token_logps.new_empty(shape) for shape in ((), (2, num_sequences), (n,)))
    per_sequence = token_logps.new_empty(3, num_sequences)
    with on_device_of(token_logps):
        _unpaired_loss_kernel[(1,)](
            *inputs, loss, metrics, coefs, *per_sequence,
            num_sequences, 0 if cu_seqlens is not None else n // num_sequences, first_sequence, desirable.numel(),
            ignore_index,
            KIND=LOSSES.index(o.loss), BETA=o.beta, DESIRABLE_WEIGHT=o.desirable_weight,
            UNDESIRABLE_WEIGHT=o.undesirable_weight, CLASS_MEANS=o.mean == "class", HAS_LABELS=labels is not None,
            PACKED=cu_seqlens is not None, HAS_SHIFT=shift is not None,
            ACC=accumulator(dtype), BLOCK=16, BLOCK_T=128, num_warps=8,
        )  # fmt: skip
    return loss, metrics, coefs
