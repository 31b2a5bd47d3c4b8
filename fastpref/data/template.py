"""Runs messages through a tokenizer's chat template: their text, their tokens, and which tokens are the assistant's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.data.ids import common_prefix_length
from fastpref.data.special_tokens import bare_ids

Record = dict[str, Any]
Message = dict[str, Any]
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
WORDS = ("content", "reasoning_content", "thinking")  # of a message: what the assistant wrote


def without_none(value: Any) -> Any:
    """A value without keys that are None.

    Arrow gives every record's mappings the keys of all records, with None where a record had none.
    """
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def template_options(example: Mapping[str, Any]) -> Record:
    """What the template gets beside the messages: the record's `tools` (list or JSON) and `chat_template_kwargs`."""
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else without_none(tools)
    return {"tools": tools or None, **without_none(example.get("chat_template_kwargs") or {})}


def template_text(tokenizer: Any, messages: Sequence[Message], **options: Any) -> str:
    """The messages as text.

    Raises:
        ValueError: a message is none, or the template refuses them.
    """
    return _applied(tokenizer, messages, tokenize=False, **options)


def template_ids(tokenizer: Any, messages: Sequence[Message], **options: Any) -> list[int]:
    """The messages as tokens. Errors as in `template_text`."""
    return list(_applied(tokenizer, messages, tokenize=True, return_dict=True, **options)["input_ids"])


def text_and_ids(tokenizer: Any, messages: Sequence[Message], **options: Any) -> tuple[str, list[int]]:
    """Both the text and the tokens of messages.

    They are rendered once if the tokenizer reads control tokens in texts, as all do that come with a `tokenizer.json`.
    """
    text = template_text(tokenizer, messages, **options)
    reads = hasattr(tokenizer, "backend_tokenizer")
    return text, bare_ids(tokenizer, text) if reads else template_ids(tokenizer, messages, **options)


def _applied(tokenizer: Any, messages: Sequence[Message], **options: Any) -> Any:
    messages = checked(messages)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"messages: got {roles}, which the chat template refuses: {error}") from error


def checked(messages: Sequence[Message]) -> list[Message]:
    """The messages without keys that are None.

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
    """Whether the text has what the assistant wrote, unchanged. Reasoning templates leave parts of it out."""
    written = (m.get(name) for m in messages if m["role"] == "assistant" for name in WORDS)
    return all(words.strip() in text for words in written if isinstance(words, str))


def assistant_mask(
    tokenizer: Any, messages: Sequence[Message], first: int, ids: Sequence[int], **options: Any
) -> list[int]:
    """Which tokens of a conversation the assistant wrote in `messages[first:]`.

    The template's `{% generation %}` markers say so. Without them, a message goes from the end of its generation header
    to the end of its turn, including what closes it.

    Returns:
        A list of 0 and 1, one for each of `ids`. What it has for tokens before `messages[first:]` does not count.

    Raises:
        ValueError: there are no markers, and it cannot be told where a message begins or ends.
    """
    if MARKERS.search(tokenizer.get_chat_template(None, options.get("tools"))):
        marked = {"return_dict": True, "return_assistant_tokens_mask": True}
        return list(_applied(tokenizer, messages, tokenize=True, **marked, **options)["assistant_masks"])
    mask = [0] * len(ids)
    for i in range(first, len(messages)):
        if messages[i]["role"] == "assistant":
            begin, end = _begin(tokenizer, messages[:i], ids, options), _end(tokenizer, messages, i, ids, options)
            if begin is None or not begin <= end <= _begin_of_next(tokenizer, messages, i, ids, options):
                raise ValueError(
                    "assistant_only_loss: got a chat template without {% generation %} markers, which mixes message "
                    f"{i + 1} of {len(messages)} with others, or leaves it out; want the markers (as in the templates "
                    "of TRL's get_training_chat_template), or token ids with a mask"
                )
            mask[begin:end] = [1] * (end - begin)
    return mask


def _begin(tokenizer: Any, before: Sequence[Message], ids: Sequence[int], options: Record) -> int | None:
    """Where the generation header after `before` ends in `ids`. None if `before` is rendered in another way.

    Of a header that opens the reasoning, at least the first token must be there.
    """
    if not before:
        return 0
    closed = template_ids(tokenizer, before, **options)
    opened = template_ids(tokenizer, before, add_generation_prompt=True, **options)
    begin = common_prefix_length(opened, ids)
    return begin if begin == len(opened) or begin > common_prefix_length(closed, opened) else None


def _end(tokenizer: Any, messages: Sequence[Message], i: int, ids: Sequence[int], options: Record) -> int:
    """Where the turn of message i ends in `ids`.

    Rendering with another message in its place shows where its content ends. As the last message of a conversation it
    shows what closes it.
    """
    changed = template_ids(tokenizer, _with_another(messages, i), **options)
    said = len(ids) - _common_suffix_length(ids, changed)
    last = template_ids(tokenizer, messages[: i + 1], **options)
    changed = template_ids(tokenizer, _with_another(messages[: i + 1], i), **options)
    closing = last[len(last) - _common_suffix_length(last, changed) :]
    return said + common_prefix_length(closing, ids[said:])


def _begin_of_next(tokenizer: Any, messages: Sequence[Message], i: int, ids: Sequence[int], options: Record) -> int:
    """The first token of `ids` that another message after message i changes."""
    if i + 1 == len(messages):
        return len(ids)
    return common_prefix_length(template_ids(tokenizer, _with_another(messages, i + 1), **options), ids)


def _with_another(messages: Sequence[Message], i: int) -> list[Message]:
    """The conversation with a message i that ends in something else."""
    message = messages[i]
    found = dict(message)
    if isinstance(message.get("content"), str):
        found["content"] = message["content"] + " x"
    if message.get("tool_calls"):
        found["tool_calls"] = [_another_call(call) for call in message["tool_calls"]]
    return [*messages[:i], found, *messages[i + 1 :]]


def _another_call(call: Record) -> Record:
    inner = call.get("function", call)
    named = {**inner, "name": f"{inner['name']}x"}
    return {**call, "function": named} if "function" in call else named


def _common_suffix_length(first: Sequence[int], second: Sequence[int]) -> int:
    return common_prefix_length(first[::-1], second[::-1])
