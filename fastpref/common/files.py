"""Files that are written when a long run is over."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(option: str, path: str | os.PathLike[str] | None) -> None:
    """Before the run: makes the folder of a file that is written at its end. None is no file.

    Raises:
        ValueError: it could not be written; names the option.
    """
    if path is None:
        return
    file = Path(path)
    problem = "it is a folder" if file.is_dir() else None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            problem = "it may not be written to"
    except OSError as error:
        problem = f"its folder cannot be made: {error.strerror}"
    if problem is not None:
        raise ValueError(f"{option}: got {file}, want a file that can be written: {problem}")
