"""The study of KL gradients: what must be unbiased is, and what must not be trusted is seen to be biased."""

from __future__ import annotations

import pytest

from benchmarks import kl_gradients


@pytest.fixture(scope="module")
def found():
    rows = kl_gradients.study((0.15,))
    return {(row["sampled"], row["placement"], row["estimator"]): row for row in rows}


UNBIASED = [
    ("policy", "reward", "k1"), ("policy", "reward", "exact"), ("policy", "loss", "k2"), ("policy", "loss", "k3"),
    ("policy", "loss", "exact"), ("older policy", "loss", "k2"), ("older policy", "loss", "k3"),
    ("older policy", "loss", "exact"),
]  # fmt: skip


def test_estimators_are_unbiased_where_the_papers_say_so(found) -> None:
    """arXiv 2510.01555 on-policy, 2512.21852 off-policy."""
    for name, row in found.items():
        assert (row["bias"] < kl_gradients.NONE) == (name in UNBIASED), name


def test_an_exact_kl_that_only_rewards_see_is_biased(found) -> None:
    """Its own gradient is a term of the loss. With it, the variance is below that of k1."""
    assert found["policy", "reward", "exact, by samples alone"]["bias"] > 0.1
    assert found["policy", "reward", "exact"]["deviation"] < found["policy", "reward", "k1"]["deviation"]


def test_a_weighted_k3_has_the_gradient_of_k2(found) -> None:
    for sampled in ("policy", "older policy"):
        assert found[sampled, "loss", "k3"]["deviation"] == pytest.approx(found[sampled, "loss", "k2"]["deviation"])
