"""Files that are written when a long run is over."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(option: str, path: str | os.PathLike[str] | None) -> None:
    """Find out before a run whether the file that is written at its end can be written. Makes its folder.

    Args:
        option: the option that named the file, for the message.
        path: the file. None means that no file is wanted.

    Raises:
        ValueError: it cannot be written.
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
