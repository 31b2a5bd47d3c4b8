"""A candidate for the `no_grad` plan: one product that also takes the log-sum-exp, so that no logits are stored.

Persistent programs load tiles of hidden states and of the head through TMA descriptors. The host makes these: a
descriptor made on the device needs an allocator, which autograd's thread does not see. Each tile of logits leaves its
maximum and its sum of exponentials, from the fp32 accumulator. A second kernel merges a row's tiles. The label's logit
is the library's own fp32 dot product, since finding it in the tiles spilled 150 registers. There are no atomics:
results are bitwise deterministic.

It moves into the library if `benchmarks.experiments` shows it faster on a GPU than cuBLAS and the row kernel. A product
by Triton is said to reach 75 to 90 % of cuBLAS's rate, and this one saves a write and a read of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import fastpref_kernels
import torch
import triton
import triton.language as tl
from fastpref_kernels._launch import on_device_of
from fastpref_kernels._math import LN2, LOG2E
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tiles(NamedTuple):
    rows: int
    vocab: int
    d: int
    num_warps: int
    num_stages: int


CANDIDATES = (Tiles(128, 256, 64, 8, 3), Tiles(128, 256, 64, 8, 4), Tiles(128, 128, 64, 8, 4), Tiles(64, 256, 64, 4, 4))


@triton.jit
def tile_lse_kernel(
    hidden, weight, max_ptr, sum_ptr, N, V, d, row_tiles, vocab_tiles, programs,
    ROWS: tl.constexpr, VOCAB: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    for tile in tl.range(tl.program_id(0), row_tiles * vocab_tiles, programs, flatten=True):
        # rows run fastest: programs that run together share the tile of the head, the larger operand
        row, col = (tile % row_tiles) * ROWS, (tile // row_tiles) * VOCAB
        logits = tl.zeros([ROWS, VOCAB], tl.float32)
        for k in tl.range(0, d, D):
            h, w = hidden.load([row, k]), weight.load([col, k])
            logits = tl.dot(h, w.T, logits, input_precision="ieee")
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, VOCAB)
        z = tl.where(cols[None, :] < V, logits * LOG2E, float("-inf"))
        m = tl.max(z, 1)
        m = tl.where(m == float("-inf"), 0.0, m)
        at = rows.to(tl.int64) * vocab_tiles + tile // row_tiles
        tl.store(max_ptr + at, m, mask=rows < N)
        tl.store(sum_ptr + at, tl.sum(tl.exp2(z - m[:, None]), 1), mask=rows < N)


@triton.jit
def merge_kernel(max_ptr, sum_ptr, target_ptr, logps_ptr, vocab_tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < vocab_tiles
    m = tl.load(max_ptr + row * vocab_tiles + at, mask=inside, other=float("-inf"))
    s = tl.load(sum_ptr + row * vocab_tiles + at, mask=inside, other=0.0)
    m = tl.where(s > 0.0, m, float("-inf"))  # a tile of -inf logits
    top = tl.max(m, 0)
    total = tl.sum(tl.where(s > 0.0, s * tl.exp2(m - top), 0.0), 0)
    tl.store(logps_ptr + row, tl.load(target_ptr + row) - (top + tl.log2(total)) * LN2)


def linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, tiles: Tiles = CANDIDATES[0]) -> Tensor:
    """Log-probs `[N]` in fp32 of `labels` `[N]` under the logits `hidden [N, d] @ weight [V, d].T`. Every label counts.

    Rows of both operands must begin on 16-byte boundaries: a TMA descriptor needs that.
    """
    (n, d), vocab = hidden.shape, weight.shape[0]
    out = torch.empty(n, dtype=torch.float32, device=hidden.device)
    row_tiles, vocab_tiles = triton.cdiv(n, tiles.rows), triton.cdiv(vocab, tiles.vocab)
    maxima, sums = (out.new_empty(n, vocab_tiles) for _ in range(2))
    target = fastpref_kernels.target_logits(hidden, weight, None, labels)
    programs = 4
    if hidden.is_cuda:
        programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    programs = min(programs, row_tiles * vocab_tiles)
    operands = (
        TensorDescriptor.from_tensor(hidden, [tiles.rows, tiles.d]),
        TensorDescriptor.from_tensor(weight, [tiles.vocab, tiles.d]),
    )
    with on_device_of(hidden):
        tile_lse_kernel[(programs,)](
            *operands, maxima, sums, n, vocab, d, row_tiles, vocab_tiles, programs,
            ROWS=tiles.rows, VOCAB=tiles.vocab, D=tiles.d, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        block = triton.next_power_of_2(vocab_tiles)
        merge_kernel[(n,)](maxima, sums, target, out, vocab_tiles, BLOCK=block, num_warps=4)
    return out
