"""The rows that a label scores: nothing else enters a matrix product.

How many there are sizes the products, so the host has to know. A collator does; where nobody says, asking the device
is one host sync.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def compact(labels: Tensor, ignore_index: int, scored_rows: int | None = None) -> Tensor:
    """Indices of the rows that a label scores `[n]`, ascending.

    With `scored_rows` there is no host sync, and n is what it says, an upper bound: after the scored rows come some
    that are ignored. That is what a CUDA graph can replay for batches that differ.
    """
    scored = labels != ignore_index
    if scored_rows is None:
        return scored.nonzero().squeeze(1)
    if scored_rows == labels.numel():
        return torch.arange(scored_rows, device=labels.device)
    return torch.argsort(~scored, stable=True)[:scored_rows]


def compact_labels(labels: Tensor, rows: Tensor, ignore_index: int, scored_rows: int | None) -> Tensor:
    """The labels of `rows`. If more rows are scored than was said, all become labels that do not exist, whose log-probs
    are NaN: on an accelerator nothing can be raised."""
    found = gather(labels, rows)
    if scored_rows is None or scored_rows == labels.numel():
        return found
    return found.masked_fill((labels != ignore_index).sum() > scored_rows, min(ignore_index, 0) - 1)


def gather(values: Tensor, rows: Tensor) -> Tensor:
    return values if rows.numel() == values.shape[0] else values.index_select(0, rows)


def gather_part(values: Tensor, rows: Tensor, part: slice) -> Tensor:
    """`gather` of some of the rows; a view where all rows are scored."""
    return values[part] if rows.numel() == values.shape[0] else values.index_select(0, rows[part])


def scatter(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """Inverse of `gather`: zeros where no row was."""
    if rows.numel() == total:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


def put_rows(values: Tensor, rows: Tensor, part: slice, of_part: Tensor) -> None:
    """Set those rows of `values` that `part` of the scored ones are."""
    if rows.numel() == values.shape[0]:
        values[part] = of_part
    else:
        values.index_copy_(0, rows[part], of_part)


def chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def joined(parts: Sequence[Tensor], like: Tensor, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Parts side by side; one is not copied, and none is an empty tensor."""
    if not parts:
        return like.new_empty(0, dtype=dtype)
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
