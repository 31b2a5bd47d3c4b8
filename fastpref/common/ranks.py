"""Sums and gathers over the ranks of torch.distributed. Where there is one process they return its own value."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Is torch.distributed initialised?"""
    return dist.is_available() and dist.is_initialized()


def world_size(group: Any = None) -> int:
    """How many ranks `group` has (by default all of them); 1 without torch.distributed."""
    return dist.get_world_size(group) if several() else 1


def sum_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The sum of `value` over the ranks, out of place. Every rank has to call it."""
    if not several():
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def gather_over_ranks(value: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's value in the order of the ranks: the same list on each of them. All values have one shape."""
    if not several():
        return [value]
    everyone = [value.new_empty(value.shape) for _ in range(world_size(group))]
    dist.all_gather(everyone, value.contiguous(), group=group)
    return everyone


class StartedSum:
    """Sums over ranks that run in the background: `start` them, do something else, then `wait`."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._works: list[Any] = []

    def start(self, values: Tensor) -> None:
        """Begin to sum `values` over the ranks, in place. They must not be read before `wait`."""
        self._works.append(dist.all_reduce(values, group=self._group, async_op=True))

    def wait(self) -> None:
        """Return when all sums are finished."""
        for work in self._works:
            work.wait()
