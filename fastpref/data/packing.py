"""Packs sequences of token ids into one row for the backbone, with common beginnings such as prompts only once.

There are three layouts of the same sequences, with the same meaning:

    shared   one row [1, N], a tree: what sequences begin with in common is there once (`fastpref.data.tree`)
    packed   one row [1, N], the sequences one after the other
    padded   [S, T], padded on the right

`rows` picks from the flattened hidden states those that score a token, in the order of the sequences. Nothing else
reaches the head. The last row of a common beginning scores the first token of every sequence that follows it.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref.data.batches import padded
from fastpref.data.ids import IGNORE_INDEX
from fastpref.data.tree import Beginnings, Branch, Tree, tree
from fastpref.models.segments import Segments

LAYOUTS = ("shared", "packed", "padded")


class Scored(NamedTuple):
    """A sequence of token ids whose tokens from `first` on are scored; with a `mask`, only those where it is 1.

    Each scored token has a row. With `kept` (`kept <= first`) the tokens from `kept` to `first` have rows too, without
    a label.
    """

    ids: Sequence[int]
    first: int
    kept: int | None = None
    mask: Sequence[int] | None = None  # of ids[first:]
    without: frozenset[int] = frozenset()  # ids before `first` that have no row, such as an image's
    context: bytes = b""  # what its tokens mean beside their ids: only sequences of one context share

    def tokens(self) -> np.ndarray:
        """Indices of the tokens that have a row. The first token of a sequence has none: nothing comes before it."""
        at = np.arange(max(1, self.first if self.kept is None else self.kept), len(self.ids))
        if self.mask is None and not self.without:
            return at
        has_row = np.ones(len(self.ids), dtype=bool)
        if self.without:
            has_row[: self.first] = ~np.isin(self.ids[: self.first], list(self.without))
        if self.mask is not None:
            has_row[self.first :] = np.asarray(self.mask, dtype=bool)
        return at[has_row[at]]


def in_order(groups: Sequence[Sequence[Scored]]) -> list[Scored]:
    """The sequences of groups of one size: the first of each group, then the second of each, and so on."""
    return [sequence for branch in zip(*groups, strict=True) for sequence in branch]


def pack(
    sequences: Sequence[Scored], layout: str, pad_token_id: int = 0, *, count_copies: bool = False
) -> dict[str, Any]:
    """A batch from sequences.

    Args:
        sequences: in the order of the batch, such as [B chosen; B rejected] for pairs.
        layout: one of `LAYOUTS`.
        pad_token_id: what fills up the rows of `padded`.
        count_copies: also return `copies`.

    Returns:
        `input_ids`, and what the layout needs beside it: `position_ids` and `fastpref_segments`, or `attention_mask`;
            `rows` and `labels` `[M]`, and `targets` `[M]`, the token of each row, labelled or not; `cu_seqlens`
            `[S + 1]` of these, and `sizes`, the number that each sequence has, as a tuple on the host; `last_rows`
            `[S]` of each sequence's last token; `places`, on the host where each sequence's tokens are in the flattened
            input; where many rows score the same token twice, `head_rows`, `head_labels` and `head_index` (see
            `distinct_rows`); and perhaps `copies`: for each input token, the number of sequences that it is in.
    """
    if layout == "padded":
        inputs, places = _padded(sequences, pad_token_id)
    else:
        found = _tree(sequences, layout)
        places = found.rows
        inputs = {
            "input_ids": torch.from_numpy(found.ids)[None],
            "position_ids": torch.from_numpy(found.positions)[None],
            "fastpref_segments": Segments.of(found.segments),
        }
    batch = inputs | scored_rows(sequences, places) | {"places": places}
    if layout == "shared":
        batch |= distinct_rows(batch["rows"].numpy(), batch["targets"].numpy())
    if count_copies:
        copies = np.bincount(np.concatenate(places), minlength=inputs["input_ids"].numel())
        batch["copies"] = torch.from_numpy(copies)
    return batch


def _tree(sequences: Sequence[Scored], layout: str) -> Tree:
    if layout == "shared":
        beginnings = Beginnings([s.ids for s in sequences], [s.context for s in sequences])
        return tree(beginnings.ids, beginnings.branches(range(len(sequences))))
    alone = [Branch(i, None, 0) for i in range(len(sequences))]
    return tree([np.asarray(s.ids, dtype=np.int64) for s in sequences], alone)


def scored_rows(sequences: Sequence[Scored], places: Sequence[np.ndarray]) -> dict[str, Any]:
    """`rows`, `labels`, `targets` and what says which sequence they belong to; see `pack`.

    `places` has, for each sequence, where its tokens are in the flattened input.
    """
    rows, labels, targets, sizes, last = [], [], [], [], []
    for sequence, place in zip(sequences, places, strict=True):
        tokens = sequence.tokens()
        rows.append(place[tokens - 1])
        targets.append(np.asarray(sequence.ids, dtype=np.int64)[tokens])
        labels.append(np.where(tokens < sequence.first, IGNORE_INDEX, targets[-1]))
        sizes.append(len(tokens))
        last.append(place[-1:])
    return {
        "rows": torch.from_numpy(np.concatenate(rows)),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "targets": torch.from_numpy(np.concatenate(targets)),
        "cu_seqlens": torch.tensor([0, *sizes]).cumsum(0),
        "sizes": tuple(sizes),
        "last_rows": torch.from_numpy(np.concatenate(last)),
    }


def distinct_rows(rows: np.ndarray, tokens: np.ndarray) -> dict[str, torch.Tensor]:
    """The head's work where sequences share responses: each pair of a row and the token that it scores once.

    Returns:
        `head_rows` and `head_labels` `[U]`, and `head_index` `[M]`, which of these each row of `rows` is. Nothing where
            they would save less than 1 row of 16: a loss straight from hidden states needs the least memory.
    """
    vocabulary = int(tokens.max(initial=0)) + 1
    distinct, index = np.unique(rows * vocabulary + tokens, return_inverse=True)
    if 16 * len(distinct) > 15 * len(rows):
        return {}
    found = {"head_rows": distinct // vocabulary, "head_labels": distinct % vocabulary, "head_index": index}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def _padded(sequences: Sequence[Scored], pad_token_id: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    input_ids, attention_mask = padded([s.ids for s in sequences], pad_token_id, "right")
    places = [row * input_ids.shape[1] + np.arange(len(s.ids)) for row, s in enumerate(sequences)]
    return {"input_ids": input_ids, "attention_mask": attention_mask}, places


class TokenCounter:
    """How many tokens the backbone runs over for groups `start` to `end - 1`."""

    def __init__(self, groups: Sequence[Sequence[Scored]], layout: str) -> None:
        sequences = [s for group in groups for s in group]
        ids, contexts = [s.ids for s in sequences], [s.context for s in sequences]
        self._layout = layout
        self._starts = np.cumsum([0, *map(len, groups)])
        self._lengths = np.array([*map(len, ids)])
        self._beginnings = Beginnings(ids, contexts) if layout == "shared" else None

    def __call__(self, start: int, end: int) -> int:
        first, last = int(self._starts[start]), int(self._starts[end])
        if self._beginnings is not None:
            return self._beginnings.nodes(range(first, last))
        lengths = self._lengths[first:last]
        return int(len(lengths) * lengths.max() if self._layout == "padded" else lengths.sum())


def split_by_tokens(groups: Sequence[Sequence[Scored]], layout: str, budget: int | None) -> list[range]:
    """Ranges of consecutive groups with at most `budget` tokens each. A group with more is alone."""
    if budget is None:
        return [range(len(groups))]
    count, parts, start = TokenCounter(groups, layout), [], 0
    while start < len(groups):
        too_many = functools.partial(_exceeds, count, start, budget)
        end = bisect.bisect_left(range(start + 2, len(groups) + 1), True, key=too_many) + start + 1
        parts.append(range(start, end))
        start = end
    return parts


def _exceeds(count: Callable[[int, int], int], start: int, budget: int, end: int) -> bool:
    return count(start, end) > budget
