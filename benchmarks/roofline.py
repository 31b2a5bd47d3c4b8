"""What each row kernel should take on an H100, by bytes and by instructions, beside what it took.

    python -m benchmarks.roofline [--rows 8192] [--record EXPERIMENTS.json]

Bytes are the passes over bf16 rows that reach memory, at 3.35 TB/s or at the record's copy bandwidth. Instructions are
those of the compiled loops for sm_90: an SM issues 4 warp instructions a cycle and evaluates 16 exponentials. Clock and
SMs are the data sheet's. Without a record, and where it has no such row, the measured column says so by a dash.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record, resources
from benchmarks.launches import Case, Variant, _row_logprob, _token_kl

BYTES_PER_SECOND, SMS, HERTZ = 3.35e12, 132, 1.755e9  # NVIDIA H100 SXM5 data sheet
ISSUES, SPECIALS, WARP = 4, 16, 32  # an SM and cycle: warp instructions, lanes of the multi-function unit; lanes a warp
VOCABULARIES = (32000, 49152, 50257, 65024, 128256, 151936, 262144)
ELEMENT = 2  # bytes, bf16


class Kernel(NamedTuple):
    name: str  # as the experiments record calls it
    call: Callable[..., None]
    options: dict[str, Any]
    passes: tuple[int, int]  # over one tensor of logits: (where a second sweep is found in the L2 cache, else)


KERNELS = (
    Kernel("forward", _row_logprob, {}, (1, 1)),
    Kernel("forward + U", _row_logprob, {"write_u": True}, (2, 3)),
    Kernel("exact KL", _token_kl, {}, (2, 2)),
    Kernel("exact KL + K", _token_kl, {"write_k": True}, (3, 5)),
)


class Row(NamedTuple):
    """What one kernel should take and took, in seconds."""

    kernel: str
    vocab: int
    passes: int
    by_bytes: float
    by_issue: float
    by_special: float
    measured: float | None

    @property
    def expected(self) -> float:
        return max(self.by_bytes, self.by_issue, self.by_special)


def row(kernel: Kernel, vocab: int, rows: int, bandwidth: float, found: record.Record | None) -> Row:
    case = Case(Variant(kernel.call, kernel.name, ("bf16",), kernel.options | {"vocab": vocab}), "bf16", "sm_90")
    launch = resources.recorded_launch(case)
    sweeps = resources.measure(case).sweeps()
    passes = kernel.passes[0 if launch.arguments["REREAD"] else 1]
    elements, cycles = rows * vocab, SMS * HERTZ
    return Row(
        kernel.name, vocab, passes, passes * elements * ELEMENT / bandwidth,
        elements * sum(s.instructions for s in sweeps) / WARP / ISSUES / cycles,
        elements * sum(s.special for s in sweeps) / SPECIALS / cycles,
        measured(found, kernel.name, vocab, rows),
    )  # fmt: skip


def measured(found: record.Record | None, name: str, vocab: int, rows: int) -> float | None:
    """The median of the record's row of this kernel as launched, scaled from its number of rows to `rows`."""
    if found is None or found["settings"]["sizes"]["vocab"] != vocab:
        return None
    taken = [r for r in found["rows"] if r["case"] == "rows" and r["provider"] == f"{name}, as launched"]
    return statistics.median(taken[0]["seconds"]) * rows / found["settings"]["sizes"]["rows"] if taken else None


def copy_bandwidth(found: record.Record | None) -> float:
    copy = None if found is None else record.find(found["rows"], "bandwidth", "copy")
    return BYTES_PER_SECOND if copy is None else copy["bytes"] / statistics.median(copy["seconds"])


def table(rows: list[Row]) -> str:
    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e3:.3f}"

    lines = [
        "| kernel | V | passes | ms by bytes | by issue | by exponentials | expected | measured |",
        "|---|" + "---:|" * 7,
    ]
    for r in rows:
        times = map(milliseconds, (r.by_bytes, r.by_issue, r.by_special, r.expected, r.measured))
        lines.append(f"| {r.kernel} | {r.vocab:,} | {r.passes} | " + " | ".join(times) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--record", type=Path, help="of benchmarks.experiments on an H100")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it to compile them")
    found = None if args.record is None else record.read(args.record)
    bandwidth = copy_bandwidth(found)
    rows = [row(kernel, vocab, args.rows, bandwidth, found) for kernel in KERNELS for vocab in VOCABULARIES]
    print(f"{args.rows} rows of bf16, H100, {bandwidth / 1e12:.2f} TB/s\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
