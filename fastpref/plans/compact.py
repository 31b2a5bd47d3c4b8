"""The rows that a label scores: picking them out, and putting results back. No other row enters a matrix product.

How many there are sizes the products, so the host has to know. A collator knows, and says so as `scored_rows`. If
nobody does, the device is asked, which is one host sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def compact(labels: Tensor, ignore_index: int, scored_rows: int | None = None) -> Tensor:
    """Indices of the rows that a label scores `[n]`, ascending.

    `scored_rows` is an upper bound of their number. With it there is no host sync, and n is what it says: after the
    scored rows come some that are ignored. So a CUDA graph can be replayed for batches that differ.
    """
    scored = labels != ignore_index
    if scored_rows is None:
        return scored.nonzero().squeeze(1)
    if scored_rows == labels.numel():
        return torch.arange(scored_rows, device=labels.device)
    return torch.argsort(~scored, stable=True)[:scored_rows]


def compact_labels(labels: Tensor, rows: Tensor, ignore_index: int, scored_rows: int | None) -> Tensor:
    """The labels of `rows` `[n]`.

    If more rows are scored than `scored_rows` says, all become labels that do not exist, whose log-probs are NaN. On an
    accelerator nothing can be raised without a host sync.
    """
    found = gather(labels, rows)
    if scored_rows is None or scored_rows == labels.numel():
        return found
    return found.masked_fill((labels != ignore_index).sum() > scored_rows, min(ignore_index, 0) - 1)


def gather(values: Tensor, rows: Tensor) -> Tensor:
    """The scored rows of `values`: `[N, ...]` -> `[n, ...]`. Not copied where all rows are scored."""
    return values if rows.numel() == values.shape[0] else values.index_select(0, rows)


def gather_part(values: Tensor, rows: Tensor, part: slice) -> Tensor:
    """`gather` of a `part` of the scored rows. A view where all rows are scored."""
    return values[part] if rows.numel() == values.shape[0] else values.index_select(0, rows[part])


def scatter(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """The inverse of `gather`: `[n, ...]` -> `[total, ...]`, zeros in rows that are not scored."""
    if rows.numel() == total:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


def put_rows(values: Tensor, rows: Tensor, part: slice, of_part: Tensor) -> None:
    """Write `of_part` to the rows of `values` `[N, ...]` that a `part` of the scored rows names."""
    if rows.numel() == values.shape[0]:
        values[part] = of_part
    else:
        values.index_copy_(0, rows[part], of_part)


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices that cover 0..total-1, each of `size` but for the last."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def joined(parts: Sequence[Tensor], like: Tensor, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """The parts side by side along `dim`. A single part is not copied. Without parts the result is empty."""
    if not parts:
        return like.new_empty(0, dtype=dtype)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
