"""A tiny policy, conversations, servers, and a stop at a chosen record."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from fastpref import models
from fastpref.commands import cli
from fastpref.online.records import Journal
from fastpref.online.servers import Server

QUESTIONS = (
    "Name a colour.", "Two and two?", "Where does the sun go at night, and why is it back every morning?", "Why?",
    "Say something about trees that I did not know before.", "And the sea?", "Is it late?",
)  # fmt: skip
PROMPTS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": q}], "source": i} for i, q in enumerate(QUESTIONS)
]


def tiny(seed: int = 0) -> tuple[Any, Any]:
    """In fp64, where batches of other sizes do not round to other tokens."""
    model, tokenizer = models.tiny(QUESTIONS, seed)
    return model.double().eval(), tokenizer


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def server(url: str, **options: Any) -> Server:
    """One that is given up on in seconds."""
    return Server(url, **{"timeout": 5.0, "retries": 2, "concurrency": 4} | options)


def options_of(command: str) -> set[str]:
    """All options of a command that reads them with argparse alone."""
    parser = argparse.ArgumentParser()
    importlib.import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    return set(parser._option_string_actions)


class PowerCut(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, record: int) -> None:
    """Journals write this record by half, and the process ends."""
    append = Journal.append

    def torn(self, records):
        if self.done == record:
            with open(self.path, "ab") as file:
                file.write(b'{"prompt": [{"role"')
            raise PowerCut
        append(self, records)

    monkeypatch.setattr(Journal, "append", torn)
