"""Helpers for lists of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

IGNORE_INDEX = -100


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(first, second, strict=False)))
