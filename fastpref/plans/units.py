"""Units, which are pairs, groups or single sequences, as places among the scored rows: what a loss needs whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.common import checks
from fastpref.plans.compact import compact


class UnitRows(NamedTuple):
    """Where the scored rows of each sequence lie among the compacted rows: `edges[s]:edges[s + 1]`.

    A unit is what a loss needs whole. With `sides` 2 it is a pair: sequence u and sequence U + u of
    `[U chosen; U rejected]`. With `sides` 1 it is one sequence, or with `bounds` the sequences
    `bounds[u]:bounds[u + 1]`.
    """

    rows: Tensor  # [n]
    edges: Sequence[int]  # sides * U + 1
    sides: int
    offsets: Tensor  # the edges on the device
    bounds: Sequence[int] | None = None  # U + 1

    @property
    def number(self) -> int:
        """How many units there are."""
        return (len(self.edges) - 1) // self.sides if self.bounds is None else len(self.bounds) - 1

    def _spans(self, first: int, last: int) -> list[tuple[int, int]]:
        """The sequences of units first..last-1, side after side."""
        if last - first == self.number:
            return [(0, len(self.edges) - 1)]
        if self.bounds is not None:
            return [(self.bounds[first], self.bounds[last])]
        return [(side * self.number + first, side * self.number + last) for side in range(self.sides)]

    def places(self, first: int, last: int) -> list[slice]:
        """Where units first..last-1 lie among the compacted rows, side after side."""
        return [slice(self.edges[a], self.edges[b]) for a, b in self._spans(first, last)]

    def of(self, values: Tensor, first: int, last: int) -> Tensor:
        """The part of compacted `values` `[n, ...]` that units first..last-1 have. A view where it is in one piece."""
        parts = [values[place] for place in self.places(first, last)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def cu_seqlens(self, first: int, last: int) -> Tensor:
        """Offsets of the sequences of units first..last-1, as if they were the whole batch."""
        (a, b), *others = self._spans(first, last)
        begin, size = self.edges[a], self.edges[b] - self.edges[a]
        parts = [self.offsets[a : b + 1] - begin if begin else self.offsets[a : b + 1]]
        for a, b in others:
            parts.append(self.offsets[a + 1 : b + 1] + (size - self.edges[a]))
            size += self.edges[b] - self.edges[a]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def size(self, first: int, last: int) -> int:
        """How many scored rows units first..last-1 have."""
        return sum(self.edges[b] - self.edges[a] for a, b in self._spans(first, last))

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """(first, last) of groups of consecutive units, as many as fit `rows`. A larger unit stands alone."""
        first = 0
        for last in range(1, self.number + 1):
            if last == self.number or self.size(first, last + 1) > rows:
                yield first, last
                first = last


def sequence_offsets(labels: Tensor, cu_seqlens: Tensor | None, sequences: int, ignore_index: int) -> Tensor:
    """Where the scored rows of each sequence begin among all scored rows, `[sequences + 1]` on the device."""
    scored = labels != ignore_index
    if cu_seqlens is None:
        cu_seqlens = torch.arange(sequences + 1, device=labels.device) * (labels.numel() // sequences)
    before = torch.cat([scored.new_zeros(1, dtype=torch.long), scored.cumsum(0)])
    return before.index_select(0, cu_seqlens)


def unit_rows(
    labels: Tensor, cu_seqlens: Tensor | None, sequences: int, sides: int, ignore_index: int,
    edges: Sequence[int] | None = None, bounds: Sequence[int] | None = None,
) -> UnitRows:  # fmt: skip
    """The units of a batch of `sequences`, padded or packed. `bounds` as in `UnitRows`.

    `edges` are the offsets of each sequence's scored rows, if the host knows them. Else one host sync finds out.

    Raises:
        ValueError: `edges` are not those of the labels (checked on a CPU, or with `FASTPREF_DEBUG=1`).
    """
    layout = (labels, cu_seqlens, sequences, ignore_index)
    every = edges is not None and edges[-1] == labels.numel() and cu_seqlens is not None
    offsets = cu_seqlens if every and cu_seqlens is not None else sequence_offsets(*layout)
    if edges is None:
        edges = offsets.tolist()
    elif checks.free_to_read(labels) and (found := sequence_offsets(*layout).tolist()) != list(edges):
        raise ValueError(f"scored_rows: got offsets {list(edges)}, want those of the labels, {found}")
    return UnitRows(compact(labels, ignore_index, edges[-1]), edges, sides, offsets, bounds)


def whole_groups(group: Sequence[int]) -> list[int]:
    """Where to cut sequences so that no group is in two pieces: the bounds of the smallest such pieces."""
    last = {name: i for i, name in enumerate(group)}
    bounds, reach = [0], -1
    for i, name in enumerate(group):
        reach = max(reach, last[name])
        if i == reach:
            bounds.append(i + 1)
    return bounds
