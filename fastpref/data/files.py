"""Reads records from files: JSON lines, JSON, Parquet, CSV, and folders of them or of the library `datasets`."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
Source = str | os.PathLike[str]


def load_records(path: Source | Sequence[Source], split: str | None = None) -> Dataset:
    """The records of a file, of a folder, or of several one after the other.

    They are memory-mapped from the cache of `datasets`.

    Args:
        path: a file `.jsonl`, `.json` (a list of objects, or one object a line), `.parquet` or `.csv`; a folder of such
            files; or a folder that `save_to_disk` wrote.
        split: the name of a split, by default `train`. A part of it is written as in `datasets`: `train[:90%]`. The
            files of a split in a folder are named after it: `test.jsonl`, `test-00000-of-00002.parquet`. If no file of
            a folder is named after `train`, the whole folder is `train`; so is a single file.

    Raises:
        ValueError: a file is damaged or missing. Names the file, the line where there is one, and what is wrong.
        ImportError: `datasets` is not installed.
    """
    _require_datasets()
    from datasets import concatenate_datasets

    name = None if split is None else split.partition("[")[0]
    sources = [path] if isinstance(path, str | os.PathLike) else list(path)
    if not sources:
        raise ValueError("path: got no files, want at least 1")
    files = [file for source in sources for file in _files(Path(source), name)]
    found = [_load(file, name) for file in files]
    try:
        dataset = concatenate_datasets(found) if len(found) > 1 else found[0]
    except ValueError as error:
        raise ValueError(f"{', '.join(map(str, files))}: got columns of different types: {error}") from None
    return dataset if split is None else _part(dataset, split)


def _require_datasets() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; run `pip install 'fastpref[train]'`") from error


def _files(source: Path, split: str | None) -> list[Path]:
    """The files behind a path that belong to the split. A folder of `datasets` counts as one of them."""
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    if source.is_file():
        if split not in (None, "train"):
            raise ValueError(f"split: got {split!r} with a single file, {source}, want 'train'")
        return [source]
    if _is_saved(source):
        return [source]
    files = sorted(file for file in source.iterdir() if file.suffix in BUILDERS)
    if not files:
        raise ValueError(f"{source}: got no files to read, want {', '.join(BUILDERS)}")
    wanted = split or "train"
    named = [file for file in files if re.match(rf"{re.escape(wanted)}(?![a-zA-Z0-9])", file.name)]
    if not named and wanted != "train":
        raise ValueError(f"split: got {split!r}, want one of which {source} has files: {wanted}.jsonl, for example")
    return named or files


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _load(source: Path, split: str | None) -> Dataset:
    dataset = _saved(source, split) if source.is_dir() else _read(source)
    if not len(dataset):
        raise ValueError(f"{source}: got no records, want at least 1")
    return dataset


def _saved(folder: Path, split: str | None) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # whatever Arrow and JSON say of a damaged file
        raise ValueError(f"{folder}: {error}") from error
    if isinstance(found, Dataset):
        return found
    name = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if name not in found:
        raise ValueError(f"split: got {name!r}, want one of {folder}'s: {', '.join(found)}")
    return found[name]


def _read(file: Path) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if file.suffix not in BUILDERS:
        raise ValueError(f"{file}: got {file.suffix or 'no suffix'!r}, want one of {', '.join(BUILDERS)}")
    if not file.stat().st_size:
        raise ValueError(f"{file}: got no records, want at least 1")
    # only an empty cell is none: pandas takes "NA", "None" and "null" for it, too, which may be answers
    options: Any = {"keep_default_na": False, "na_values": [""]} if file.suffix == ".csv" else {}
    try:
        dataset: Any = load_dataset(BUILDERS[file.suffix], data_files=glob.escape(str(file)), split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        where = _damage(file) if BUILDERS[file.suffix] == "json" else None
        raise ValueError(f"{file}{where or f': {error.__cause__ or error}'}") from error
    return _located(dataset, file.resolve().parent)


def _located(dataset: Dataset, folder: Path) -> Dataset:
    """The records, with paths of images that are relative to the file's folder made absolute."""
    from fastpref.data import images

    if not images.has_images(dataset) or not len(dataset):
        return dataset
    dataset = images.undecoded(dataset)
    if any(source["bytes"] for source in images.listed(dataset[0])):  # they are in the file
        return dataset
    return dataset.map(images.located, fn_kwargs={"folder": folder}, desc="Locating images")


def _damage(file: Path) -> str | None:
    """Where a JSON file stops being one, and how. None if it does not."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        return ": got no records, want at least 1"
    if text.lstrip().startswith("["):
        try:
            return None if json.loads(text) else ": got no records, want at least 1"
        except json.JSONDecodeError as error:
            return f", line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            return f", line {number}: not JSON: {error.msg} at column {error.colno}"
        if not isinstance(record, dict):
            return f", line {number}: got {type(record).__name__}, want an object"
    return None


def _part(dataset: Dataset, split: str) -> Dataset:
    from datasets import ReadInstruction

    name = split.partition("[")[0]
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"split: got {split!r}, want a name, or a part of it such as 'train[:90%]'") from error
    start, stop = part.from_ or 0, len(dataset) if part.to is None else part.to
    if start >= stop:
        raise ValueError(f"split: got {split!r}, which is no record of {len(dataset)}")
    return dataset.select(range(start, stop))
