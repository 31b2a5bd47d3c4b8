"""Agreement between raters, against published examples."""

from __future__ import annotations

import numpy as np
import pytest

from fastpref.online.agreement import agreement_report, cohen_kappa, fleiss_kappa, krippendorff_alpha

X = np.nan
KRIPPENDORFF = np.array(  # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
        [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
    ]
)
FLEISS = [  # Fleiss 1971 as Wikipedia has it: 10 items, 14 raters, 5 categories
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


@pytest.mark.parametrize("level, wanted", [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level, wanted) -> None:
    assert krippendorff_alpha(KRIPPENDORFF, level) == pytest.approx(wanted, abs=5e-4)


def test_fleiss_example() -> None:
    assert fleiss_kappa(FLEISS) == pytest.approx(0.210, abs=5e-4)
    with pytest.raises(ValueError, match="counts: got items with 2 to 3 raters, want as many, at least 2"):
        fleiss_kappa([[1, 1], [1, 2]])


@pytest.mark.parametrize(
    "table, wanted", [((20, 5, 10, 15), 0.4), ((45, 15, 25, 15), 0.1304), ((25, 35, 5, 35), 0.2593)]
)
def test_cohens_kappa_of_textbook_tables(table, wanted) -> None:
    """Wikipedia's: yes/yes, yes/no, no/yes, no/no."""
    pairs = [pair for pair, n in zip([(1, 1), (1, 0), (0, 1), (0, 0)], table, strict=True) for _ in range(n)]
    assert cohen_kappa(*np.array(pairs).T) == pytest.approx(wanted, abs=5e-5)


def test_what_is_not_defined_is_none() -> None:
    assert cohen_kappa([], []) is None and cohen_kappa([1, 1], [1, 1]) is None
    assert fleiss_kappa(np.empty((0, 3))) is None and fleiss_kappa([[2, 0], [2, 0]]) is None
    assert krippendorff_alpha([[1, 1], [1, X]]) is None and krippendorff_alpha([[1, 2, 3]]) is None
    assert krippendorff_alpha([[1, 2, X], [X, X, 3]]) is None


def test_perfect_and_opposite() -> None:
    assert cohen_kappa([0, 1, 2], [0, 1, 2]) == 1 and cohen_kappa([0, 1], [1, 0]) == -1
    assert krippendorff_alpha([[0, 1, 2], [0, 1, 2]], "ordinal") == 1


def test_report_by_hand() -> None:
    """Preferences of (0, 1), (0, 2), (1, 2), then of one pair."""
    records = [
        {"responses": list("abc"), "scores": {"human": [3, 2, 1], "x": [1.0, 0.5, 0.5], "y": [0, 1, None]}},
        {"responses": list("ab"), "ranks": [2, 1], "scores": {"x": [0.0, 1.0], "y": [1, 0]}},
        {"responses": list("ab"), "scores": {"human": [1, 1], "x": [0.0, 1.0], "y": [0, 2]}},
    ]
    found = agreement_report(records)  # human + + + - 0; x + + 0 - -; y - . . + -
    assert found is not None
    assert (found["judges"], found["items"], found["items_of_all"]) == (["human", "x", "y"], 5, 3)
    shares = {tuple(two["judges"]): (two["agree"]["share"], two["agree"]["count"]) for two in found["pairs"]}
    assert shares == {("human", "x"): (3 / 5, 5), ("human", "y"): (0.0, 3), ("x", "y"): (1 / 3, 3)}
    right = {name: (beside["right"]["share"], beside["right"]["count"]) for name, beside in found["human"].items()}
    assert right == {"x": (1.0, 3), "y": (0.0, 2)}
    assert found["human"]["x"]["ties"] == {"judge": 1, "human": 1}
    expected = (3 * 2 + 1 * 1 + 1 * 2) / 25
    assert found["human"]["x"]["cohen_kappa"] == pytest.approx((3 / 5 - expected) / (1 - expected))
    assert agreement_report([{"responses": ["a", "b"], "scores": [1, 2]}]) is None
