"""Compares two records of the same suite, row by row: `fastpref bench compare A B`.

A and B are record files, or commits whose records lie in `benchmarks/results/`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import record

RESULTS = record.ROOT / "benchmarks" / "results"


class Change(NamedTuple):
    """A row that two records have."""

    case: str
    provider: str
    seconds: tuple[float, float]  # medians
    peaks: tuple[int | None, int | None]

    @property
    def speed(self) -> float:
        """How many times as fast B is."""
        return self.seconds[0] / self.seconds[1]


def find(what: str, folder: Path = RESULTS) -> list[record.Record]:
    """The record of a file, or those of a commit (a prefix of at least 4 digits).

    Raises:
        ValueError: it is neither.
    """
    if Path(what).is_file():
        return [record.read(Path(what))]
    found = [r for r in record.read_folder(folder) if len(what) >= 4 and (r["commit"] or "").startswith(what.lower())]
    if not found:
        raise ValueError(f"compare: got {what!r}, want a record file or a commit with records in {folder.name}/")
    return found


def pairs(a: list[record.Record], b: list[record.Record]) -> Iterator[tuple[record.Record, record.Record]]:
    """Records of the same suite. Where a side has several, its latest counts."""
    latest = [{r["suite"]: r for r in sorted(side, key=lambda r: r["date"])} for side in (a, b)]
    for suite in latest[0]:
        if suite in latest[1]:
            yield latest[0][suite], latest[1][suite]


def changes(a: record.Record, b: record.Record) -> list[Change]:
    """The rows that both have, in the order of the first."""
    found = []
    for row in a["rows"]:
        other = record.find(b["rows"], row["case"], row["provider"])
        if other is not None:
            seconds = statistics.median(row["seconds"]), statistics.median(other["seconds"])
            found.append(
                Change(row["case"], row["provider"], seconds, (row.get("peak_bytes"), other.get("peak_bytes")))
            )
    return found


def same_machine(a: record.Record, b: record.Record) -> bool:
    keys = ("cpu", "cores", "threads", "gpu")
    return all((a["machine"].get(k) or {}) == (b["machine"].get(k) or {}) for k in keys[:-1]) and (
        (a["machine"].get("gpu") or {}).get("name") == (b["machine"].get("gpu") or {}).get("name")
    )


def table(a: record.Record, b: record.Record) -> str:
    """A Markdown table. Its last lines say what was compared, and the geometric mean of fastpref's speeds."""
    lines = ["| case | what | A, ms | B, ms | B is | A, MiB | B, MiB |", "|" + "---|" * 7]
    found = changes(a, b)
    for one in found:
        peaks = ["" if peak is None else f"{peak / record.MIB:.0f}" for peak in one.peaks]
        times = [record.milliseconds(s) for s in one.seconds]
        lines.append(
            f"| {one.case} | {one.provider} | {' | '.join(times)} | {one.speed:.2f}x as fast | {' | '.join(peaks)} |"
        )
    ours = [math.log(one.speed) for one in found if one.provider.startswith("fastpref")]
    lines += ["", f"A: {record.provenance(a)}", f"B: {record.provenance(b)}"]
    if ours:
        lines.append(f"fastpref, geometric mean: B is {math.exp(statistics.mean(ours)):.2f}x as fast.")
    if not same_machine(a, b):
        lines.append("NOT THE SAME MACHINE: the ratios compare machines too.")
    return "\n".join(lines)


def main(a: str, b: str) -> str:
    """Prints the comparison.

    Raises:
        ValueError: there is nothing to compare.
    """
    compared = [f"### {x['suite']}\n\n{table(x, y)}" for x, y in pairs(find(a), find(b))]
    if not compared:
        raise ValueError(f"compare: got {a!r} and {b!r}, which have no suite in common")
    return "\n\n".join(compared)
