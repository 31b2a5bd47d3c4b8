"""The segments of a packed row: which rows each of its tokens sees, and the keys of those rows.

See `fastpref.models.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.common.gather import add_by_row, copies_by_row

QUERIES = 256  # of one masked call on a CPU
BLOCK = 128  # queries and keys of a block of FlexAttention's masks


class Segment(NamedTuple):
    """The query rows start..end-1 of a packed row, and the ranges of earlier rows that all of them see, in order."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """All rows that its last query sees."""
        return (*self.ancestors, (self.start, self.end))

    def queries(self) -> int:
        """How many rows it has."""
        return self.end - self.start

    def keys(self) -> int:
        """How many rows its last query sees."""
        return sum(b - a for a, b in self.ranges)


@dataclass
class Segments:
    """The segments of one packed row, which cover it without gaps. Built on the CPU, and moved with its batch."""

    table: tuple[Segment, ...]
    cu_queries: Tensor  # [G + 1] int32
    cu_keys: Tensor  # [G + 1] int32, offsets into key_rows
    key_rows: Tensor  # [M] the packed rows whose keys the segments see, one segment after the other
    max_queries: int
    max_keys: int
    _kept: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, table: Sequence[Segment]) -> Segments:
        """From the segments in the order of their rows."""
        queries, keys = ([f(s) for s in table] for f in (Segment.queries, Segment.keys))
        rows = [torch.arange(a, b) for s in table for a, b in s.ranges]
        cu_queries, cu_keys = (torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys))
        return cls(tuple(table), cu_queries, cu_keys, torch.cat(rows), max(queries), max(keys))

    @property
    def shared(self) -> bool:
        """Does any segment have ancestors?"""
        return any(s.ancestors for s in self.table)

    def to(self, device: torch.device | str, **kwargs: Any) -> Segments:
        """A copy whose tensors are on `device`; `kwargs` as in `Tensor.to`."""
        return self._with(lambda x: x.to(device, **kwargs))

    def pin_memory(self) -> Segments:
        """A copy whose tensors are in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Segments:
        queries, keys, rows = (change(x) for x in (self.cu_queries, self.cu_keys, self.key_rows))
        return Segments(self.table, queries, keys, rows, self.max_queries, self.max_keys)

    def by_row(self) -> tuple[Tensor, Tensor]:
        """The gathered keys of each packed row (see `copies_by_row`). Kept for other layers."""
        if ("by row",) not in self._kept:
            self._kept["by row",] = copies_by_row(self.key_rows, self.table[-1].end)
        return self._kept["by row",]

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """The additive mask of the last `queries` of `keys` rows, of the dtype and device of `like`.

        None where a plain causal mask (`is_causal`) says the same. All are views of one, which depends on the distance
        alone and is kept for the other layers.
        """
        if queries == keys and (window is None or window >= keys):
            return None
        key = (window, like.dtype)
        if key not in self._kept:
            rows, before = min(QUERIES, self.max_queries), self.max_keys
            distance = torch.arange(rows, device=like.device)[:, None] - torch.arange(-before, rows, device=like.device)
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            self._kept[key] = torch.zeros_like(distance, dtype=like.dtype).masked_fill(hidden, float("-inf"))
        start = self.max_keys - (keys - queries)
        return self._kept[key][:queries, start : start + keys]

    def scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        """A number as a tensor beside the segments. Kept for other layers."""
        if (value, dtype) not in self._kept:
            self._kept[value, dtype] = torch.full((), value, dtype=dtype, device=self.key_rows.device)
        return self._kept[value, dtype]

    @torch.compiler.disable
    def block_mask(self, window: int | None) -> Any:
        """FlexAttention's mask over the gathered keys, of which each query sees one range. Kept for other layers.

        It is that of `create_block_mask`, which would look at every query and key: here at each block of keys.
        """
        from torch.nn.attention.flex_attention import BlockMask

        if ("flex", window) not in self._kept:
            queries, keys = self.table[-1].end, len(self.key_rows)
            at = torch.arange(queries, device=self.key_rows.device, dtype=self.cu_keys.dtype)
            segment = torch.bucketize(at, self.cu_queries[1:], right=True)
            last = self.cu_keys[segment + 1] - self.cu_queries[segment + 1] + at
            first = self.cu_keys[segment] if window is None else torch.maximum(self.cu_keys[segment], last - window + 1)

            def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return (key >= first[query]) & (key <= last[query])

            begin = torch.arange(0, keys, BLOCK, device=at.device, dtype=at.dtype)
            some = _by_block((first[:, None] < begin + BLOCK) & (last[:, None] >= begin)).any(1)
            whole = _by_block((first[:, None] <= begin) & (last[:, None] >= begin + BLOCK - 1)).all(1)
            self._kept["flex", window] = BlockMask.from_kv_blocks(
                *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(queries, keys)
            )
        return self._kept["flex", window]


def _by_block(dense: Tensor) -> Tensor:
    """`[Q, K]` as `[Q / BLOCK, BLOCK, K]`. Queries beyond the last see nothing."""
    return F.pad(dense, (0, 0, 0, -len(dense) % BLOCK)).unflatten(0, (-1, BLOCK))


def _listed(dense: Tensor) -> tuple[Tensor, Tensor]:
    """(number, indices) of the blocks of keys of each block of queries, as FlexAttention takes them."""
    indices = dense.int().argsort(dim=1, descending=True, stable=True)
    return dense.sum(1, dtype=torch.int32)[None, None], indices.int()[None, None]


@torch.compiler.disable
def gathered(x: Tensor, segments: Segments, dim: int) -> Tensor:
    """Keys or values of N rows along `dim`, as the M that the segments see, one segment after the other.

    The gradient of a row that many segments see is added up in at least fp32, in one order.
    """
    if not segments.shared:
        return x
    return _Gather.apply(x, segments, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments, dim: int) -> Tensor:
        ctx.segments, ctx.dim = segments, dim
        return x.index_select(dim, segments.key_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        segments, dim = ctx.segments, ctx.dim
        if grad.device.type == "cpu":
            return _add_ranges(grad, segments, dim), None, None
        return add_by_row(grad.movedim(dim, 0), *segments.by_row()).movedim(0, dim), None, None


def _add_ranges(grad: Tensor, segments: Segments, dim: int) -> Tensor:
    """One addition for each range: adding by rows would be a loop over them on a CPU."""
    shape = list(grad.shape)
    shape[dim] = segments.table[-1].end
    total = torch.zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
    ranges = [r for segment in segments.table for r in segment.ranges]
    for (start, end), part in zip(ranges, grad.split([b - a for a, b in ranges], dim), strict=True):
        total.narrow(dim, start, end - start).add_(part)
    return total.to(grad.dtype)
