"""A cache on disk for a teacher's hidden states of the rows that score a token: the reference cache's, of many rows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastpref.data.reference_cache import ReferenceCache

SHARD_BYTES = 128 << 20  # what is computed again at most when a job is stopped, and kept in memory until it is written


class HiddenCache(ReferenceCache):
    """Hidden states `[sizes[i], width]` of each example, in shards under `folder/fingerprint`.

    Shards hold consecutive examples of about `SHARD_BYTES`. A run checks every shard once, by its checksum, and then
    reads single examples out of them. Nothing of the cache is kept in memory.

    Args:
        folder, fingerprint: as in `ReferenceCache`. The fingerprint names model, token ids and dtype.
        sizes: rows of each example.
        width: the teacher's hidden size.
        dtype: what the values are stored in.
    """

    option = "teacher_cache"

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: str, sizes: Sequence[int], width: int, dtype: torch.dtype
    ) -> None:
        super().__init__(folder, fingerprint, 0, width)
        self.dtype = dtype
        self._row_bytes = width * dtype.itemsize
        self._places: list[tuple[int, int, int]] = []  # shard, first row, end
        begin, rows = 0, 0
        for i, size in enumerate(sizes):
            if rows and (rows + size) * self._row_bytes > SHARD_BYTES:
                self._shards.append(range(begin, i))
                begin, rows = i, 0
            self._places.append((len(self._shards), rows, rows + size))
            rows += size
        if sizes:
            self._shards.append(range(begin, len(sizes)))

    @property
    def nbytes(self) -> int:
        """Bytes of all hidden states together."""
        return sum(self._shape(shard)[0] for shard in range(len(self._shards))) * self._row_bytes

    def _shape(self, shard: int) -> tuple[int, int]:
        return self._places[self._shards[shard][-1]][2], self._columns

    def check_space(self) -> None:
        """Checks that what is not there yet fits on the disk.

        Raises:
            OSError: it does not.
        """
        there = [self._path(shard).exists() for shard in range(len(self._shards))]
        needed = sum(self._shape(i)[0] for i, known in enumerate(there) if not known) * self._row_bytes
        parent = next(p for p in (self.folder, *self.folder.parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(
                f"teacher_cache: got {Path(self.folder).parent} with {free / 2**30:.1f} GiB free, want "
                f"{needed / 2**30:.1f} GiB for the teacher's hidden states, or another folder, or cache_teacher=False"
            )

    def check_complete(self) -> None:
        """Checks that all shards are there. Which of them are whole `missing` has seen.

        Raises:
            FileNotFoundError: some are not.
        """
        self._refuse_missing(sum(not self._path(shard).exists() for shard in range(len(self._shards))))

    def rows(self, example: int) -> Tensor:
        """The hidden states `[n, width]` of one example."""
        from safetensors import safe_open

        shard, begin, end = self._places[example]
        with safe_open(self._path(shard), framework="pt") as file:
            return file.get_slice("values")[begin:end]
