"""Statistics of pairs against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpref.online import statistics


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(5, 10, 0.236593, 0.763407), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (81, 263, 0.255290, 0.366205)],
)
def test_wilson_interval(successes, trials, low, high) -> None:
    """The last is Newcombe's example (Statistics in Medicine 1998), who prints 0.2553 and 0.3662."""
    assert statistics.wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-5)


def test_wilson_interval_covers_the_share_as_often_as_it_says() -> None:
    """Exactly, over shares of 40 trials: 95 % on average (Brown, Cai and DasGupta 2001)."""
    intervals = [statistics.wilson_interval(hits, 40) for hits in range(41)]
    coverage = []
    for share in np.linspace(0.05, 0.95, 181):
        chances = [math.comb(40, h) * share**h * (1 - share) ** (40 - h) for h in range(41)]
        coverage.append(sum(c for c, (low, high) in zip(chances, intervals, strict=True) if low <= share <= high))
    assert 0.945 < np.mean(coverage) < 0.955 and min(coverage) > 0.9


def margin(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_calibration_of_a_model_that_is_right_as_often_as_it_says() -> None:
    found = statistics.calibration([margin(0.83)] * 83 + [-margin(0.83)] * 17)
    (only,) = found["bins"]
    assert (only["count"], only["accuracy"]) == (100, 0.83)
    assert (only["low"], only["high"], only["confidence"]) == pytest.approx((0.8, 0.85, 0.83))
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["brier"] == pytest.approx(0.83 * 0.17**2 + 0.17 * 0.83**2)
    assert found["log_loss"] == pytest.approx(-0.83 * math.log(0.83) - 0.17 * math.log(0.17))


def test_calibration_error_is_the_distance_weighted_by_count() -> None:
    """30 pairs said 0.9 and all right, 10 said 0.7 and none: (30 * 0.1 + 10 * 0.7) / 40."""
    found = statistics.calibration([margin(0.91)] * 30 + [-margin(0.71)] * 10)
    assert [b["count"] for b in found["bins"]] == [10, 30]
    assert [b["accuracy"] for b in found["bins"]] == [0, 1]
    assert found["ece"] == pytest.approx((30 * 0.09 + 10 * 0.71) / 40)


def test_calibration_falls_with_the_temperature_that_fits() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(scale=2, size=20_000)
    observed = np.where(rng.random(true.size) < 1 / (1 + np.exp(-true)), true, -true)
    errors = {scale: statistics.calibration(scale * observed) for scale in (0.5, 1.0, 2.0)}
    assert errors[1.0]["ece"] < 0.015 < 0.05 < min(errors[0.5]["ece"], errors[2.0]["ece"])
    for name in ("brier", "log_loss"):
        assert errors[1.0][name] < min(errors[0.5][name], errors[2.0][name])


def test_calibration_at_the_ends() -> None:
    found = statistics.calibration([1000.0, -1000.0, 0.0])
    assert [(b["count"], b["accuracy"]) for b in found["bins"]] == [(1, 0.5), (2, 0.5)]
    assert found["brier"] == pytest.approx((0 + 1 + 0.25) / 3)
    assert found["log_loss"] == pytest.approx((0 + 1000 + math.log(2)) / 3)
    assert statistics.calibration([])["ece"] is None


def test_correlation() -> None:
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    assert statistics.correlation(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert statistics.correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert statistics.correlation([1, 1], [1, 2]) is None and statistics.correlation([1], [1]) is None


def test_centring_takes_away_what_groups_differ_in() -> None:
    found = statistics.centred_by_group([1, 3, 10, 20, 7], [5, 5, 2, 2, 9])
    assert found.tolist() == [-1, 1, -5, 5, 0]


def test_length_bias_by_hand() -> None:
    found = statistics.length_bias([1.0, 2.0, -1.0, 0.5, -3.0], [10, 20, 5, -10, 0])
    assert found["chosen_longer"] == 0.6 and found["mean_difference"] == 5
    assert (found["longer_wins"]["share"], found["longer_wins"]["count"]) == (0.75, 4)
    assert (found["accuracy_chosen_longer"]["share"], found["accuracy_chosen_longer"]["count"]) == (2 / 3, 3)
    assert (found["accuracy_chosen_shorter"]["share"], found["accuracy_chosen_shorter"]["count"]) == (1, 1)
    assert found["correlation"] == pytest.approx(np.corrcoef([1, 2, -1, 0.5, -3], [10, 20, 5, -10, 0])[0, 1])


def test_quantiles() -> None:
    assert statistics.quantiles(range(101)) == {"0.05": 5, "0.25": 25, "0.5": 50, "0.75": 75, "0.95": 95}
    assert statistics.quantiles([]) is None and statistics.mean([]) is None
