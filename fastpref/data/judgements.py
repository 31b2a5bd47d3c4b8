"""What judges say of several responses to a prompt: scores or ranks, of one judge or of several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def _borda(judged: np.ndarray) -> np.ndarray:
    """Scores `[judges, k]` as one Borda score for each response, `[k]`."""
    wins = np.sign(judged[:, :, None] - judged[:, None, :]).sum(2)  # won minus lost
    others = max(judged.shape[1] - 1, 1)
    return ((wins / others + 1) / 2).mean(0)


COMBINE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": lambda judged: judged.mean(0), "rank": _borda}


def judged_scores(record: Mapping[str, Any], count: int, where: str) -> np.ndarray:
    """Scores `[judges, count]`, higher is better, NaN where a judge had no opinion.

    They come from `scores` (numbers, a list of such lists, or an object of them) or from `ranks` (lower is better). A
    judge that is None did not see the record.

    Raises:
        ValueError: there are none, or not one for each response.
    """
    name = "scores" if record.get("scores") is not None else "ranks"
    values: Any = record.get(name)
    if isinstance(values, Mapping):
        values = [value for value in values.values() if value is not None]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: got no scores and no ranks, want one of them")
    rows = values if isinstance(values[0], list) else [values]
    try:
        judged = np.array([[math.nan if v is None else float(v) for v in row] for row in rows])
    except (TypeError, ValueError):
        judged = np.empty(0)
    if judged.shape != (len(rows), count) or np.isinf(judged).any():
        raise ValueError(f"{where}: got {name} {values!r:.80}, want {count} numbers, one per response, of each judge")
    return judged if name == "scores" else -judged


def ranks_of(scores: np.ndarray, least: float = 0.0) -> list[int]:
    """Ranks from 0, the best, of scores `[k]` where higher is better.

    Equal scores share a rank. So do those that are less than `least` below the best one of their rank.
    """
    ranks, rank, best = [0] * len(scores), -1, math.inf
    for i in np.argsort(-scores, kind="stable").tolist():
        if rank < 0 or best - scores[i] >= max(least, np.finfo(float).tiny):
            rank, best = rank + 1, scores[i]
        ranks[i] = rank
    return ranks
