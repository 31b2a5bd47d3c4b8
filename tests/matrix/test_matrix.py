"""Every way to train of the table runs, with the loss and gradients of the same model in fp64, or does what it says.

In CI, cells that hold every pair of values; all of them with `make matrix`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import math
import os

import pytest

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)
pytest.importorskip("bitsandbytes")

from tests.matrix import ranks, run
from tests.matrix.table import ABSENT, AXES, HOST, REFUSED, Cell, cells, covering, outcome

ALL = os.environ.get("FASTPREF_MATRIX") == "all"
FP32 = (2e-6, 4e-6)  # of the loss and the gradients: twice what TRL's own are
SPREAD = 3.0  # of a cell's two updates: over many, see test_precision
MEAN = 1.1

pytestmark = pytest.mark.filterwarnings("ignore")


def groups() -> dict[str, list[Cell]]:
    tried = [cell for cell in cells() if outcome(cell).what != ABSENT] if ALL else covering()
    found: dict[str, list[Cell]] = {}
    for cell in tried:
        name = f"{cell.host}-{cell.trains}-{cell.ranks}" if ALL else cell.host if cell.ranks == "one" else "two ranks"
        found.setdefault(name, []).append(cell)
    return found


def fault(cell: Cell, found: run.Found, folder) -> str | None:
    wanted = outcome(cell)
    if found.errors is None:
        return None if wanted.what == REFUSED and wanted.text in found.error else f"raised {found.error[:400]}"
    if wanted.what == REFUSED:
        return f"ran, where the table says: {wanted.text}"
    fallback = [text for text in found.errors.said if "as TRL does" in text or "as without fastpref" in text]
    if bool(fallback) != (wanted.what == HOST) or not all(wanted.text in text for text in fallback):
        return f"said {fallback}"
    if wanted.what == HOST:
        return None  # its numbers are its own
    if is_tight(cell):
        limits = FP32
    else:
        own = run.own_errors(cell, folder)
        limits = (math.inf, SPREAD * own.gradients)  # a loss may be right by chance
    within = all(error <= limit for error, limit in zip(found.errors[:2], limits, strict=True))
    return None if within else f"errors {found.errors[:2]}, want at most {limits}"


def is_tight(cell: Cell) -> bool:
    return cell.precision == "fp32" and (cell.trains != "qlora" or cell.host in ("mixin", "loop"))  # TRL's are in bf16


@pytest.mark.parametrize("group", groups())
def test_as_the_table_says(group, tmp_path) -> None:
    tried = groups()[group]
    alone = [cell for cell in tried if cell.ranks == "one"]
    found = {cell: run.attempt(cell, tmp_path / str(cell)) for cell in alone}
    if len(alone) < len(tried):
        found |= ranks.launch([cell for cell in tried if cell.ranks != "one"])
    faults = {str(cell): fault(cell, result, tmp_path) for cell, result in found.items()}
    assert not {cell: text for cell, text in faults.items() if text is not None}
    half = [
        result.errors.gradients / run.own_errors(cell, tmp_path).gradients
        for cell, result in found.items()
        if result.errors is not None and outcome(cell).what != HOST and not is_tight(cell)
    ]
    if len(half) >= 16:
        assert math.exp(sum(map(math.log, half)) / len(half)) <= MEAN


def test_the_covering_cells_hold_every_pair() -> None:
    possible = [cell for cell in cells() if outcome(cell).what != ABSENT]
    pairs = [
        {pair for cell in some for pair in itertools.combinations(enumerate(cell), 2)}
        for some in (possible, covering())
    ]
    assert pairs[0] == pairs[1]
    assert {value for cell in covering() for value in cell} == {value for axis in AXES.values() for value in axis}
