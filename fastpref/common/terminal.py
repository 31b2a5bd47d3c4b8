"""What is shown on a terminal while something runs, and what takes its place where there is none."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

LINES = 10  # of a whole run, where there is no terminal


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def hide_library_bars() -> None:
    """Of transformers, whose weights load in seconds, and where there is no terminal of `datasets` too."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not sys.stderr.isatty():
        with suppress(ImportError):
            from datasets import disable_progress_bars

            disable_progress_bars()


def live_bar() -> Any:
    """Of rich, without tasks; None where it is not installed."""
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
