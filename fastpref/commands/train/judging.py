"""`--reward judge:FILE.json`: a language model as the reward of `fastpref train rloo` and `grpo`, from a file."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastpref.commands.train.served import asked
from fastpref.online.judge import Judge, judge_scorer
from fastpref.online.judges import reward_function
from fastpref.online.loading import load_policy
from fastpref.online.servers import LOCAL_ONLY, Server
from fastpref.online.verdicts import Judging

PREFIX = "judge:"
JUDGING = {known.name for known in fields(Judging)}
SERVER = {known.name for known in fields(Server)}
LOCAL = {"model", *LOCAL_ONLY}


def judge_reward(path: str) -> Any:
    """A reward function by the judge that a JSON file describes. It is logged by the file's name.

    The file has `server`, with the arguments of `fastpref.online.Server`, or `model` (a folder, a hub id or smollm2)
    with `device`, `dtype` and `batch_size`; and beside them the arguments of `fastpref.online.Judging`.

    Raises:
        ValueError: there is no such file, or a value in it is wrong.
        ServerError: the server does not answer, or does not say which model to take.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--reward {PREFIX}{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--reward {PREFIX}{path}: not JSON: {error}") from None
    try:
        judging = Judging(**_taken(found, JUDGING, "of a judge", {"server", *LOCAL}))
        judge, size = _judge(found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"--reward {PREFIX}{path}: {error}") from None
    return reward_function(judge_scorer(judge, judging, **size), Path(path).stem)


def _judge(found: dict[str, Any]) -> tuple[Judge, dict[str, Any]]:
    """(a server or a model with its tokenizer, more arguments of its scorer)."""
    if ("server" in found) == ("model" in found):
        raise ValueError(f"got {'both' if 'server' in found else 'neither'} of server and model, want one of them")
    if "server" not in found:
        size = {"batch_size": found["batch_size"]} if "batch_size" in found else {}
        return load_policy(found["model"], found.get("device"), found.get("dtype")), size
    local = LOCAL & found.keys()
    if local:
        raise ValueError(f"{min(local)}: got it with a server, want it for a model on this machine")
    given = found["server"]
    return asked(Server(**_taken({"url": given} if isinstance(given, str) else given, SERVER, "of its server"))), {}


def _taken(found: Any, known: Set[str], what: str, others: Set[str] = frozenset()) -> dict[str, Any]:
    """The known names of an object, which has no other names than these and `others`."""
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}, want an object with the settings {what}")
    unknown = found.keys() - known - others
    if unknown:
        raise ValueError(f"{min(unknown)}: no such setting {what}, want some of {', '.join(sorted(known | others))}")
    return {name: value for name, value in found.items() if name in known}
