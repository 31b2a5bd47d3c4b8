"""What commands show on a terminal while they run: headings, progress bars; their exit status when stopped."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

INTERRUPTED = 130  # exit status of a command that was stopped by Ctrl-C, as shells have it
LINES = 10  # where there is no terminal, a whole run prints at most so many lines of progress


def heading(text: str) -> None:
    """Print a line that begins a part of a command's output."""
    print(f"\n== {text}", flush=True)


def hide_library_bars() -> None:
    """Turn off transformers' progress bars, and without a terminal those of `datasets` too.

    Weights load in seconds, so a bar for them says nothing.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not sys.stderr.isatty():
        with suppress(ImportError):
            from datasets import disable_progress_bars

            disable_progress_bars()


def live_bar() -> Any:
    """A progress display of rich that has no tasks yet. None where rich is not installed."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column
    except ImportError:
        return None
    fixed = Column(no_wrap=True)  # on a narrow terminal the text takes more lines
    return Progress(
        MofNCompleteColumn(table_column=fixed), BarColumn(bar_width=20, table_column=fixed),
        TextColumn("{task.description}", table_column=Column(no_wrap=False)), TimeRemainingColumn(table_column=fixed),
    )  # fmt: skip
