"""A teacher's hidden states on disk: shards of many rows, of which only what is missing is computed."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from fastpref.data import hidden_cache
from fastpref.data.hidden_cache import HiddenCache
from fastpref.trainers.reference import fill_cache

SIZES, WIDTH = [3, 0, 2, 4, 1, 0], 8


class Examples(list):
    def select(self, rows):
        return Examples(self[i] for i in rows)

    def to_list(self):
        return list(self)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> HiddenCache:
    monkeypatch.setattr(hidden_cache, "SHARD_BYTES", 5 * WIDTH * 2)  # five rows
    return HiddenCache(tmp_path / "cache", "abc", SIZES, WIDTH, torch.bfloat16)


def hidden_of(example: int) -> torch.Tensor:
    return torch.full((SIZES[example], WIDTH), float(example), dtype=torch.bfloat16)


def fill(cache: HiddenCache, stop_after: int = 99, rank: int = 0, world: int = 1) -> list[int]:
    """The examples that are computed, until it is stopped."""
    seen: list[int] = []

    def compute(examples):
        if len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.extend(e["i"] for e in examples)
        return [hidden_of(e["i"]) for e in examples]

    data = Examples({"i": i, "length": size + 1} for i, size in enumerate(SIZES))
    fill_cache(cache, data, compute, tokens=4, rank=rank, world=world, progress=lambda n: None, joined=torch.cat)
    return seen


def test_rows_come_back_from_shards_of_their_size(cache):
    assert cache.nbytes == sum(SIZES) * WIDTH * 2
    assert sorted(fill(cache)) == [0, 1, 2, 3, 4, 5]
    assert len(list(cache.folder.iterdir())) == 2
    cache.check_complete()
    for example in range(len(SIZES)):
        assert torch.equal(cache.rows(example), hidden_of(example))
    assert fill(cache) == []


def test_what_was_stopped_goes_on_at_the_shard(cache):
    with pytest.raises(KeyboardInterrupt):
        fill(cache, stop_after=4)
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards are missing; .* teacher_cache must be a folder"):
        cache.check_complete()
    assert sorted(fill(cache)) == [3, 4, 5]


def test_ranks_share_the_shards_and_a_damaged_one_is_computed_again(cache):
    assert sorted(fill(cache, rank=1, world=2)) == [3, 4, 5]
    assert sorted(fill(cache, rank=0, world=2)) == [0, 1, 2]
    path = sorted(cache.folder.iterdir())[1]
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.warns(UserWarning, match="damaged"):
        assert sorted(fill(cache)) == [3, 4, 5]


def test_a_disk_that_is_too_small_is_said_before(cache, monkeypatch):
    monkeypatch.setattr(hidden_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"teacher_cache: got .* with 0\.0 GiB free, want 0\.0 GiB for"):
        cache.check_space()
