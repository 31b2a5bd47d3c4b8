"""Preference pairs in JSON lines, as messages: TRL's conversational format (`prompt`, `chosen`, `rejected`)."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import NamedTuple

Message = dict[str, str]
FIELDS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """Two ways to continue one conversation, the first better than the second."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def _messages(name: str, value: object) -> list[Message]:
    wanted = 'want a list of messages {"role": "...", "content": "..."}'
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {type(value).__name__}, {wanted}")
    if not value:
        raise ValueError(f"{name}: got no messages, want at least 1")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{i}]: got {type(message).__name__}, {wanted}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{name}[{i}]: got {type(message.get(key)).__name__} as {key!r}, want a string")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _parse(line: str) -> Pair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, want an object with {', '.join(FIELDS)}")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f"got no {', '.join(missing)}, want an object with {', '.join(FIELDS)}")
    pair = Pair(*(_messages(name, record[name]) for name in FIELDS))
    for name in ("chosen", "rejected"):
        if (role := getattr(pair, name)[0]["role"]) != "assistant":
            raise ValueError(f"{name}[0]: got role {role!r}, want 'assistant'")
    if pair.chosen == pair.rejected:
        raise ValueError("rejected: got the same messages as chosen, want two different responses")
    return pair


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs in a file, one JSON object a line (other keys and blank lines are passed over).

    Raises:
        ValueError: names the file, the line and what is wrong with it.
    """
    pairs = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                pairs.append(_parse(line.strip()))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise ValueError(f"{path}: got no pairs, want at least 1")
    return pairs


def sample_pairs() -> tuple[list[Pair], list[Pair]]:
    """The pairs that come with fastpref: (training, held-out)."""
    with resources.as_file(resources.files("fastpref.data")) as folder:
        return read_pairs(folder / "sample_train.jsonl"), read_pairs(folder / "sample_heldout.jsonl")
