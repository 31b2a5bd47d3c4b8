"""The README's table of what is faster, from the newest record of each kind."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks import compare, plots, record
from benchmarks.record import MIB, Record

# kind in the record's file name -> (our provider, whom it is compared with)
KINDS = HEAD, TRAINERS, ALL_PAIRS, HOSTS = "head-cpu", "trainers", "all-pairs", "hosts-cpu"


def newest(kind: str, folder: Path = compare.RESULTS) -> Path:
    """The newest record of a kind, made without local changes.

    Raises:
        ValueError: there is none.
    """
    found = [(one["date"], path) for path in folder.glob(f"*-{kind}-*.json") if not (one := record.read(path))["dirty"]]
    if not found:
        raise ValueError(f"summary: got no record of {kind} in {folder.name}/, want one without local changes")
    return max(found)[1]


def table() -> str:
    """A Markdown table: times in seconds, memory in MiB, their ratios, and which record they are from."""
    lines = ["| | | fastpref | it | times as fast | of its memory |", "|---|---|---|---|---|---|"]
    head, trainers, all_pairs, hosts = (record.read(newest(kind)) for kind in KINDS)
    case = head["settings"]["cases"][0]["name"]
    for kind in ("trainable", "frozen"):
        rows = {p: record.find(head["rows"], f"{case}, {kind} head", p) for p in ("fastpref", "eager", "trl_compacted")}
        for peer, name in (("eager", "eager PyTorch"), ("trl_compacted", "TRL's fused head, scored rows")):
            lines.append(_line(f"DPO at the head, {kind}", name, rows["fastpref"], rows[peer], statistics.median))
    for found, what in ((trainers, "training step"), (all_pairs, "training step, 4 responses a prompt")):
        for theirs, ours in zip(found["rows"][::2], found["rows"][1::2], strict=True):
            case = theirs["case"].removesuffix(" reference")
            lines.append(_line(f"{what}, {case}", "TRL's `DPOTrainer`", ours, theirs, statistics.mean))
    for theirs, ours in zip(hosts["rows"][::2], hosts["rows"][1::2], strict=True):
        lines.append(_line("its own step, patched", theirs["case"], ours, theirs, statistics.mean))
    return "\n".join(lines)


def _line(what: str, name: str, ours: Any, theirs: Any, average: Any) -> str:
    if not ours or not theirs:
        return f"| {what} | {name} | not measured | | | |"
    times = [average(row["seconds"]) for row in (ours, theirs)]
    peaks = [row["peak_bytes"] / MIB for row in (ours, theirs)]
    cells = [f"{time:.2f} s, {peak:,.0f} MiB" for time, peak in zip(times, peaks, strict=True)]
    return f"| {what} | {name} | {' | '.join(cells)} | {times[1] / times[0]:.2f} | {peaks[0] / peaks[1]:.2f} |"


def sources() -> str:
    """Which records the table is from, on which machines, of which commits."""
    found = {kind: newest(kind) for kind in KINDS}
    return "; ".join(f"`{path.name}` ({plots.source(record.read(path))})" for path in found.values())


def block(picture: str) -> str:
    """What stands between the README's markers."""
    found: list[Record] = [record.read(newest(kind)) for kind in KINDS]
    missed = [t for one in found for t in one["targets"] if t["value"] is not None and not t["met"]]
    words = ""
    for target in missed:
        sign = "at most" if target["at_most"] else "at least"
        words += f" Target missed: {target['case']}, {target['quantity']} is {target['value']:.2f}, wanted {sign} "
        words += f"{target['limit']}."
    return (
        f"{table()}\n\nSmolLM2-135M, fp32, after a comparison of losses and gradients; records in "
        f"`benchmarks/results/`: {sources()}.{words}\n\n![a DPO step at the head: seconds by provider]({picture})"
    )
