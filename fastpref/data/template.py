"""Messages through a tokenizer's chat template, as text and as tokens, and which of the tokens are the assistant's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.data.ids import common_prefix_length

Record = dict[str, Any]
Message = dict[str, Any]
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
WORDS = ("content", "reasoning_content", "thinking")  # of a message: what the assistant wrote


def without_none(value: Any) -> Any:
    """Arrow gives every record's mappings the keys of all records, with None where a record had none."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def template_options(example: Mapping[str, Any]) -> Record:
    """What the template gets beside the messages: the record's `tools` (a list, or JSON) and `chat_template_kwargs`."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else without_none(tools)
    return {"tools": tools or None, **without_none(example.get("chat_template_kwargs") or {})}


def template_text(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """
    Raises:
        ValueError: a message is none, or the template refuses them.
    """
    return _applied(tokenizer, messages, tokenize=False, **options)


def template_ids(tokenizer: Any, messages: Sequence[Message], **options: Any) -> list[int]:
    """As `template_text`."""
    return list(_applied(tokenizer, messages, tokenize=True, return_dict=True, **options)["input_ids"])


def _applied(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    messages = checked(messages)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"messages: got {roles}, which the chat template refuses: {error}") from error


def checked(messages: Sequence[Message]) -> list[Message]:
    """Without keys that are None.

    Raises:
        ValueError: a message has no role, or neither content nor tool calls.
    """
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'messages[{i}]: got {message!r:.80}, want {{"role": "...", "content": "..."}}')
        kept = without_none(message)
        if not any(name in kept for name in ("tool_calls", *WORDS)):
            raise ValueError(f"messages[{i}]: got content None of role {kept['role']!r}, want a text, or tool_calls")
        found.append(kept)
    return found


def keeps(text: str, messages: Sequence[Message]) -> bool:
    """Is what the assistant wrote in the rendered text as it is? Reasoning templates leave parts of it out."""
    written = (m.get(name) for m in messages if m["role"] == "assistant" for name in WORDS)
    return all(words.strip() in text for words in written if isinstance(words, str))


def assistant_mask(
    tokenizer: Any, messages: Sequence[Message], first: int, ids: Sequence[int], **options: Any
) -> list[int]:
    """Which of a conversation's tokens `ids` are the assistant's in `messages[first:]`: a list of 0 and 1 (what it has
    for tokens before these does not count).

    By the template's `{% generation %}` markers; without them by what each of the assistant's messages adds to those
    before it with their generation header, whatever closes its turn included.

    Raises:
        ValueError: without markers, the template renders messages otherwise when others follow them.
    """
    if MARKERS.search(tokenizer.get_chat_template(None, options.get("tools"))):
        marked = {"return_dict": True, "return_assistant_tokens_mask": True}
        return list(_applied(tokenizer, messages, tokenize=True, **marked, **options)["assistant_masks"])
    mask = [0] * len(ids)
    for i in range(first, len(messages)):
        if messages[i]["role"] == "assistant":
            begin, end = _added(tokenizer, messages, i, ids, options)
            mask[begin:end] = [1] * (end - begin)
    return mask


def _added(tokenizer: Any, messages: Sequence[Message], i: int, ids: Sequence[int], options: Record) -> tuple[int, int]:
    """Where the tokens of message i begin and end."""
    whole = template_ids(tokenizer, messages[: i + 1], **options)
    before = template_ids(tokenizer, messages[:i], **options) if i else []
    if any(common_prefix_length(some, ids) < len(some) for some in (before, whole)):
        raise ValueError(
            "assistant_only_loss: got a chat template without {% generation %} markers, which renders message "
            f"{i + 1} of {len(messages)} otherwise when others follow it; want the markers, or token ids with a mask"
        )
    header = template_ids(tokenizer, messages[:i], add_generation_prompt=True, **options) if i else []
    return common_prefix_length(header, ids), len(whole)
