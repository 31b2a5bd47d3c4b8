"""`fastpref validate`: every operator x dtype x backend x input family against fp64, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from fastpref.common.files import check_writable
from fastpref.common.terminal import INTERRUPTED
from fastpref.validate import accuracy, beyond_int32
from fastpref.validate.cases import OPERATORS
from fastpref.validate.inputs import LARGE_VOCABULARIES
from fastpref.validate.machine import machine
from fastpref.validate.operator import Operator
from fastpref.validate.policy import Verdict
from fastpref.validate.run import Row, run_case, using

SCHEMA = 1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUICK_FAMILIES = ("random", "masked", "odd", "empty", "integers")
LARGE_BYTES = 12 << 30
COLUMNS = ("operator", "backend", "dtype", "results", "worst family", "result", "error", "ideal", "ratio", "verdict")
WIDTHS = (32, 8, 8, 7, 30, 16, 8, 8, 6, 7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write every result and the machine as JSON; '-' for stdout")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--backend", choices=("triton", "portable"), help="default: all that run on the device")
    parser.add_argument("--op", metavar="SUBSTRING", default="", help="only operators whose name contains this")
    parser.add_argument("--quick", action="store_true", help="fewer input families, and one dtype where rows overlap")
    parser.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="processes that share the cases (default: %(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="one line a result instead of the worst of each group")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, want at least 1")
    return value


class Plan(NamedTuple):
    """What runs and, in words, what does not."""

    device: torch.device
    backends: list[str]
    interpreted: bool
    notes: list[str]


def plan(device_name: str | None, backend: str | None) -> Plan:
    """What can run on this machine."""
    device = torch.device(device_name or ("cuda" if torch.cuda.is_available() else "cpu"))
    available, notes, interpreted = ["portable"], [], False
    if importlib.util.find_spec("triton") is None:
        notes.append("triton: not run here (not installed)")
    elif device.type == "cuda":
        available.append("triton")
        notes.append("torch's TF32 and reduced-precision reductions are off: their roundings depend on the shape")
    elif os.environ.get("TRITON_INTERPRET", "0") == "1":
        available.append("triton")
        interpreted = True
        notes.append("triton: interpreted; bf16 is not run, since the interpreter truncates instead of rounding")
    else:
        notes.append("triton: not run here (no GPU; set TRITON_INTERPRET=1 to interpret the kernels)")
    return Plan(device, [b for b in available if backend in (None, b)], interpreted, notes)


@contextlib.contextmanager
def plain_products(device: torch.device) -> Iterator[None]:
    """Makes matrix products round where the ideal says they do.

    On a CPU it also uses one thread, since the tensors are small.
    """
    if device.type != "cuda":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        return
    flags = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(flags, name) for name in names}
    try:
        for name in names:
            setattr(flags, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(flags, name, value)


def _backends(op: Operator, family: str, dtype: torch.dtype, p: Plan) -> list[str]:
    backends = list(p.backends)
    if p.interpreted and "triton" in backends:
        repeats = op.composed and (family, dtype) != ("random", torch.float32)
        if dtype == torch.bfloat16 or repeats:
            backends.remove("triton")
    return backends


def cases(p: Plan, pattern: str, quick: bool) -> Iterator[tuple[Operator, str, torch.dtype, list[str]]]:
    """Yields (operator, family, dtype, backends) of every case of the plan."""
    for op in OPERATORS:
        if pattern not in op.name:
            continue
        families: tuple[str, ...] = op.families
        if quick:
            families = tuple(f for f in op.families if f in QUICK_FAMILIES)
        elif op.large and p.device.type == "cuda" and torch.cuda.mem_get_info(p.device)[0] > LARGE_BYTES:
            families = (*op.families, *(f"V={v}" for v in LARGE_VOCABULARIES))
        for dtype in DTYPES:
            if dtype.itemsize == 2 and not op.half:
                continue
            if quick and op.composed and dtype not in (torch.float32, torch.bfloat16):
                continue
            for family in families[:1] if quick and op.composed else families:
                yield op, family, dtype, _backends(op, family, dtype, p)


def _number(x: float | None, form: str) -> str:
    return "-" if x is None or x == 0 else "inf" if math.isinf(x) else format(x, form)


def _severity(row: Row) -> float:
    v = row.verdict
    return math.inf if not v.passed else v.error / v.limit if v.limit else 0.0


class Table:
    """Prints aligned lines: one for each group with its worst result, or with `verbose` one for each result."""

    def __init__(self, verbose: bool, file: Any) -> None:
        self.verbose, self.file = verbose, file
        self.line(COLUMNS)

    def line(self, cells: tuple[str, ...]) -> None:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), file=self.file)

    def result(self, row: Row, name: str, count: int) -> None:
        v = row.verdict
        numbers = (_number(v.error, ".1e"), _number(v.ideal, ".1e"), _number(v.ratio, ".2f"))
        case = row.family if name == row.op else f"{row.op.split(' from ')[0]}: {row.family}"
        head = (name, row.backend, row.dtype, str(count), case, row.output)
        self.line((*head, *numbers, "ok" if v.passed else "FAIL"))

    def group(self, name: str, rows: list[Row]) -> None:
        if self.verbose:
            for row in rows:
                self.result(row, row.op, 1)
        else:
            self.result(max(rows, key=_severity), name, len(rows))
        for row in rows:
            if not row.verdict.passed:
                what = f"{row.op}, {row.backend}, {row.dtype}, {row.family}, {row.output}"
                print(f"    FAIL {what}: {row.verdict.detail}", file=self.file, flush=True)


Case = tuple[Operator, str, torch.dtype, list[str]]


def evaluate(p: Plan, pattern: str, quick: bool, table: Table, jobs: int = 1) -> Iterator[Row]:
    """All results, in the order of the operators. A group is printed as soon as it is complete."""
    groups: dict[str, list[Case]] = {}
    for case in cases(p, pattern, quick):
        if case[-1]:
            groups.setdefault(case[0].group or case[0].name, []).append(case)
    with _workers(p, jobs) as results_of:
        pending = {
            name: [functools.partial(_or_failed, results_of(case), case, p.device) for case in members]
            for name, members in groups.items()
        }
        for name, results in pending.items():
            found: dict[tuple[str, str], list[Row]] = {}
            for rows in results:
                for row in rows():
                    found.setdefault((row.backend, row.dtype), []).append(row)
                    yield row
            for key in sorted(found, key=lambda key: key[0]):
                table.group(name, found[key])


def _or_failed(rows: Callable[[], list[Row]], case: Case, device: torch.device) -> list[Row]:
    """The rows of a case. If all of it failed, with its truth or with its process, that is a result too."""
    try:
        return rows()
    except Exception as error:
        operator, family, dtype, backends = case
        dtype_name = str(dtype).removeprefix("torch.")
        return [_failure(error, operator.name, backend, device, dtype_name, family) for backend in backends]


def _failure(error: Exception, op: str, backend: str, device: torch.device, dtype: str, family: str) -> Row:
    verdict = Verdict("-", math.inf, 0.0, 0.0, False, f"{type(error).__name__}: {error}")
    return Row(op, backend, device.type, dtype, family, "-", verdict)


@contextlib.contextmanager
def _workers(p: Plan, jobs: int) -> Iterator[Callable[[Case], Callable[[], list[Row]]]]:
    """A function that starts a case and returns one that waits for its rows.

    Cases run here one after the other, or in `jobs` processes. Of those of a large vocabulary only so many run at once
    that they take a third of the device's memory.
    """
    if jobs == 1:
        yield lambda case: functools.partial(_results, OPERATORS.index(case[0]), *case[1:], p.device)
        return
    context = multiprocessing.get_context("spawn")
    free = torch.cuda.mem_get_info(p.device)[0] if p.device.type == "cuda" else 0
    turns = context.Semaphore(max(1, free // (3 * LARGE_BYTES)))
    with ProcessPoolExecutor(jobs, context, _share, (turns,)) as pool:
        try:
            yield lambda case: pool.submit(_in_worker, OPERATORS.index(case[0]), *case[1:], p.device).result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _results(index: int, family: str, dtype: torch.dtype, backends: list[str], device: torch.device) -> list[Row]:
    return list(run_case(OPERATORS[index], family, dtype, device, backends))


_large_turns: Any = contextlib.nullcontext()  # of a worker: what lets a few large cases run at once


def _share(turns: Any) -> None:
    global _large_turns
    _large_turns = turns


def _in_worker(index: int, family: str, dtype: torch.dtype, backends: list[str], device: torch.device) -> list[Row]:
    with _as_measured(device), _large_turns if family.startswith("V=") else contextlib.nullcontext():
        try:
            return _results(index, family, dtype, backends, device)
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what PyTorch keeps for this process, the others lack


@contextlib.contextmanager
def _as_measured(device: torch.device) -> Iterator[None]:
    with plain_products(device), warnings.catch_warnings():
        # NumPy, under Triton's interpreter, warns of arithmetic on lanes that the kernel then masks off
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        yield


def _print_accuracy(results: list[dict[str, Any]], file: Any) -> None:
    first = results[0]
    size = f"d = {accuracy.HIDDEN}, V = {accuracy.VOCAB}, {first['rows']} rows"
    print(f"\nrms error of bf16 log-probs against fp64 ({size}), measured in this run:", file=file)
    columns = ("a token", f"p > {accuracy.CONFIDENT}", f"sum of {first['tokens']}")
    print(f"  {'':34}" + "".join(f"{name:>12}" for name in columns), file=file)
    for r in results:
        values = (r["token_rms"], r["confident_token_rms"], r["sequence_rms"])
        print(f"  {r['method']:34}" + "".join(f"{value:12.1e}" for value in values), file=file)


def _as_json(row: Row) -> dict[str, Any]:
    v = row.verdict

    def finite(x: float | None) -> float | None:
        return x if x is not None and math.isfinite(x) else None

    numbers = {"error": finite(v.error), "ideal_error": finite(v.ideal), "ratio": finite(v.ratio)}
    case = {k: value for k, value in row._asdict().items() if k != "verdict"}
    return case | numbers | {"limit": finite(v.limit), "rule": v.rule, "passed": v.passed, "detail": v.detail}


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    out = sys.stderr if args.json == "-" else sys.stdout
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: got cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    try:
        check_writable("--json", None if args.json == "-" else args.json)
    except ValueError as error:
        print(f"fastpref validate: {error}", file=sys.stderr)
        return 2
    p = plan(args.device, args.backend)
    this = machine(p.device)
    described = ", ".join(f"{k} {this[k]}" for k in ("fastpref", "torch", "triton") if this[k])
    print(f"fastpref validate on {this['device']}: {described}", file=out)
    for note in p.notes:
        print(note, file=out)
    print(file=out)
    rows: list[Row] = []
    measured: list[dict[str, Any]] = []
    interrupted = False
    with _as_measured(p.device):
        table = Table(args.verbose, out)
        try:
            for row in evaluate(p, args.op, args.quick, table, args.jobs):
                rows.append(row)
            if p.device.type == "cuda" and not args.quick and not args.op:
                rows += _beyond_int32(p, table, out)
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: what follows is what was done until then", file=out)
    if not args.op and rows and not interrupted:
        with using(p.backends[-1] if p.device.type == "cuda" else "portable"):  # bf16, which no interpreter rounds
            measured = accuracy.compare(p.device, 512 if args.quick else 1024)
        _print_accuracy(measured, out)
    if not rows:
        print(f"nothing to run: no operator matches --op {args.op!r} on the backends {p.backends}", file=sys.stderr)
        return 2
    failed = sum(not row.verdict.passed for row in rows)
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} results, {failed} failed, {seconds:.0f} s", file=out)
    if args.json:
        record = {
            "schema": SCHEMA, "machine": this, "notes": p.notes, "seconds": round(seconds, 1),
            "interrupted": interrupted, "passed": failed == 0 and not interrupted, "failed": failed,
            "rows": [_as_json(row) for row in rows], "accuracy": measured,
        }  # fmt: skip
        text = json.dumps(record, indent=1, allow_nan=False)
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    return INTERRUPTED if interrupted else 1 if failed else 0


def _beyond_int32(p: Plan, table: Table, out: Any) -> list[Row]:
    free, _ = torch.cuda.mem_get_info(p.device)
    if free < beyond_int32.BYTES_NEEDED:
        print(f"N*V > 2^31: not run here (needs {beyond_int32.BYTES_NEEDED >> 30} GiB free)", file=out)
        return []
    try:
        rows = list(beyond_int32.check(p.device, p.backends))
    except Exception as error:
        rows = [_failure(error, "N*V > 2^31", ", ".join(p.backends), p.device, "bfloat16", "N*V > 2^31")]
    for row in rows:
        table.group(row.op, [row])
    return rows
