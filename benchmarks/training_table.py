"""The README's table of what `training_runs.sh` recorded: `python -m benchmarks.training_table [FOLDER]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import RESULTS

METHODS = ("reward", "dpo", "kto", "simpo", "orpo")
COLUMNS = {  # header -> the names under which methods log it on held-out data
    "loss": ("eval_loss",),
    "pairs ranked right": ("eval_accuracy", "eval_rewards/accuracies"),
    "margin": ("eval_margin", "eval_rewards/margins"),
}


def _cell(run: dict[str, Any], header: str) -> str:
    """A metric on held-out data, before -> after.

    A policy that is its own reference ranks nothing before it is trained.
    """

    def text(when: str) -> str:
        found = run["evaluations"][when]
        value = next((found[name] for name in COLUMNS[header] if name in found), None)
        if value is None:
            return ""
        return f"{value:.0%}" if header == "pairs ranked right" else f"{value:.3f}"

    before, after = text("before"), text("after")
    return f"{before or '–'} → {after}" if after else "–"  # noqa: RUF001


def table(folder: Path = RESULTS / "training") -> str:
    lines = [f"| method | {' | '.join(COLUMNS)} | steps | |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for method in METHODS:
        run = json.loads((folder / method / "training.json").read_text())
        cells = " | ".join(_cell(run, header) for header in COLUMNS)
        plot = f"[plot](benchmarks/results/training/{method}/summary.png)"
        lines.append(f"| {method} | {cells} | {run['steps']} | {plot} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*map(Path, sys.argv[1:])))
