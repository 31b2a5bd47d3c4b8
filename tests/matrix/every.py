"""Every cell of the table, some hours of them, with results that are kept: `make matrix`.

    python -m tests.matrix.every RESULTS.jsonl                          all
    python -m tests.matrix.every RESULTS.jsonl host=patch ranks=ddp,fsdp2    of these values

It adds a line a cell to RESULTS.jsonl, and leaves out the cells that the file has: stopped, it goes on. Exit status 1
if a cell does not do what the table says. What the page of the documentation says of it is a record:

    python -m tests.matrix.every --record RECORD.json COMMIT RESULTS.jsonl [RESULTS.jsonl ...]
"""

from __future__ import annotations

import datetime
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # as the tests' conftest does

import torch

from benchmarks.record import machine, versions
from tests.matrix import ranks, run, verdict
from tests.matrix.table import ABSENT, AXES, Cell, cells, outcome

CHUNK = 20  # cells of one launch


def chosen(arguments: list[str]) -> list[Cell]:
    """In an order that mixes them: what is wrong with a value shows early."""
    wanted = {axis: tuple(values) for axis, values in AXES.items()}
    for argument in arguments:
        axis, _, values = argument.partition("=")
        if axis not in AXES:
            raise SystemExit(f"got {axis!r}, want one of {', '.join(AXES)}")
        wanted[axis] = tuple(values.split(","))
        if not set(wanted[axis]) <= set(AXES[axis]):
            raise SystemExit(f"{axis}: got {values!r}, want some of {', '.join(AXES[axis])}")
    found = [
        cell for cell in cells()
        if outcome(cell).what != ABSENT and all(getattr(cell, axis) in values for axis, values in wanted.items())
    ]  # fmt: skip
    random.Random(0).shuffle(found)
    return found


def attempted(chunk: list[Cell]) -> dict[Cell, run.Found]:
    if chunk[0].ranks != "one":
        return ranks.launch(chunk)
    with tempfile.TemporaryDirectory() as folder:
        return {cell: run.attempt(cell, Path(folder) / str(cell)) for cell in chunk}


def results(chunk: list[Cell]) -> Iterator[tuple[Cell, run.Found]]:
    """Halves a chunk whose launch died, until the cell is found that it died of."""
    try:
        yield from attempted(chunk).items()
    except AssertionError as error:
        if len(chunk) == 1:
            yield chunk[0], run.Found(None, f"the launch died: {str(error)[-600:]}")
        else:
            yield from results(chunk[: len(chunk) // 2])
            yield from results(chunk[len(chunk) // 2 :])


def record(cell: Cell, found: run.Found, folder: Path) -> dict[str, Any]:
    errors = None if found.errors is None else {"loss": found.errors.loss, "gradients": found.errors.gradients}
    try:
        fault = verdict.fault(cell, found, folder)
        ratio = None if fault else verdict.ratio(cell, found, folder)
    except AssertionError as error:
        fault, ratio = str(error), None
    return {"cell": str(cell), "wanted": outcome(cell).what, "fault": fault, "errors": errors, "ratio": ratio}


def summary(records: list[dict[str, Any]]) -> str:
    faults = [entry for entry in records if entry["fault"]]
    good = Counter(entry["wanted"] for entry in records if not entry["fault"])
    lines = [f"{entry['cell']}: {entry['fault']}" for entry in faults]
    lines.append(f"{len(records):,} cells: {len(records) - len(faults):,} as the table says, {len(faults):,} not")
    lines += [f"  {what}: {number:,}" for what, number in good.most_common()]
    if half := [entry["ratio"] for entry in records if entry["ratio"]]:
        lines.append(
            f"  gradients in half precision, error over the host's own: {verdict.mean(half):.2f} "
            f"(geometric mean of {len(half):,}, at most {max(half):.2f})"
        )
    return "\n".join(lines)


def write_record(path: Path, commit: str, results: list[str]) -> None:
    """Counts of the cells tried: by ranks and by what they did, faults by name."""
    records = [entry for file in results for entry in map(json.loads, Path(file).read_text().splitlines())]
    tried: dict[str, Counter[str]] = {ranks_: Counter() for ranks_ in AXES["ranks"]}
    for entry in records:
        tried[entry["cell"].rsplit("-", 1)[1]]["fault" if entry["fault"] else entry["wanted"]] += 1
    half = [entry["ratio"] for entry in records if entry["ratio"]]
    wanted = Counter(cell.ranks for cell in cells() if outcome(cell).what != ABSENT)
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "commit": commit, "machine": machine(),
        "versions": versions(), "cells": {ranks_: dict(counts) for ranks_, counts in tried.items()},
        "wanted": dict(wanted), "faults": {entry["cell"]: entry["fault"] for entry in records if entry["fault"]},
        "half_precision": {"cells": len(half), "mean_ratio": round(verdict.mean(half), 3), "max_ratio": max(half)},
    }  # fmt: skip
    path.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str]) -> int:
    if argv[0] == "--record":
        write_record(Path(argv[1]), argv[2], argv[3:])
        return 0
    path, wanted = Path(argv[0]), chosen(argv[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {entry["cell"]: entry for entry in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    missing = [cell for cell in wanted if str(cell) not in known]
    alone, several = ([cell for cell in missing if (cell.ranks == "one") == one] for one in (True, False))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, path.open("a") as file:
        for some in (alone, several):
            for start in range(0, len(some), CHUNK):
                for cell, found in results(some[start : start + CHUNK]):
                    known[str(cell)] = record(cell, found, Path(folder))
                    print(json.dumps(known[str(cell)]), file=file, flush=True)
    records = [known[str(cell)] for cell in wanted]
    print(summary(records))
    return int(any(entry["fault"] for entry in records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
