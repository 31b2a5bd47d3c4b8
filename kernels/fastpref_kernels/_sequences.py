"""Small @triton.jit functions over sequences of token log-probs, packed (`cu_seqlens`) or all `seq_len` long."""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(cu_seqlens_ptr, seqs, real, seq_len, PACKED: tl.constexpr):
    """First and one-past-last token of each sequence; empty where not `real`."""
    if PACKED:
        begin = tl.load(cu_seqlens_ptr + seqs, mask=real, other=0).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + seqs + 1, mask=real, other=0).to(tl.int64)
    else:
        begin = seqs.to(tl.int64) * seq_len
        end = tl.where(real, begin + seq_len, begin)
    return begin, end


@triton.jit
def sum_sequences(
    logps_ptr, labels_ptr, cu_seqlens_ptr, sums_ptr, counts_ptr, num_sequences, seq_len, ignore_index,
    HAS_LABELS: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    weights_ptr=None, HAS_WEIGHTS: tl.constexpr = False,
):  # fmt: skip
    """Each sequence's (weighted) sum and number of scored tokens, BLOCK_S sequences side by side, in fixed order."""
    for first in range(0, num_sequences, BLOCK_S):
        seqs = first + tl.arange(0, BLOCK_S)
        real = seqs < num_sequences
        begin, end = sequence_bounds(cu_seqlens_ptr, seqs, real, seq_len, PACKED)
        total = tl.zeros([BLOCK_S], ACC)
        count = tl.zeros([BLOCK_S], ACC)
        for offset in range(0, tl.max(end - begin, axis=0), BLOCK_T):
            tokens = begin[:, None] + offset + tl.arange(0, BLOCK_T)[None, :]
            scored = tokens < end[:, None]
            if HAS_LABELS:
                labels = tl.load(labels_ptr + tokens, mask=scored, other=0).to(tl.int64)
                scored = scored & (labels != ignore_index)
            logps = tl.load(logps_ptr + tokens, mask=scored, other=0.0)
            if HAS_WEIGHTS:
                logps = logps * tl.load(weights_ptr + tokens, mask=scored, other=0.0).to(ACC)
            total += tl.sum(logps, axis=1)
            count += tl.sum(scored.to(ACC), axis=1)
        tl.store(sums_ptr + seqs, total, mask=real)
        tl.store(counts_ptr + seqs, count, mask=real)


@triton.jit
def spread_coefs(
    coefs_ptr, seq_coefs_ptr, labels_ptr, cu_seqlens_ptr, num_sequences, seq_len, ignore_index,
    HAS_LABELS: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
    weights_ptr=None, HAS_WEIGHTS: tl.constexpr = False, num_chosen=0, chosen_coef=0.0,
):  # fmt: skip
    """Each token's coefficient: its sequence's, times its weight. Ignored tokens get 0.

    In the first `num_chosen` sequences `chosen_coef` is added.
    """
    for first in range(0, num_sequences, BLOCK_S):
        seqs = first + tl.arange(0, BLOCK_S)
        real = seqs < num_sequences
        begin, end = sequence_bounds(cu_seqlens_ptr, seqs, real, seq_len, PACKED)
        coef = tl.load(seq_coefs_ptr + seqs, mask=real, other=0.0)
        more = tl.where(seqs < num_chosen, chosen_coef, 0.0).to(ACC)
        for offset in range(0, tl.max(end - begin, axis=0), BLOCK_T):
            tokens = begin[:, None] + offset + tl.arange(0, BLOCK_T)[None, :]
            inside = tokens < end[:, None]
            spread = tl.broadcast_to(coef[:, None], [BLOCK_S, BLOCK_T])
            if HAS_WEIGHTS:
                spread = spread * tl.load(weights_ptr + tokens, mask=inside, other=0.0).to(ACC)
            spread += more[:, None]
            if HAS_LABELS:
                labels = tl.load(labels_ptr + tokens, mask=inside, other=0).to(tl.int64)
                spread = tl.where(labels != ignore_index, spread, 0.0)
            tl.store(coefs_ptr + tokens, spread, mask=inside)
