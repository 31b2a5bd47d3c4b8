"""Files of JSON lines that grow by whole records, so that a job that was stopped can go on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def to_line(record: Mapping[str, Any]) -> bytes:
    """One line of JSON.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    return _json(record, allow_nan=False)


def _json(value: Any, **options: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, **options).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: legal in JSON only when escaped
        return json.dumps(value, **options).encode() + b"\n"


def fingerprint(records: Iterable[Mapping[str, Any]]) -> str:
    """A hash of the records."""
    from fastpref.data.reference_cache import Fingerprint

    return Fingerprint().text(*map(to_line, records)).hexdigest()


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The objects in a file, one a line. Blank lines are skipped.

    Says on stderr if the command that writes the file has not finished it.

    Raises:
        ValueError: a line is no JSON object, or there is none. Names the file and the line.
    """
    from fastpref.data.images import located

    records = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            raise ValueError(f"{path}, line {number}: got {line[:40]!r}, want a JSON object")
        records.append(located(record, Path(path).resolve().parent))
    if not records:
        raise ValueError(f"{path}: got no records, want at least 1")
    meta = sidecar(Path(path))
    total = json.loads(meta.read_text(encoding="utf-8"))["total"] if meta.exists() else len(records)
    if len(records) < total:
        print(f"{path}: unfinished, {len(records)} of {total} records", file=sys.stderr)
    return records


def write_records(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file that is there whole or not at all."""
    write_whole(Path(path), b"".join(map(to_line, records)))


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under another name, and renames it when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a file of one JSON value, which is there whole or not at all."""
    write_whole(Path(path), _json(value, indent=1))


def sidecar(path: Path) -> Path:
    """The file that says what a file of records was begun with."""
    return path.with_name(path.name + ".meta.json")


class Journal:
    """A file of `total` records, written in order. `PATH.meta.json` says what it was begun with.

    A record is in the file when `append` returns. If a crash left part of a last record, it is cut off when the file is
    opened again. `done` is the number of whole records. Settings without a record bind nobody.

    Args:
        path: the file.
        total: how many records it will have.
        settings: JSON values on which the records depend. A file that was begun with others is refused.
        overwrite: begin anew.

    Raises:
        ValueError: the file was begun with other settings or not by fastpref, has more records than `total`, or has a
            damaged record before whole ones.
    """

    def __init__(
        self, path: str | os.PathLike[str], total: int, settings: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path, self.total = Path(path), total
        self.settings = json.loads(json.dumps(settings))
        self.done, self.dropped_bytes = 0, 0
        meta = sidecar(self.path)
        if overwrite:
            self.path.unlink(missing_ok=True)
            meta.unlink(missing_ok=True)
        if meta.exists() and self.path.exists():
            self._compare(json.loads(meta.read_text(encoding="utf-8")))
        elif self.path.exists():
            raise ValueError(
                f"{self.path}: got a file without {meta.name}, which was not begun by this command; want a new name, "
                "or --overwrite"
            )
        else:
            write_json(meta, {"total": total, "settings": self.settings})
        self._size = self._whole_records() if self.path.exists() else 0
        if self.done > total:
            raise ValueError(f"{self.path}: got {self.done} records, want at most {total}")

    def _compare(self, begun: Mapping[str, Any]) -> None:
        old, new = begun["settings"] | {"records": begun["total"]}, self.settings | {"records": self.total}
        differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if differing:
            got = ", ".join(f"{name} {new.get(name)!r}" for name in differing)
            want = ", ".join(f"{name} {old.get(name)!r}" for name in differing)
            raise ValueError(f"{self.path}: got {got}, want {want} as it was begun with; or a new name, or --overwrite")

    def _whole_records(self) -> int:
        """Counts the whole records and cuts off what follows them. Returns the size of the file then."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line.endswith(b"\n") and _parse(line) is not None for line in lines]
        self.done = len(whole) - whole[::-1].index(True) if True in whole else 0
        if not all(whole[: self.done]):
            raise ValueError(f"{self.path}, line {whole.index(False) + 1}: damaged, and whole records follow it")
        size = sum(map(len, lines[: self.done]))
        self.dropped_bytes = sum(map(len, lines[self.done :]))
        if self.dropped_bytes:
            print(f"{self.path}: cut off {self.dropped_bytes} bytes of an unfinished record", file=sys.stderr)
            os.truncate(self.path, size)
        return size

    @property
    def finished(self) -> bool:
        return self.done == self.total

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records through to the disk.

        Raises:
            RuntimeError: something else wrote to the file.
        """
        content = b"".join(map(to_line, records))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() != self._size:
                raise RuntimeError(f"{self.path}: {file.tell()} bytes where this process left {self._size}")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(content)
        self.done += len(records)
