"""Finds the common beginnings of token sequences, so that a batch runs each of their tokens once.

Sequences that begin alike form a tree: a prompt, the responses to it, turns that branch late. It is found from the
token ids alone, whatever columns they came from. One sequence may be the beginning of another, or equal to it.

In a packed row a tree is one *branch* after the other. A branch is what a sequence adds to those before it, and it
follows its parent: the earlier sequence with which it has the longest beginning in common.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fastpref.models.segments import Segment

# A branch attends to its ancestors through gathered keys and a mask. That costs about as much as running
# own * min(own, 256) / (12 d) tokens again, for own tokens and hidden size d: 1 of 27 own tokens at d = 576, 1 of 190
# at d = 4,096. A beginning shorter than that, such as the BOS of unrelated sequences, is run again.
MOST_OWN = 64  # tokens of a branch for each token that it shares


class Branch(NamedTuple):
    """What one sequence adds to its parent's first `shared` tokens. Without a parent it begins a tree."""

    sequence: int
    parent: int | None
    shared: int


class Beginnings:
    """The common beginnings of sequences, which are sorted once. Then trees of any of them are made.

    It takes as long as reading the tokens: no Python loop runs over them.

    Args:
        sequences: token ids.
        contexts: what each sequence's tokens mean beside their ids, such as a hash of images. Only sequences with the
            same have anything in common. Where there is one, all that can be shared is.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], contexts: Sequence[bytes] | None = None) -> None:
        self.ids = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        self._contexts = contexts or [b""] * len(self.ids)
        # as bytes they sort in the order of their tokens
        texts = [c + ids.astype(">u4").tobytes() for c, ids in zip(self._contexts, self.ids, strict=True)]
        order = sorted(reversed(range(len(texts))), key=texts.__getitem__)  # of equal ones the first comes last
        self._order = order
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        neighbours = [self._with_next(a, b) for a, b in itertools.pairwise(order)]
        self._common = np.array([0, *neighbours])  # of each with the one before it, in the sorted order

    def branches(self, members: Iterable[int]) -> list[Branch]:
        """The branches of some of the sequences. Those that are the beginning of another come last and add nothing."""
        members = list(members)
        contained = self._contained(members)
        ranks: list[int] = []  # of the sequences so far, sorted
        found = []
        for i in [*(m for m in members if m not in contained), *(m for m in members if m in contained)]:
            rank = int(self._rank[i])
            at = bisect_left(ranks, rank)
            near = [(self._shared(r, rank), -r) for r in ranks[max(0, at - 1) : at + 1]]
            shared, parent = max(near, default=(0, 0))
            worth = shared > 0 and (self._contexts[i] or shared * MOST_OWN >= len(self.ids[i]) - shared)
            found.append(Branch(i, self._order[-parent], shared) if worth else Branch(i, None, 0))
            ranks.insert(at, rank)
        return found

    def nodes(self, members: Iterable[int]) -> int:
        """How many tokens run for some of the sequences."""
        return sum(len(self.ids[branch.sequence]) - branch.shared for branch in self.branches(members))

    def _with_next(self, i: int, j: int) -> int:
        """How many tokens two sequences begin with in common."""
        n = min(len(self.ids[i]), len(self.ids[j]))
        differs = self.ids[i][:n] != self.ids[j][:n]
        if self._contexts[i] != self._contexts[j]:
            return 0
        return int(differs.argmax()) if differs.any() else n

    def _shared(self, one: int, other: int) -> int:
        """How many tokens the sequences of two ranks begin with in common."""
        low, high = sorted((one, other))
        return int(self._common[low + 1 : high + 1].min())

    def _contained(self, members: Sequence[int]) -> set[int]:
        """Those that are the beginning of another, or equal to an earlier one."""
        ranks = sorted(int(self._rank[i]) for i in members)
        pairs = itertools.pairwise(ranks)
        return {self._order[r] for r, after in pairs if self._shared(r, after) == len(self.ids[self._order[r]])}


class Tree(NamedTuple):
    """Sequences in one packed row, of N tokens."""

    ids: np.ndarray  # [N]
    positions: np.ndarray  # [N], of each token in its sequences
    segments: list[Segment]
    rows: list[np.ndarray]  # of each sequence, where its tokens are


def tree(ids: Sequence[np.ndarray], branches: Sequence[Branch]) -> Tree:
    """Lays out all sequences by their branches. The branches of one tree follow one another."""
    rows: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(ids)
    paths: list[list[tuple[int, int]]] = [[]] * len(ids)
    tokens, positions, segments, total = [], [], [], 0
    for i, parent, shared in _tree_by_tree(branches):
        end = total + len(ids[i]) - shared
        path = [] if parent is None else _first(paths[parent], shared)
        own = np.arange(total, end)
        rows[i] = own if parent is None else np.concatenate([rows[parent][:shared], own])
        if end > total:
            segments.append(Segment(total, end, tuple(path)))
            path = [*path, (total, end)]
            tokens.append(ids[i][shared:])
            positions.append(np.arange(shared, len(ids[i])))
        paths[i], total = path, end
    return Tree(np.concatenate(tokens), np.concatenate(positions), segments, rows)


def _tree_by_tree(branches: Sequence[Branch]) -> list[Branch]:
    """The branches, parents first, their trees in the order of their first sequences."""
    roots: dict[int, int] = {}
    first: dict[int, int] = {}
    for i, parent, _ in branches:
        roots[i] = i if parent is None else roots[parent]
        first[roots[i]] = min(i, first.get(roots[i], i))
    return sorted(branches, key=lambda branch: first[roots[branch.sequence]])  # stable


def _first(path: Sequence[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """The ranges of a path's first tokens."""
    kept = []
    for start, end in path:
        if tokens <= 0:
            break
        kept.append((start, min(end, start + tokens)))
        tokens -= end - start
    return kept
