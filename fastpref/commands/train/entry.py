"""`fastpref train METHOD`: a complete training run in one command. What it does is in `fastpref.commands.train.job`."""

from __future__ import annotations

import argparse
import sys

METHODS = ("dpo", "ipo", "kto", "orpo", "cpo", "simpo", "distill", "reward", "prm", "rloo", "grpo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="`fastpref train METHOD --help` lists them"
    )


def run(args: argparse.Namespace) -> int:
    try:
        from fastpref.commands.train import job as command

        job = command.prepare(args.method, args.options)
    except ImportError as error:
        hint = "" if "pip install" in str(error) else "; run `pip install 'fastpref[train]'`"
        return _refuse(f"{error}{hint}")
    except (ValueError, TypeError, OSError) as error:
        return _refuse(str(error))
    return command.run(job)


def _refuse(reason: str) -> int:
    print(f"fastpref train: {' '.join(reason.split())}", file=sys.stderr)
    return 2
