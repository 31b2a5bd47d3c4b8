"""Every way to train of the table runs, with the loss and gradients of the same model in fp64, or does what it says.

Cells that hold every pair of values; all cells with `make matrix` (every.py).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools

import pytest

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)
pytest.importorskip("bitsandbytes")

from tests.matrix import every, ranks, run, verdict
from tests.matrix.table import ABSENT, AXES, Cell, cells, covering, outcome

pytestmark = pytest.mark.filterwarnings("ignore")


def groups() -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in covering():
        found.setdefault(cell.host if cell.ranks == "one" else "two ranks", []).append(cell)
    return found


@pytest.mark.parametrize("group", groups())
def test_as_the_table_says(group, tmp_path) -> None:
    tried = groups()[group]
    alone = group != "two ranks"
    found = {cell: run.attempt(cell, tmp_path / str(cell)) for cell in tried} if alone else ranks.launch(tried)
    faults = {str(cell): verdict.fault(cell, result, tmp_path) for cell, result in found.items()}
    assert not {cell: text for cell, text in faults.items() if text is not None}
    ratios = [verdict.ratio(cell, result, tmp_path) for cell, result in found.items()]
    half = [ratio for ratio in ratios if ratio is not None]
    if len(half) >= 16:
        assert verdict.mean(half) <= verdict.MEAN


def test_the_covering_cells_hold_every_pair() -> None:
    possible = [cell for cell in cells() if outcome(cell).what != ABSENT]
    pairs = [
        {pair for cell in some for pair in itertools.combinations(enumerate(cell), 2)}
        for some in (possible, covering())
    ]
    assert pairs[0] == pairs[1]
    assert {value for cell in covering() for value in cell} == {value for axis in AXES.values() for value in axis}


def test_all_cells_go_on_where_they_were_stopped(monkeypatch, tmp_path, capsys) -> None:
    """A launch that dies costs its cell alone; what is known is not tried again."""
    tried: list[Cell] = []

    def launch(chunk: list[Cell]) -> dict[Cell, run.Found]:
        tried.extend(chunk)
        if any(cell.reference == "explicit" for cell in chunk):
            raise AssertionError("a rank died")
        return {cell: run.Found(run.Errors(0.0, 0.0, [])) for cell in chunk}

    monkeypatch.setattr(every, "attempted", launch)
    chosen = ["host=loop", "trains=all,lora", "precision=fp32", "ranks=ddp"]
    assert every.main([str(tmp_path / "results.jsonl"), *chosen]) == 1
    printed = capsys.readouterr().out
    assert "8 cells: 6 as the table says, 2 not" in printed and printed.count("explicit") == 2
    assert "a rank died" in printed
    tried.clear()
    assert every.main([str(tmp_path / "results.jsonl"), *chosen]) == 1 and not tried
    with pytest.raises(SystemExit, match="host: got 'loops', want some of patch, subclass"):
        every.main([str(tmp_path / "results.jsonl"), "host=loops"])
