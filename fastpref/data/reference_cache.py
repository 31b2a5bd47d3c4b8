"""A cache on disk for numbers about each example of a data set, such as a reference's log-probs.

A folder is named by a fingerprint and holds shards of consecutive examples. A shard is a safetensors file with a
checksum of its own. It is written under another name and renamed when complete, so it is whole or known not to be. Only
what is missing or damaged is computed again.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARD = 512  # examples
VERSION = "2"  # of what is computed: raise it when the same fingerprint would mean other numbers


class Fingerprint:
    """A running 128-bit hash."""

    def __init__(self) -> None:
        import xxhash

        self._hash = xxhash.xxh3_128(VERSION.encode())

    def text(self, *values: Any) -> Fingerprint:
        """Adds values by their text."""
        self._hash.update(("\0".join(str(v) for v in values) + "\1").encode())
        return self

    def weights(self, named: Iterable[tuple[str, Tensor]]) -> Fingerprint:
        """Adds named tensors."""
        for name, value in named:
            self.text(name, tuple(value.shape), value.dtype)
            self._hash.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return self

    def config(self, config: Any) -> Fingerprint:
        """Adds the config of a transformers model, whatever folder it was loaded from."""
        found = config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            found.pop(name, None)
        return self.text(json.dumps(found, sort_keys=True, default=str))

    def rows(self, examples: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> Fingerprint:
        """Adds lists of token ids with their lengths, so that `[1], [2]` differs from `[1, 2], []`."""
        columns = list(columns)
        for example in examples:
            for name in columns:
                ids = np.asarray(example[name], dtype=np.int64)
                self._hash.update(len(ids).to_bytes(8, "little"))
                self._hash.update(ids.tobytes())
        return self

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class ReferenceCache:
    """Values `[examples, columns]` in shards under `folder/fingerprint`."""

    option = "reference_cache"  # what the trainer calls its folder

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str, examples: int, columns: int) -> None:
        self.folder = Path(folder) / fingerprint
        self._fingerprint, self._columns = fingerprint, columns
        self._shards = [range(i, min(i + SHARD, examples)) for i in range(0, examples, SHARD)]

    def missing(self) -> Iterator[tuple[int, range]]:
        """(shard, its examples) of those that are missing or damaged. Damaged ones are removed, with a warning."""
        for shard, examples in enumerate(self._shards):
            if self._read(shard) is None:
                yield shard, examples

    def _shape(self, shard: int) -> tuple[int, int]:
        return len(self._shards[shard]), self._columns

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def _read(self, shard: int) -> Tensor | None:
        from safetensors import SafetensorError, safe_open

        path = self._path(shard)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                values, metadata = file.get_tensor("values"), file.metadata() or {}
            if metadata == self._metadata(values) and tuple(values.shape) == self._shape(shard):
                return values
            reason = "its checksum, fingerprint or shape is another"
        except (SafetensorError, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
        warnings.warn(f"{path}: damaged ({reason}); it will be computed again", stacklevel=4)
        path.unlink(missing_ok=True)
        return None

    def _metadata(self, values: Tensor) -> dict[str, str]:
        checksum = Fingerprint().weights([("values", values)]).hexdigest()
        return {"fingerprint": self._fingerprint, "checksum": checksum}

    def write(self, shard: int, values: Tensor) -> None:
        """Writes the values of one shard."""
        from safetensors.torch import save_file

        values = values.detach().cpu().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{shard:06d}.{os.getpid()}.part"
        try:
            save_file({"values": values}, temporary, metadata=self._metadata(values))
            os.replace(temporary, self._path(shard))
        finally:
            temporary.unlink(missing_ok=True)

    def load(self) -> Tensor:
        """All values `[examples, columns]`.

        Raises:
            FileNotFoundError: shards are missing.
        """
        found = [self._read(shard) for shard in range(len(self._shards))]
        self._refuse_missing(sum(values is None for values in found))
        return torch.cat([v for v in found if v is not None]) if found else torch.empty(0, self._columns)

    def _refuse_missing(self, number: int) -> None:
        if number:
            raise FileNotFoundError(
                f"{self.folder}: {number} of {len(self._shards)} shards are missing; if ranks run on several machines, "
                f"{self.option} must be a folder that all of them see"
            )
