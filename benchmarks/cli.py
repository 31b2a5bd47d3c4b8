"""The command behind `fastpref bench` and `python -m benchmarks`: runs suites, shows records, compares them."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import compare, peers, record, suite
from fastpref.common.files import check_writable
from fastpref.common.terminal import INTERRUPTED

EXAMPLES = """examples:
  fastpref bench --quick                     every suite in seconds, and a picture
  fastpref bench head --json results/        one suite at full size, recorded
  fastpref bench head --list                 its cases
  fastpref bench compare A.json B.json       two records; or two commits with records in benchmarks/results/
  fastpref bench report results/             Markdown, PNGs and one HTML page of the records in a folder
"""
# what is no suite, each with options of its own: python -m benchmarks NAME --help
TOOLS = (
    "distillation", "experiments", "hosts", "kl_gradients", "long_context", "resources", "rlhf", "rl_step", "roofline",
    "trainers", "tune", "vision",
)  # fmt: skip
REPEATS = {"cpu": 5, "cuda": 20}
QUICK_REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("what", nargs="*", metavar="SUITE", help=f"of {', '.join(suite.NAMES)} (default: all); or compare A B; "
        "or report FOLDER")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="small sizes: shows that everything runs, and roughly how fast")
    add("--only", metavar="TEXT", help="the cases whose label contains this")
    add("--providers", metavar="A,B", help="these only, by their names in the tables")
    add("--repeats", type=int, help=f"rounds (default: {REPEATS['cpu']} on a CPU, {REPEATS['cuda']} on CUDA)")
    add("--seconds", type=float, help="start no case after this many")
    add("--no-memory", dest="memory", action="store_false", help="time alone")
    add(
        "--json",
        type=Path,
        metavar="PATH",
        help="write the records into this folder, or one suite's to this .json file",
    )
    add("--report", type=Path, metavar="DIR", help="write Markdown, PNGs and one HTML page there")
    add("--list", action="store_true", help="print the cases and stop")


def run(args: argparse.Namespace) -> int:
    try:
        if args.what[:1] == ["compare"]:
            if len(args.what) != 3:
                raise ValueError(f"compare: got {len(args.what) - 1} arguments, want two records or two commits")
            print(compare.main(*args.what[1:]))
            return 0
        if args.what[:1] == ["report"]:
            from benchmarks import report

            return report.main([*args.what[1:], *(["--out", str(args.report)] if args.report else [])])
        return measure(args)
    except ValueError as error:
        print(f"fastpref bench: {error}", file=sys.stderr)
        return 2
    except suite.RedGate as error:
        print(f"fastpref bench: the gate is red, nothing is reported: {error}", file=sys.stderr)
        return 1


def _chosen(args: argparse.Namespace) -> dict[str, list]:
    """Suite name -> its cases that were asked for."""
    names = args.what or list(suite.NAMES)
    if unknown := [name for name in names if name not in suite.NAMES]:
        raise ValueError(f"suite: got {', '.join(unknown)}, want of {', '.join(suite.NAMES)}, compare or report")
    size = "quick" if args.quick else args.device
    found = {name: list(suite.load(name).cases[size]) for name in names}
    if args.only:
        found = {name: [c for c in cases if args.only in c.label] for name, cases in found.items()}
    if not any(found.values()):
        raise ValueError(f"--only: got {args.only!r}, want part of a case's name (see --list)")
    return {name: cases for name, cases in found.items() if cases}


def _providers(names: str, suites: Iterable[str]) -> tuple[str, ...]:
    known = set(peers.NAMES)
    for one in map(suite.load, suites):
        known |= set(one.build(one.cases["small"][0], torch.device("cpu")).providers)
    wanted = tuple(names.split(","))
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--providers: got {', '.join(unknown)}, want of {', '.join(sorted(known))}")
    return wanted


def measure(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but PyTorch finds no CUDA device here")
    chosen = _chosen(args)
    if args.list:
        for name, cases in chosen.items():
            print(name, *(f"  {case.label}" for case in cases), sep="\n")
        return 0
    if args.json and args.json.suffix == ".json" and len(chosen) > 1:
        raise ValueError(f"--json: got the file {args.json} for {len(chosen)} suites, want a folder")
    if args.json:
        check_writable("--json", args.json if args.json.suffix == ".json" else args.json / "record.json")
    repeats = args.repeats or (QUICK_REPEATS if args.quick else REPEATS[device.type])
    providers = None if args.providers is None else _providers(args.providers, chosen)
    deadline = None if args.seconds is None else time.monotonic() + args.seconds
    save = None if args.json is None else functools.partial(record.write, path=args.json)
    options = suite.Options(device, repeats, args.quick, providers, args.memory, deadline, save)
    records = []
    for name, cases in chosen.items():
        begin = time.monotonic()
        known = suite.load(name)
        parts = [name, device.type, *(["quick"] if args.quick else [])]
        found = suite.run(known, cases, options, "-".join(parts))
        print(f"\n## {name}: {known.title} ({time.monotonic() - begin:.0f} s)\n\n{record.table(found)}", flush=True)
        if args.json:
            print(f"\nwritten to {record.write(found, args.json)}")
        records.append(found)
        if suite.INTERRUPTED in found["absent"].values():
            return INTERRUPTED
    show(records, args.report or (Path("bench-report") if args.quick else None))
    return 0


def show(records: list[record.Record], folder: Path | None) -> None:
    from benchmarks import report

    if text := report.bars(records):
        print(f"\n{text}")
    if folder is not None:
        try:
            print(f"\nreport: {report.write(records, folder)}")
        except SystemExit as error:
            print(f"\n{error}")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in TOOLS:
        return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="fastpref bench", description="Measure fastpref, eager PyTorch and the peers."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))
