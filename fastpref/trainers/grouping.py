"""`group_by_prompt`: an order of a data set in which a prompt's examples are together, in one batch where they fit."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

LOOKED_AT = 64  # groups that may be taken before their turn, to fill a batch


def prompts_of(dataset: Any) -> list[Hashable]:
    """What tells the prompts of a tokenised data set's examples apart: `prompt_hash`, or a hash of their token ids."""
    if "prompt_hash" in dataset.column_names:
        return list(dataset["prompt_hash"])
    columns = [name for name in ("prompt_ids", "pixels") if name in dataset.column_names]
    found: list[Hashable] = []
    for rows in dataset.select_columns(columns).iter(1000):
        for values in zip(*(rows[name] for name in columns), strict=True):
            text = b"".join(np.asarray(value, dtype=np.int64).tobytes() for value in values)
            found.append(hashlib.blake2b(text, digest_size=16).digest())
    return found


def seed_of(args: Any) -> int | None:
    """What shuffles the prompts of a trainer's configuration; None where they keep their order."""
    if args.train_sampling_strategy == "sequential":
        return None
    return args.seed if args.data_seed is None else args.data_seed


class PromptSampler(torch.utils.data.Sampler[int]):
    """Indices in an order in which equal prompts follow one another, and cross as few borders of batches as they can.

    The order depends on the seed and the epoch alone, so all ranks have the same, and a resumed run goes on with it.

    Args:
        prompts: what tells the examples' prompts apart.
        batch_size: of one rank's batch: ranks get consecutive batches.
        seed: of the shuffling. None keeps the order in which the prompts are first seen.
        epoch: called when an epoch begins, for its number.
    """

    def __init__(
        self, prompts: Sequence[Hashable], batch_size: int, seed: int | None, epoch: Callable[[], int]
    ) -> None:
        self.batch_size, self.seed, self.epoch, self._length = batch_size, seed, epoch, len(prompts)
        groups: dict[Hashable, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(i)
        self._groups = list(groups.values())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        groups = self._groups
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch())
            groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        return in_batches(groups, self.batch_size)


def in_batches(groups: Sequence[Sequence[int]], size: int) -> Iterator[int]:
    """The groups' members, so that a group lies within one batch of `size`: the first that fits fills the room left.

    A group that is larger than a batch is cut, and so is the next one where none of those looked at fits.
    """
    waiting = deque(group[i : i + size] for group in groups for i in range(0, len(group), size))
    room = size
    while waiting:
        fitting = (i for i in range(min(LOOKED_AT, len(waiting))) if len(waiting[i]) <= room)
        at = next(fitting, None)
        if at is None:
            yield from waiting[0][:room]
            waiting[0] = waiting[0][room:]
            room = size
        else:
            yield from waiting[at]
            room -= len(waiting[at])
            del waiting[at]
            room = room or size
