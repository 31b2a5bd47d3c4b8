"""What a loss needs whole: pairs or single sequences, as places among the rows that a label scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class UnitRows(NamedTuple):
    """Where the scored rows of each sequence lie among the compacted rows: `edges[s]:edges[s + 1]`.

    A unit is what a loss needs whole: with `sides` 2, sequence u and sequence U + u ([chosen; rejected]); with 1,
    one sequence.
    """

    rows: Tensor  # [n]
    edges: list[int]  # sides * U + 1
    sides: int

    @property
    def number(self) -> int:
        return (len(self.edges) - 1) // self.sides

    def _spans(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(side * self.number + first, side * self.number + last) for side in range(self.sides)]

    def of(self, first: int, last: int) -> Tensor:
        """Compacted positions of units first..last-1, side after side."""
        e, device = self.edges, self.rows.device
        return torch.cat([torch.arange(e[a], e[b], device=device) for a, b in self._spans(first, last)])

    def cu_seqlens(self, first: int, last: int) -> Tensor:
        """Offsets of those units' sequences, as if they were the whole batch."""
        lengths = [self.edges[s + 1] - self.edges[s] for a, b in self._spans(first, last) for s in range(a, b)]
        return torch.tensor([0, *itertools.accumulate(lengths)], device=self.rows.device)

    def size(self, first: int, last: int) -> int:
        return sum(self.edges[b] - self.edges[a] for a, b in self._spans(first, last))

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """Consecutive units, as many as fit `rows`; a unit larger than that stands alone."""
        first = 0
        for last in range(1, self.number + 1):
            if last == self.number or self.size(first, last + 1) > rows:
                yield first, last
                first = last
