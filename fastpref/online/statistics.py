"""Statistics of pairs: pure functions of NumPy arrays.

None stands for what is not defined (no data, no variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def mean(values: ArrayLike) -> float | None:
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()) if x.size else None


def quantiles(values: ArrayLike, at: Sequence[float] = QUANTILES) -> dict[str, float] | None:
    """By linear interpolation between the sorted values."""
    x = np.asarray(values, dtype=np.float64)
    return {f"{q:g}": float(v) for q, v in zip(at, np.quantile(x, at), strict=True)} if x.size else None


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Wilson's score interval of a share (Wilson 1927).

    It keeps its coverage with few trials, and near 0 and 1.
    """
    if trials == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * np.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    scale = 1 + z * z / trials
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


def share(flags: ArrayLike) -> dict[str, Any]:
    """How many flags are set, out of how many, with Wilson's 95 % interval."""
    x = np.asarray(flags, dtype=bool)
    return {"share": mean(x), "interval": wilson_interval(int(x.sum()), x.size), "count": int(x.size)}


def correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's correlation coefficient."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def centred_by_group(values: ArrayLike, groups: ArrayLike) -> np.ndarray:
    """The values less the mean of their group: what is left when groups (prompts) differ as wholes."""
    x, index = np.asarray(values, dtype=np.float64), np.unique(np.asarray(groups), return_inverse=True)[1]
    return x - (np.bincount(index, x) / np.bincount(index))[index]


def calibration(margins: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Whether sigmoid(margin) is the probability that it claims to be.

    Bradley-Terry reads a margin as P(chosen beats rejected) = sigmoid(margin). The model's *confidence* is the
    probability that it gives to the side that it prefers: sigmoid(|margin|), in [0.5, 1]. The model is *right* if that
    side is the chosen one; a margin of 0 is half right. Of all pairs with a confidence of 0.7, 70 % should be right.

    Returns:
        `bins`, of equal width over [0.5, 1], the empty ones left out: edges, count, mean confidence, accuracy with
            Wilson's 95 % interval; `ece`, the expected calibration error: mean |accuracy - confidence| over bins by
            count (Guo et al. 2017, arXiv 1706.04599 eq. 3); `brier`, mean (1 - sigmoid(margin))^2; `log_loss`, mean
            -log sigmoid(margin), the loss that reward models and DPO are trained with.
    """
    m = np.asarray(margins, dtype=np.float64)
    if m.size == 0:
        return {"bins": [], "ece": None, "brier": None, "log_loss": None}
    confidence = 1 / (1 + np.exp(-np.abs(m)))
    right = np.where(m > 0, 1.0, np.where(m == 0, 0.5, 0.0))
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for i in np.unique(place):
        inside = place == i
        count, hits = int(inside.sum()), float(right[inside].sum())
        rows.append(
            {
                "low": 0.5 + i / (2 * bins),
                "high": 0.5 + (i + 1) / (2 * bins),
                "count": count,
                "confidence": float(confidence[inside].mean()),
                "accuracy": hits / count,
                "interval": wilson_interval(hits, count),
            }
        )
    ece = sum(r["count"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / m.size
    # P(rejected wins) = sigmoid(-margin), without the cancellation of 1 - sigmoid(margin)
    lost = np.where(m >= 0, 1 - confidence, confidence)
    return {
        "bins": rows,
        "ece": float(ece),
        "brier": float((lost**2).mean()),
        "log_loss": float(np.logaddexp(0, -m).mean()),
    }


def length_differences(differences: ArrayLike) -> dict[str, Any]:
    """How chosen and rejected lengths differ. `differences` is chosen minus rejected length, one per pair."""
    d = np.asarray(differences, dtype=np.float64)
    return {
        "chosen_longer": mean(d > 0),
        "longer_wins": share(d[d != 0] > 0),  # how often a rule that prefers the longer one would be right
        "mean_difference": mean(d),
    }


def length_bias(margins: ArrayLike, differences: ArrayLike) -> dict[str, Any]:
    """Whether margins follow length: `differences` is chosen minus rejected length, one per pair."""
    m, d = (np.asarray(v, dtype=np.float64) for v in (margins, differences))
    return length_differences(d) | {
        "accuracy_chosen_longer": share(m[d > 0] > 0),
        "accuracy_chosen_shorter": share(m[d < 0] > 0),
        "correlation": correlation(m, d),
    }
