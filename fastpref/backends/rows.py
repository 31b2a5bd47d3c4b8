"""What the portable functions over rows of logits share: blocks of a few rows, and the transform's derivative."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastpref import reference

# 2 MiB of fp32 for each thread. Measured on a 2-core CPU with 2 MiB of L2 each, V = 49152, 1921 rows: 45 ms in blocks
# of 4 to 16 rows, 70 ms for the whole tile at once. Of those sizes the larger ones are better: fewer parallel regions,
# each of which loses a time slice when something else runs on a core.
BLOCK_ELEMENTS_PER_THREAD = 1 << 19


def blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(place in the flattened labels, view of a few rows) for all of the logits `[N, V]` or `[B, T, V]`. No copies."""
    threads = torch.get_num_threads()
    step = threads * max(1, BLOCK_ELEMENTS_PER_THREAD // max(1, logits.shape[-1]))  # no thread waits for an odd row
    for outer, rows in enumerate(logits if logits.ndim == 3 else logits[None]):
        for start in range(0, rows.shape[0], step):
            block = rows[start : start + step]
            first = outer * rows.shape[0] + start
            yield slice(first, first + block.shape[0]), block


def transform_slope(z: Tensor, transform: reference.LogitTransform) -> Tensor | float:
    """d logit / d head output, from the logit: a number without a soft cap, else shaped like `z`."""
    slope: Tensor | float = transform.logit_scale / transform.temperature
    if transform.softcap is not None:
        slope = slope * (1 - (z * (transform.temperature / transform.softcap)) ** 2)
    return slope
