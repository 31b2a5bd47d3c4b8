"""Pairs of several sources in one file, each with a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.data.weights import COLUMN, checked_weight
from fastpref.online.records import Record

PARTS = ("prompt", "chosen", "rejected")


def mix_pairs(sources: Mapping[str, tuple[Sequence[Record], float]]) -> tuple[list[Record], list[str]]:
    """The pairs of all sources, one after the other, each with a `weight`: its source's times its own, if it has one.

    `fastpref train` trains on a pair of weight 2 twice as often as on one of weight 1 (see
    `fastpref.data.weights.repeated_by_weight`). Columns that not all pairs have are left out, as readers of such files
    would make empty values of them.

    Args:
        sources: (pairs with `prompt, chosen, rejected`, weight) by name.

    Returns:
        (the pairs, the names of the columns that were left out).

    Raises:
        ValueError: some pairs are texts and others messages, or a weight is none.
    """
    pairs, kinds = [], dict[str, tuple[type, str]]()
    for name, (some, weight) in sources.items():
        for i, pair in enumerate(some, 1):
            where = f"{name}: record {i}"
            for part in PARTS:
                kind, first = kinds.setdefault(part, (type(pair[part]), where))
                if type(pair[part]) is not kind:
                    raise ValueError(
                        f"{where}: got {part} as {_words(type(pair[part]))}, want {_words(kind)} as in {first}"
                    )
            own = checked_weight(pair.get(COLUMN, 1.0), where)
            pairs.append({**pair, COLUMN: checked_weight(weight, name) * own})
    everywhere = set.intersection(*(set(pair) for pair in pairs)) if pairs else set()
    left_out = sorted(set().union(*pairs) - everywhere)
    return [{name: value for name, value in pair.items() if name in everywhere} for pair in pairs], left_out


def _words(kind: type[Any]) -> str:
    return "text" if kind is str else "messages" if kind is list else kind.__name__
