"""Texts and messages to token ids by the rules of TRL 1.16: where a prompt ends, which tokens begin and end it all."""

from __future__ import annotations

import json
import logging
import os.path
from collections.abc import Sequence
from typing import Any

from fastpref.data.collate import IGNORE_INDEX, common_prefix_length

Record = dict[str, Any]

logger = logging.getLogger(__name__)


def part(example: Record, sides: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """(prompt, responses), parted where the prompt alone stops being a prefix of one of the sequences."""
    if f"{sides[0]}_ids" in example:
        return token_ids(example, "prompt_ids"), [token_ids(example, f"{side}_ids") for side in sides]
    if is_conversational(example, ("prompt", *sides)):
        options = template_options(example)
        prompt = template_ids(tokenizer, example["prompt"], add_generation_prompt=True, **options)
        sequences = [template_ids(tokenizer, example["prompt"] + example[side], **options) for side in sides]
    else:
        prompt = tokenizer(text=example["prompt"])["input_ids"]
        texts = [example["prompt"] + with_eos(example[side], tokenizer) for side in sides]
        sequences = [tokenizer(text=text)["input_ids"] for text in texts]
    n = min(common_prefix_length(prompt, ids) for ids in sequences)
    if n < len(prompt):
        _warn_once(
            "the prompt's tokens are not a prefix of prompt and response: the chat template renders it in another way, "
            "or tokens merge across its end. What follows the part in common counts as response, and %r of the prompt "
            "is left out, so that the model is trained in another context than it sees in generation.",
            tokenizer.decode(prompt[n:]),
        )
    return list(sequences[0][:n]), [list(ids[n:]) for ids in sequences]


def wholes(example: Record, tokenizer: Any) -> list[list[int]]:
    """[chosen, rejected], each after the prompt, which is empty where the two have nothing in common."""
    sides, prompt = ("chosen", "rejected"), example.get("prompt")
    conversational = is_conversational(example, ("prompt", *sides) if prompt else sides)
    sequences = [prompt + example[side] if prompt else example[side] for side in sides]
    if conversational:
        options = template_options(example)
        return [template_ids(tokenizer, messages, **options) for messages in sequences]
    # the EOS token is looked for in the whole: in an implicit prompt's texts it may be in common
    return [tokenizer(text=with_eos(text, tokenizer))["input_ids"] for text in sequences]


def in_context(example: Record, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(context, response) of chosen and rejected, as TRL's CPO and ORPO make them, from texts."""
    sides = ("chosen", "rejected")
    if "chosen_ids" in example:
        return [(token_ids(example, "prompt_ids"), example[f"{side}_ids"]) for side in sides]
    prompt, *texts = template_texts(example, tokenizer)
    return [_context_and_answer(tokenizer, prompt, text) for text in texts]


def template_texts(example: Record, tokenizer: Any) -> tuple[str, ...]:
    """(prompt, chosen, rejected) as texts; a prompt that ends in an assistant's message is continued."""
    names = ("prompt", "chosen", "rejected")
    if not is_conversational(example, names):
        return tuple(example[name] for name in names)
    options = template_options(example)
    role = example["prompt"][-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(f"prompt: got a last message of role {role!r}, want 'user', 'tool' or 'assistant'")
    going_on = role == "assistant"
    prompt = tokenizer.apply_chat_template(
        example["prompt"], tokenize=False, add_generation_prompt=not going_on, continue_final_message=going_on,
        **options,
    )  # fmt: skip
    texts = [
        tokenizer.apply_chat_template(example["prompt"] + example[side], tokenize=False, **options)
        for side in ("chosen", "rejected")
    ]
    prompt = os.path.commonprefix([prompt, *texts])  # noqa: RUF071 - of characters, as meant
    return prompt, *(text[len(prompt) :] for text in texts)


def _context_and_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """`build_tokenized_answer` of TRL, with its BOS and EOS: a prompt's last token may have merged with the answer."""
    alone, whole = _bare_ids(tokenizer, prompt), _bare_ids(tokenizer, prompt + answer)
    start = len(alone) if whole[: len(alone)] == alone else len(alone) - 1
    context, ids, bos, eos = whole[:start], whole[start:], tokenizer.bos_token_id, _eos(tokenizer, "eos_token_id")
    if bos is not None and context[:1] != [bos]:
        context = [bos, *context]
    return context, ids if ids[-1:] == [eos] else [*ids, eos]


def solution(
    example: Record, tokenizer: Any, separator: str, last_only: bool
) -> tuple[list[int], list[int], list[int]]:
    """(prompt, steps, labels of the steps' tokens)."""
    if not isinstance(example["prompt"], str):
        raise ValueError(f"prompt: got {type(example['prompt']).__name__}, want a text")
    steps, marks = example["completions"], example["labels"]
    if len(marks) != len(steps):
        raise ValueError(f"labels: got {len(marks)}, want one for each of {len(steps)} completions")
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt, *encoded = (_bare_ids(tokenizer, text) for text in (example["prompt"], *steps))
    end = _bare_ids(tokenizer, separator)
    ids: list[int] = []
    labels: list[int] = []
    for i, (step, mark) in enumerate(zip(encoded, marks, strict=True), 1):
        if not step + end:
            raise ValueError("completions: got a step of no tokens, want at least 1, or a step_separator")
        ids += step + end
        ignored = last_only and i < len(steps)
        labels += [IGNORE_INDEX] * (len(step + end) - 1) + [IGNORE_INDEX if ignored else int(mark)]
    return bos + prompt, ids, labels


def _bare_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def template_ids(tokenizer: Any, messages: list[Record], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def template_options(example: Record) -> Record:
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(example.get("chat_template_kwargs") or {})}


def with_eos(text: str, tokenizer: Any) -> str:
    eos = _eos(tokenizer, "eos_token")
    return text if text.endswith(eos) else text + eos


def _eos(tokenizer: Any, attribute: str) -> Any:
    value = getattr(tokenizer, attribute)
    if value is None:
        raise ValueError(f"tokenizer: got no {attribute}, want one, which ends responses")
    return value


def is_conversational(example: Record, names: Sequence[str]) -> bool:
    """Whether the values are lists of messages, each of at least one; otherwise they are texts."""
    values = [example[name] for name in names]
    if all(isinstance(value, str) for value in values):
        return False
    if all(isinstance(value, list) and value for value in values):
        return True
    got = ", ".join(type(value).__name__ if value or isinstance(value, str) else repr(value) for value in values)
    raise ValueError(f"{', '.join(names)}: got {got}, want all of them as texts, or all as lists of messages")


def token_ids(example: Record, name: str) -> list[int]:
    if name not in example:
        raise ValueError(f"{name}: got none beside {', '.join(sorted(example))}, want it: only rewards need no prompt")
    return example[name]


_warned: set[str] = set()


def _warn_once(message: str, *values: Any) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message, *values)
