"""Packs sequences of token ids into one row for the backbone, with common beginnings such as prompts only once.

There are three layouts of the same sequences, with the same meaning:

    shared   one row [1, N]; the sequences of a group begin with the same tokens, which are there once
    packed   one row [1, N], the sequences one after the other
    padded   [S, T], padded on the right

`rows` picks from the flattened hidden states those that score a token, in the order of the sequences. Nothing else
reaches the head. The last row of a shared beginning scores the first token of every sequence that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fastpref.data.ids import IGNORE_INDEX, common_prefix_length
from fastpref.models.attention import Segment, Segments

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


class _Place(NamedTuple):
    """Where a sequence's tokens lie in the flattened input.

    The first `shared` of them begin at `prefix`, the rest begin at `own`.
    """

    prefix: int
    shared: int
    own: int

    def positions(self, at: np.ndarray) -> np.ndarray:
        return np.where(at < self.shared, self.prefix + at, self.own + at - self.shared)


def pack(
    groups: Sequence[Sequence[Scored]], layout: str, pad_token_id: int = 0, *, count_copies: bool = False,
    with_places: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A batch from groups of sequences.

    The sequences are ordered first by their place in the group: [B chosen; B rejected] for pairs.

    Args:
        groups: the sequences, in groups that all have one size.
        layout: one of `LAYOUTS`.
        pad_token_id: what fills up the rows of `padded`.
        count_copies: also return `copies`.
        with_places: also return `places`: where the tokens of each sequence lie in the flattened input.

    Returns:
        `input_ids`, and what the layout needs beside it: `position_ids` and `fastpref_segments`, or `attention_mask`;
            `rows` and `labels` `[M]`; `cu_seqlens` `[S + 1]` of these, and `sizes`, the number that each sequence has,
            as a tuple on the host; `last_rows` `[S]` of each sequence's last token; and perhaps `copies`: for each
            input token, the number of sequences that it is in.
    """
    sequences = [group[branch] for branch in range(len(groups[0])) for group in groups]
    if layout == "padded":
        inputs, places = _padded(sequences, pad_token_id)
    else:
        inputs, by_group = _packed(groups if layout == "shared" else [[s] for s in sequences])
        if layout == "shared":
            places = [group[branch] for branch in range(len(groups[0])) for group in by_group]
        else:
            places = [place for (place,) in by_group]
    batch = inputs | scored_rows(sequences, places)
    if with_places:
        batch["places"] = places
    return batch | {"copies": _copies(sequences, places, inputs["input_ids"].numel())} if count_copies else batch


def _copies(sequences: Sequence[Scored], places: Sequence[_Place], tokens: int) -> torch.Tensor:
    at = [place.positions(np.arange(len(s.ids))) for s, place in zip(sequences, places, strict=True)]
    return torch.from_numpy(np.bincount(np.concatenate(at), minlength=tokens))


def scored_rows(sequences: Sequence[Scored], places: Sequence[_Place]) -> dict[str, Any]:
    """`rows`, `labels` and what says which sequence they belong to; see `pack`."""
    rows, labels, sizes, last = [], [], [], []
    for sequence, place in zip(sequences, places, strict=True):
        tokens = sequence.tokens()
        rows.append(place.positions(tokens - 1))
        labels.append(np.where(tokens < sequence.first, IGNORE_INDEX, _ids_at(sequence, tokens)))
        sizes.append(len(tokens))
        last.append(place.positions(np.array([len(sequence.ids) - 1])))
    return {
        "rows": torch.from_numpy(np.concatenate(rows)),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "cu_seqlens": torch.tensor([0, *sizes]).cumsum(0),
        "sizes": tuple(sizes),
        "last_rows": torch.from_numpy(np.concatenate(last)),
    }


def scored_tokens(sequences: Sequence[Scored]) -> torch.Tensor:
    """The token of every row that `scored_rows` gives, labelled or not."""
    return torch.from_numpy(np.concatenate([_ids_at(s, s.tokens()) for s in sequences]))


def _ids_at(sequence: Scored, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(sequence.ids, dtype=np.int64)[tokens]


def _padded(sequences: Sequence[Scored], pad_token_id: int) -> tuple[dict[str, Any], list[_Place]]:
    length = max(len(s.ids) for s in sequences)
    input_ids = torch.full((len(sequences), length), pad_token_id)
    attention_mask = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        attention_mask[row, : len(sequence.ids)] = 1
    places = [_Place(row * length, length, 0) for row in range(len(sequences))]
    return {"input_ids": input_ids, "attention_mask": attention_mask}, places


def _packed(groups: Sequence[Sequence[Scored]]) -> tuple[dict[str, Any], list[list[_Place]]]:
    ids: list[int] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    places: list[list[_Place]] = []
    for group in groups:
        shared = _shared_length(group)
        begin = len(ids)
        placed = []
        for branch, sequence in enumerate(group):
            start = len(ids)
            own = list(sequence.ids[shared if branch else 0 :])
            ids += own
            positions.append(np.arange(len(sequence.ids) - len(own), len(sequence.ids)))
            placed.append(_Place(begin, shared, start if branch else begin + shared))
            if own:
                segments.append(Segment(start, len(ids), begin, begin + shared) if branch else Segment(start, len(ids)))
        places.append(placed)
    inputs = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "fastpref_segments": Segments.of(segments),
    }
    return inputs, places


def _shared_length(group: Sequence[Scored]) -> int:
    """How many tokens all sequences of a group begin with: the prompt, and what the responses have in common."""
    first = group[0].ids
    return min((common_prefix_length(first, other.ids) for other in group[1:]), default=0)


def packed_tokens(groups: Sequence[Sequence[Scored]], layout: str) -> int:
    """How many tokens the backbone will run over."""
    sequences = [s for group in groups for s in group]
    if layout == "padded":
        return len(sequences) * max(len(s.ids) for s in sequences)
    total = sum(len(s.ids) for s in sequences)
    if layout == "packed":
        return total
    return total - sum((len(group) - 1) * _shared_length(group) for group in groups)


def split_by_tokens(groups: Sequence[Sequence[Scored]], layout: str, budget: int | None) -> list[range]:
    """Ranges of consecutive groups with at most `budget` tokens each. A group with more is alone."""
    if budget is None:
        return [range(len(groups))]
    parts, start = [], 0
    for end in range(1, len(groups) + 1):
        if end == len(groups) or packed_tokens(groups[start : end + 1], layout) > budget:
            parts.append(range(start, end))
            start = end
    return parts
