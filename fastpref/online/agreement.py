"""Agreement between raters: Cohen's and Fleiss' kappa, Krippendorff's alpha. Pure functions of NumPy arrays.

None stands for what is not defined: no data, or nothing that could have varied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastpref.common import checks
from fastpref.online import statistics


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    """Of two raters' categories for the same items (Cohen 1960): 1 is agreement, 0 what chance would give."""
    a, b = np.asarray(first), np.asarray(second)
    if not a.size:
        return None
    expected = sum(float((a == c).mean() * (b == c).mean()) for c in np.union1d(a, b))
    return None if expected == 1 else (float((a == b).mean()) - expected) / (1 - expected)


def fleiss_kappa(counts: ArrayLike) -> float | None:
    """Of several raters (Fleiss 1971).

    Args:
        counts: `[items, categories]`, how many raters put the item there. Each item has the same number of raters, two
            or more.
    """
    n = np.asarray(counts, dtype=np.float64)
    if not n.size or n.sum() == 0:
        return None
    raters = n[0].sum()
    if raters < 2 or not (n.sum(1) == raters).all():
        raise ValueError(
            f"counts: got items with {n.sum(1).min():g} to {n.sum(1).max():g} raters, want as many, at least 2"
        )
    observed = float(((n * (n - 1)).sum(1) / (raters * (raters - 1))).mean())
    expected = float(((n.sum(0) / n.sum()) ** 2).sum())
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(ratings: ArrayLike, level: str = "nominal") -> float | None:
    """Of any number of raters, some of whom may not have rated an item (Krippendorff 2011).

    1 is agreement, 0 what chance would give: alpha = 1 - observed / expected disagreement.

    Args:
        ratings: `[raters, items]`, NaN where there is none.
        level: what a difference of values counts. `"nominal"`: any is 1. `"ordinal"`: by the number of ratings between
            them. `"interval"`: its square.
    """
    checks.choice("level", level, ("nominal", "ordinal", "interval"))
    x = np.asarray(ratings, dtype=np.float64)
    x = x[:, (~np.isnan(x)).sum(0) > 1]  # an item with one rating says nothing of agreement
    values = np.unique(x[~np.isnan(x)])
    if len(values) < 2:
        return None
    counts = np.stack([(x == v).sum(0) for v in values]).astype(np.float64)  # [values, items]
    pairs = counts / (counts.sum(0) - 1)
    coincidences = pairs @ counts.T - np.diag(pairs.sum(1))
    totals = coincidences.sum(1)
    distance = _distances(values, totals, level)
    expected = np.outer(totals, totals) - np.diag(totals)
    return float(1 - (totals.sum() - 1) * (coincidences * distance).sum() / (expected * distance).sum())


def _distances(values: np.ndarray, totals: np.ndarray, level: str) -> np.ndarray:
    """Squared differences `[values, values]`."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    # ordinal: the ratings from one value to the other, each end by half
    place = np.cumsum(totals) - totals / 2 if level == "ordinal" else values
    return (place[:, None] - place[None, :]) ** 2


def preferences(scores: Mapping[str, Sequence[float | None] | None], count: int) -> dict[str, np.ndarray]:
    """What each rater prefers of every two of `count` responses, by its scores.

    Returns:
        of each rater `[count * (count - 1) / 2]`: 1 the first, -1 the second, 0 neither, NaN no opinion.
    """
    first, second = np.array(list(combinations(range(count), 2)), dtype=int).reshape(-1, 2).T
    found = {}
    for name, given in scores.items():
        x = np.array([np.nan if s is None else s for s in (given or [None] * count)], dtype=np.float64)
        found[name] = np.sign(x[first] - x[second])
    return found


def agreement_report(records: Sequence[Mapping[str, Any]], human: str = "human") -> dict[str, Any] | None:
    """How far the judges of records with named `scores` agree on which of two responses is better.

    Args:
        records: each with `responses` and `scores` `{judge: list}`. `ranks` count as the human's, if there is none.
        human: the name of people's scores.

    Returns:
        JSON values. `pairs`, of every two judges: the items that both rated, the share on which they agree, Cohen's
            kappa; `fleiss_kappa` over the items that all rated; `krippendorff_alpha` (ordinal: a tie is between) over
            all; `human`, of each judge: `right`, how often it prefers what people prefer where both prefer one, and
            Cohen's kappa with ties. None if fewer than two judges have scores.
    """
    raters: dict[str, list[np.ndarray]] = {}
    rated = [_scores_of(record, human) for record in records]
    names = list(dict.fromkeys(name for scores in rated for name in scores))
    if len(names) < 2:
        return None
    for record, scores in zip(records, rated, strict=True):
        found = preferences({name: scores.get(name) for name in names}, len(record["responses"]))
        for name in names:
            raters.setdefault(name, []).append(found[name])
    columns = {name: np.concatenate(rows) for name, rows in raters.items()}
    table = np.stack(list(columns.values()))
    complete = table[:, ~np.isnan(table).any(0)]
    counts = np.stack([(complete == c).sum(0) for c in (-1, 0, 1)], 1)
    return {
        "judges": names,
        "items": int(table.shape[1]),
        "pairs": [{"judges": [a, b], **_two(columns[a], columns[b])} for a, b in combinations(names, 2)],
        "items_of_all": int(complete.shape[1]),
        "fleiss_kappa": fleiss_kappa(counts),
        "krippendorff_alpha": krippendorff_alpha(table, "ordinal"),
        "human": {n: _beside_human(columns[n], columns[human]) for n in names if n != human}
        if human in names
        else None,
    }


def _scores_of(record: Mapping[str, Any], human: str) -> dict[str, Any]:
    scores = record.get("scores")
    scores = dict(scores) if isinstance(scores, Mapping) else {} if scores is None else {"scores": scores}
    if human not in scores and record.get("ranks") is not None:
        scores[human] = [None if rank is None else -rank for rank in record["ranks"]]
    return scores


def _two(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    both = ~np.isnan(a) & ~np.isnan(b)
    return {"agree": statistics.share(a[both] == b[both]), "cohen_kappa": cohen_kappa(a[both], b[both])}


def _beside_human(judge: np.ndarray, people: np.ndarray) -> dict[str, Any]:
    both = ~np.isnan(judge) & ~np.isnan(people)
    decided = both & (judge != 0) & (people != 0)
    return {
        "right": statistics.share(judge[decided] == people[decided]),
        "cohen_kappa": cohen_kappa(judge[both], people[both]),
        "ties": {"judge": int((judge[both] == 0).sum()), "human": int((people[both] == 0).sum())},
    }
