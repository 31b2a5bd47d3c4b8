"""`fastpref bench`: runs the benchmark suites. They live in the repository, not in the installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HOW = (
    "fastpref bench: the benchmark suites are part of the repository, not of the installed package; clone it and run "
    "`pip install --editable .` there, or `python -m benchmarks` in it"
)


def _suites() -> ModuleType:
    """The module `benchmarks.cli` of the checkout that fastpref is imported from."""
    if not (ROOT / "benchmarks" / "cli.py").is_file():
        raise SystemExit(HOW)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # last: nothing in the checkout may shadow an installed package
    return importlib.import_module("benchmarks.cli")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _suites().add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return _suites().run(args)
