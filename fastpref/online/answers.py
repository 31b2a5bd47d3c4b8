"""What is asked of a server, and what it may answer: the two endpoints of OpenAI's protocol, read strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from fastpref.data.sampling import Prompt


class NotGiven(ValueError):
    """A valid answer that lacks what was asked for. Another try would lack it too."""


@dataclass(frozen=True)
class Request:
    """One response to a prompt. Messages go to `chat/completions`, text and token ids to `completions`."""

    prompt: Prompt | list[int]
    fields: Mapping[str, Any]  # the rest of the body
    want_ids: bool = False
    want_logps: bool = False

    @property
    def chat(self) -> bool:
        return isinstance(self.prompt, list) and not all(isinstance(token, int) for token in self.prompt)

    @property
    def path(self) -> str:
        return "chat/completions" if self.chat else "completions"

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {"messages" if self.chat else "prompt": self.prompt, **self.fields}
        if self.want_ids:
            body["return_token_ids"] = True  # vLLM 0.10.2 and later
        if self.want_logps:
            body["logprobs"] = True if self.chat else 1  # a flag there, how many there
        return body

    def answer(self, found: Any) -> Answer:
        """Reads the body of the server's answer.

        Raises:
            NotGiven: it lacks what was asked for.
            ValueError: it is not what the protocol says.
        """
        choice = _only_choice(found)
        text, reasoning = _text(choice, self.chat)
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise NotGiven(f"got finish_reason {reason!r}, want 'stop' or 'length'")
        ids = _ids(choice) if self.want_ids else None
        logps = _logps(choice, self.chat) if self.want_logps else None
        if ids is not None and logps is not None and len(ids) != len(logps):
            raise ValueError(f"got {len(ids)} token_ids and {len(logps)} logprobs, want as many")
        usage = found.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        prompt_tokens, tokens = (
            count if isinstance(count, int) else None
            for count in (counts.get("prompt_tokens"), counts.get("completion_tokens"))
        )
        return Answer(text, reason == "stop", prompt_tokens, tokens, ids, logps, reasoning)


@dataclass(frozen=True)
class Answer:
    """A response of a server. None stands for what it did not say or was not asked."""

    text: str
    finished: bool  # it ended by itself, not at max_tokens
    prompt_tokens: int | None = None
    tokens: int | None = None  # of the response, what ends it included
    ids: list[int] | None = None
    logps: list[float] | None = None  # of the tokens, nats
    reasoning: bool = False  # the server took a part of what was sampled out of the text

    def record(self) -> dict[str, Any]:
        """As JSON values, without what is not there."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Answer:
        """From `record()`."""
        known = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        return cls(**{"finished": False, **known})


def _only_choice(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"got {type(found).__name__}, want a JSON object")
    if found.get("error"):
        raise ValueError(f"got an error: {found['error']!r:.200}")
    choices = found.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        got = f"{len(choices)} choices" if isinstance(choices, list) else "no choices"
        raise ValueError(f"got {got}, want 1")
    return choices[0]


def _text(choice: Mapping[str, Any], chat: bool) -> tuple[str, bool]:
    """(the text, whether reasoning was taken out of it)."""
    message: Any = choice.get("message") if chat else {"content": choice.get("text")}
    if not isinstance(message, dict):
        raise ValueError("got a choice without a message")
    if message.get("tool_calls"):
        raise NotGiven("got tool calls, want text: a server without a tool parser leaves them in it")
    reasoning = bool(message.get("reasoning_content") or message.get("reasoning"))
    text = message.get("content")
    if text is None and reasoning:
        text = ""  # cut while it was still reasoning
    if not isinstance(text, str):
        raise ValueError(f"got a text of {type(text).__name__}, want a string")
    return text, reasoning


def _ids(choice: Mapping[str, Any]) -> list[int]:
    ids = choice.get("token_ids")
    if not _all(ids, int):
        raise NotGiven("got no token_ids of the response, which were asked for by return_token_ids")
    return ids


def _logps(choice: Mapping[str, Any], chat: bool) -> list[float]:
    found: Any = choice.get("logprobs")
    logps = found.get("content" if chat else "token_logprobs") if isinstance(found, dict) else None
    if chat and isinstance(logps, list):
        logps = [t.get("logprob") if isinstance(t, dict) else None for t in logps]
    if not _all(logps, (int, float)) or not all(map(math.isfinite, logps)):
        raise NotGiven("got no logprobs of the response's tokens, which were asked for")
    return logps


def _all(values: Any, kind: type | tuple[type, ...]) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)
