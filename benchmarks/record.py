"""Records: what was measured, with everything needed to believe it or to measure it again.

    python -m benchmarks.record table FILE      prints a record as Markdown

A record is one JSON object:

    schema, suite, date, commit, dirty          which code, when
    machine, versions, settings                 on what, with what, how
    gate                                        one check per provider against fp64
    rows                                        case, provider, raw `seconds`, and what is known of the work:
                                                `peak_bytes`, `predicted_bytes` (by formula), `flops` and `bytes`
                                                (the least that the task takes), `dtype`, `axis` and `x`
    targets                                     the numbers to beat, met or not
    absent                                      who was not measured, and why
    limits                                      copy bandwidth and product rates of this machine in this run
                                                (absent or null: not measured)
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.limits import Limits
from benchmarks.measure import MIB, paired_ratio, quantile

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
GPU_FIELDS = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")

Record = dict[str, Any]
Row = dict[str, Any]


def _output_of(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        answer = _output_of("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
        values = (answer.splitlines()[0].split(", ")) if answer else [torch.cuda.get_device_name()]
        found["gpu"] = dict(zip(GPU_FIELDS, values, strict=False))
    return found


def versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in PACKAGES} | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def new(
    suite: str,
    *,
    settings: dict[str, Any],
    rows: list[Row],
    gate: list[dict[str, Any]] | None = None,
    targets: list[dict[str, Any]] | None = None,
    absent: dict[str, str] | None = None,
    limits: dict[str, Any] | None = None,
) -> Record:
    status = _output_of("git", "status", "--porcelain", "--", ":/", ":(exclude,top)benchmarks/results")  # itself
    return {
        "schema": SCHEMA,
        "suite": suite,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "gate": gate or [],
        "rows": rows,
        "targets": targets or [],
        "absent": absent or {},
        "limits": limits,
    }


def file_name(record: Record) -> str:
    """<date>-<machine>-<suite>-<commit>.json"""
    host = record["machine"]
    device = host["gpu"]["name"] if record["settings"].get("device") == "cuda" else f"{host['cores']}x {host['cpu']}"
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", device).lower()).strip("-")
    commit = (record["commit"] or "unknown")[:8] + ("-dirty" if record["dirty"] else "")
    return f"{record['date'][:10]}-{slug}-{record['suite']}-{commit}.json"


def write(record: Record, path: Path) -> Path:
    """Writes to the file `path`, or into the folder `path` under the record's own name."""
    if path.suffix != ".json":
        path.mkdir(parents=True, exist_ok=True)
        path = path / file_name(record)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def make(
    measure: Callable[[Any, Callable[[Record], object] | None], Record], table: Callable[[Record], str], args: Any
) -> Record:
    """Runs a benchmark that is no suite, prints its table, and writes its record to `args.json` if that is given.

    `measure(args, save)` calls `save`, if there is one, with what it has so far: what is killed keeps it.
    """
    found = measure(args, None if args.json is None else functools.partial(write, path=args.json))
    print("\n" + table(found))
    if args.json is not None:
        print(f"\n{write(found, args.json)}")
    return found


def read(path: Path) -> Record:
    record = json.loads(path.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: got schema {record.get('schema')!r}, want {SCHEMA}")
    return record


def read_folder(folder: Path) -> list[Record]:
    """The records among the JSON files of a folder, in the order of their names."""
    paths = [path for path in sorted(folder.glob("*.json")) if {"schema", "suite"} <= set(json.loads(path.read_text()))]
    return [read(path) for path in paths]


def find(rows: Sequence[Row], case: str, provider: str) -> Row | None:
    return next((row for row in rows if row["case"] == case and row["provider"] == provider), None)


def ratio(a: Row | None, b: Row | None, quantity: str) -> tuple[float, float] | None:
    """(value, best-of) of a/b in seconds or peak bytes. None where a side is missing."""
    if a is None or b is None:
        return None
    if quantity == "seconds":
        return paired_ratio(a["seconds"], b["seconds"])
    if a.get("peak_bytes") is None or b.get("peak_bytes") is None:
        return None
    value = a["peak_bytes"] / b["peak_bytes"]
    return value, value


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def floor(record: Record, row: Row) -> float | None:
    """The least seconds that the row's work can take on the record's machine.

    Its limits were measured in the same run.
    """
    limits = record.get("limits")
    if not limits or "dtype" not in row or not (row.get("flops") or row.get("bytes")):
        return None
    return Limits(**limits).seconds(row.get("flops", 0), row.get("bytes", 0), row["dtype"])


def _over(pair: tuple[float, float] | None) -> str:
    return "" if pair is None else f"{pair[0]:.2f} ({pair[1]:.2f})"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:.0f}"


def _cells(record: Record, row: Row) -> dict[str, str]:
    seconds, rows = row["seconds"], record["rows"]
    median = statistics.median(seconds)
    products, eager = (find(rows, row["case"], name) for name in ("products", "eager"))
    check = find(record["gate"], row["case"], row["provider"])
    memory = ratio(row, eager, "peak_bytes")
    least = floor(record, row)
    return {
        "case": row["case"],
        "what": row["provider"],
        "median, ms": milliseconds(median),
        "p20 to p80": f"{milliseconds(quantile(seconds, 0.2))} to {milliseconds(quantile(seconds, 0.8))}",
        "best": milliseconds(min(seconds)),
        "% of limit": "" if least is None else f"{100 * least / median:.0f}" if least > median / 200 else "<0.5",
        "time / products": _over(ratio(row, products, "seconds")),
        "eager time / time": _over(ratio(eager, row, "seconds")),
        "peak, MiB": _mib(row.get("peak_bytes")),
        "by formula": _mib(row.get("predicted_bytes")),
        "peak / eager": "" if memory is None else f"{memory[0]:.3f}",
        "TFLOP/s": f"{row['flops'] / median / 1e12:.3g}" if row.get("flops") else "",
        "GB/s": f"{row['bytes'] / median / 1e9:.4g}" if row.get("bytes") and not row.get("flops") else "",
        "gradient error": f"{max(check['errors'].values()):.1e}" if check and check["errors"] else "",
    }


def target_line(target: dict[str, Any]) -> str:
    sign = "at most" if target["at_most"] else "at least"
    name = f"{target['case']}: {target['quantity']} {sign} {target['limit']}"
    if target["value"] is None:
        return f"- not measured: {name}"
    return (
        f"- {'met' if target['met'] else 'NOT met'}: {name}; {target['value']:.3f} (best of each {target['best']:.3f})"
    )


def table(record: Record) -> str:
    """A record as Markdown: the rows, the targets, who is absent, and where it comes from.

    Columns that no row fills are left out.
    """
    cells = [_cells(record, row) for row in record["rows"]]
    columns = [name for name in (cells[0] if cells else {}) if any(c[name] for c in cells)]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)] if columns else []
    lines += [f"| {' | '.join(c[name] for name in columns)} |" for c in cells]
    lines += ["", *map(target_line, record["targets"])] if record["targets"] else []
    lines += ["", *(f"- absent: {name}: {why}" for name, why in record["absent"].items())] if record["absent"] else []
    return "\n".join([*lines, "", provenance(record)])


def provenance(record: Record) -> str:
    """Where a record comes from, in one line: when, where, which code, with what, at what limits."""
    host = record["machine"]
    on_gpu = record["settings"].get("device") == "cuda"
    where = host["gpu"]["name"] if on_gpu else f"{host['cpu']}, {host['cores']} cores"
    if on_gpu and "driver_version" in host["gpu"]:
        where += f", driver {host['gpu']['driver_version']}, SM clock {host['gpu'].get('clocks.sm')}"
    commit = (record["commit"] or "unknown")[:8] + (" with uncommitted changes" if record["dirty"] else "")
    have = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    limits = record.get("limits")
    rates = ""
    if limits:
        products = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in limits["flops_per_second"].items())
        rates = f"; limits measured: copy {limits['copy_bytes_per_second'] / 1e9:.4g} GB/s, products {products}"
    return f"{record['date'][:10]}, {where}, commit {commit}; {have}{rates}."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description="Read benchmark records.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("table", help="print a record as a Markdown table")
    command.add_argument("file", type=Path)
    print(table(read(parser.parse_args(argv).file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
