"""Collectives that also work where there is one process."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size(group: Any = None) -> int:
    return dist.get_world_size(group) if several() else 1


def sum_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The sum over all ranks, out of place."""
    if not several():
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def gather_over_ranks(value: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's value, in the order of the ranks: the same list on each of them."""
    if not several():
        return [value]
    everyone = [value.new_empty(value.shape) for _ in range(world_size(group))]
    dist.all_gather(everyone, value.contiguous(), group=group)
    return everyone


class StartedSum:
    """A sum over ranks that runs while other things do."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._works: list[Any] = []

    def start(self, values: Tensor) -> None:
        """In place; not to be read before `wait`."""
        self._works.append(dist.all_reduce(values, group=self._group, async_op=True))

    def wait(self) -> None:
        for work in self._works:
            work.wait()
