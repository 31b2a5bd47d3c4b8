"""Reads prompts from files and records, and checks them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastpref.common.terminal import hide_library_bars
from fastpref.data import images
from fastpref.data.sampling import Prompt, Response
from fastpref.online.answers import Answer
from fastpref.online.records import Record, read_records

CONSUMED = {"prompt", "chosen", "rejected", "completion", "label", "messages", "conversations", "instruction", "input"}


def read_prompts(path: str | os.PathLike[str], *, chat: bool = False) -> list[Record]:
    """Records with a `prompt`, as messages or text, and whatever else they hold.

    JSON lines with prompts and no responses are taken as they are. Anything else goes through
    `fastpref.data.formats.prompts`.

    Args:
        path: the file or folder.
        chat: make a user's message of prompts that are text.
    """
    records = read_records(path) if Path(path).suffix == ".jsonl" else []
    if not records or any("prompt" not in r or {"chosen", "rejected"} <= r.keys() for r in records):
        records = _converted(path)
    for i, record in enumerate(records, 1):
        prompt = checked_prompt(record, f"{path}: record {i}")
        if chat and isinstance(prompt, str):
            record["prompt"] = [{"role": "user", "content": prompt}]
    return records


def _converted(path: str | os.PathLike[str]) -> list[Record]:
    from fastpref.data import formats
    from fastpref.data.files import load_records
    from fastpref.data.template import without_none

    dataset = load_records(path)
    prompts = formats.prompts(dataset)["prompt"]
    return [
        without_none({"prompt": prompt, **{name: value for name, value in row.items() if name not in CONSUMED}})
        for prompt, row in zip(prompts, dataset, strict=True)
    ]


def read_responses(path: str | os.PathLike[str], human: str = "human") -> list[Record]:
    """Records with a `prompt` and `responses`, as JSON lines; or pairs in any format of `fastpref.data.formats`.

    Of a pair the chosen response comes first, and `scores` say under the name `human` that it is preferred.

    Raises:
        ValueError: they are neither, or a response of a pair is more than one message of text.
    """
    records = read_records(path) if Path(path).suffix == ".jsonl" else []
    if records and any("responses" in record for record in records):
        return records
    found = []
    for i, pair in enumerate(load_pairs(path), 1):
        texts = [_only_text(pair[side], f"{path}: record {i}, {side}") for side in ("chosen", "rejected")]
        others = {name: value for name, value in pair.items() if name not in CONSUMED | {"margin"}}
        found.append({"prompt": pair["prompt"], "responses": texts, "scores": {human: [1.0, 0.0]}, **others})
    return found


def load_pairs(path: str | os.PathLike[str]) -> list[Record]:
    """Pairs in any format of `fastpref.data.formats`, as texts or messages.

    Raises:
        ValueError: they are token ids, or none.
    """
    from fastpref.data import formats
    from fastpref.data.files import load_records
    from fastpref.data.template import without_none

    hide_library_bars()
    records = [without_none(record) for record in formats.paired(load_records(path)).to_list()]
    if "chosen" not in records[0]:
        raise ValueError(f"{path}: got token ids, want texts or messages")
    return records


def _only_text(response: Any, where: str) -> str:
    messages = response if isinstance(response, list) else [{"content": response}]
    if len(messages) != 1 or not isinstance(messages[0].get("content"), str):
        raise ValueError(f"{where}: got {response!r:.80}, want text or one message of text")
    return messages[0]["content"]


def checked_prompt(record: Mapping[str, Any], where: str) -> Prompt:
    """The record's prompt.

    Raises:
        ValueError: it is neither text nor a list of messages.
    """
    prompt: Any = record.get("prompt")
    messages = isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in prompt)
    if not prompt or not (isinstance(prompt, str) or messages):
        got = "no prompt" if not prompt else f"a prompt of {type(prompt).__name__}"
        raise ValueError(f'{where}: got {got}, want text or a list of messages {{"role": "...", "content": "..."}}')
    return prompt


def checked_responses(record: Mapping[str, Any], where: str) -> list[str]:
    """The record's responses.

    Raises:
        ValueError: they are not a list of strings.
    """
    responses: Any = record.get("responses")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise ValueError(f"{where}: got responses of {type(responses).__name__}, want a list of strings")
    return responses


def with_responses(
    prompt: Mapping[str, Any], index: int, sampled: Sequence[Response | Answer], save_ids: bool
) -> Record:
    """The record of a prompt with what was sampled for it. `index`: its place in the file."""
    record = {**prompt, "index": index, "responses": [r.text for r in sampled]}
    record |= {"response_tokens": [r.tokens for r in sampled], "finished": [r.finished for r in sampled]}
    return record | ({"response_ids": [r.ids for r in sampled]} if save_ids else {})


def refuse_images(record: Mapping[str, Any], where: str) -> None:
    """For what reads texts only: servers and judges, to which no image is sent.

    Raises:
        ValueError: the record has images.
    """
    if found := images.listed(record):
        raise ValueError(f"{where}: got {len(found)} images, want none: servers and judges get texts only")
