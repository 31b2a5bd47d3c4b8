"""Weights: how often a record is trained on."""

from __future__ import annotations

from collections import Counter

import pytest
from support_data import dataset

from fastpref.data.weights import repeated_by_weight

WEIGHTS = [0, 0.25, 1, 2.5, 3.0]


def test_a_record_is_there_as_often_as_its_weight_says(caplog) -> None:
    data = dataset(*({"prompt": str(i), "weight": float(w)} for i, w in enumerate(WEIGHTS)))
    counts, seeds = Counter[str](), 80
    for seed in range(seeds):
        found = repeated_by_weight(data, seed)
        assert found.column_names == ["prompt"] and found["prompt"] == sorted(found["prompt"])
        here = Counter(found["prompt"])
        assert all(here[str(i)] in (int(w), int(w) + (w % 1 > 0)) for i, w in enumerate(WEIGHTS))
        counts += here
    for i, weight in enumerate(WEIGHTS):  # 4 standard deviations
        part = weight % 1
        assert abs(counts[str(i)] - seeds * weight) <= 4 * (seeds * part * (1 - part)) ** 0.5
    assert repeated_by_weight(data, 3)["prompt"] == repeated_by_weight(data, 3)["prompt"]
    assert "train: weights from 0 to 3 make" in caplog.text


def test_without_weights_nothing_changes() -> None:
    data = dataset({"prompt": "a"})
    assert repeated_by_weight(data) is data


@pytest.mark.parametrize("weight, got", [(-1.0, "-1.0"), (float("nan"), "nan"), (None, "None"), ("2", "'2'")])
def test_what_is_no_weight(weight, got) -> None:
    data = dataset({"weight": weight}, {"weight": weight if isinstance(weight, str) else 1.0})
    with pytest.raises(ValueError, match=f"train: record 1: got a weight of {got}, want a finite number, at least 0"):
        repeated_by_weight(data)


def test_no_record_is_left() -> None:
    with pytest.raises(ValueError, match="got weights from 0 to 0, which leave no record"):
        repeated_by_weight(dataset({"weight": 0.0}))
