"""What the commands of online learning share: errors in one line, types of arguments, a progress bar."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from fastpref.common import terminal


def command(name: str) -> Callable[[Callable[[argparse.Namespace], int]], Callable[[argparse.Namespace], int]]:
    """A decorator: bad input becomes one line and exit status 2, a stop by the user exit status 130."""

    def decorate(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
        @functools.wraps(run)
        def guarded(args: argparse.Namespace) -> int:
            try:
                return run(args)
            except ImportError as error:
                hint = "" if "pip install" in str(error) else "; run `pip install 'fastpref[train]'`"
                print(f"fastpref {name}: {error}{hint}", file=sys.stderr)
            except (ValueError, TypeError, OSError) as error:
                print(f"fastpref {name}: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print(f"fastpref {name}: stopped; the same command goes on from here", file=sys.stderr)
                return 130
            return 2

        return guarded

    return decorate


def at_least(kind: type, least: float, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of `kind` that is at least `least`, or more than it if `exclusive`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > least if exclusive else value >= least):
            raise argparse.ArgumentTypeError(f"got {text}, want {'more than' if exclusive else 'at least'} {least}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


class Progress:
    """A live bar on a terminal (if rich is installed), some ten plain lines elsewhere, nothing if not `shown`."""

    def __init__(self, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self._total, self._unit, self._done, self._first, self._shown = total, unit, done, done, shown
        self._bar = terminal.live_bar() if shown and sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int) -> None:
        """`done` more, now finished."""
        before, self._done = self._done, self._done + done
        speed = (self._done - self._first) / (time.perf_counter() - self._begin)
        text = f"{speed:,.1f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=done, description=text)
        elif self._shown and before * terminal.LINES // self._total < self._done * terminal.LINES // self._total:
            print(f"  {self._done:5d}/{self._total} {self._unit}  {text}", flush=True)
