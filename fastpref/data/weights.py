"""Weights of examples: how often one is trained on, beside the others."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from fastpref.data.formats import column_names

logger = logging.getLogger(__name__)
COLUMN = "weight"


def repeated_by_weight(dataset: Any, seed: int = 0, name: str = "train") -> Any:
    """A data set in which each record is as often as its `weight` says, on average over `seed`.

    A record of weight w is there floor(w) times, and once more with probability w - floor(w). The expected gradient of
    an epoch is that of a loss weighted by w, for every method and trainer. The column is then gone; without it the data
    set comes back as it is. What was done is logged.

    Args:
        dataset: a `datasets.Dataset`.
        seed: decides the fractions.
        name: what it is called in messages.

    Raises:
        ValueError: a weight is no finite number of at least 0, or no record is left.
    """
    if COLUMN not in column_names(dataset):
        return dataset
    weights = np.array([checked_weight(w, f"{name}: record {i}") for i, w in enumerate(dataset[COLUMN], 1)])
    whole = np.floor(weights)
    times = (whole + (np.random.default_rng(seed).random(len(weights)) < weights - whole)).astype(int)
    if not times.any():
        raise ValueError(f"{name}: got weights from {weights.min():g} to {weights.max():g}, which leave no record")
    logger.warning(
        "%s: weights from %g to %g make %d records of %d", name, weights.min(), weights.max(), times.sum(), len(times)
    )
    return dataset.select(np.repeat(np.arange(len(times)), times)).remove_columns(COLUMN)


def checked_weight(value: Any, where: str) -> float:
    """The weight as a number.

    Raises:
        ValueError: it is no finite number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: got a weight of {value!r}, want a finite number, at least 0")
    return float(value)
