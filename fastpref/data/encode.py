"""One record's texts or messages as token ids, by the rules of TRL 1.16: where a prompt ends, how sequences begin and
end."""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastpref.data import remarks, template
from fastpref.data.formats import PAIR
from fastpref.data.ids import IGNORE_INDEX, common_prefix_length
from fastpref.data.special_tokens import bare_ids, ended, text_ids, with_bos, with_eos

Record = dict[str, Any]
LABELLED = {"chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels"}  # whole sequences, from TRL
OPENING = re.compile(r"(<[^<>|/\s]+>)\s*$")  # `<think>` at the end, and no control token


class Response(NamedTuple):
    """A response's token ids, and which of them are scored (None: all)."""

    ids: list[int]
    mask: list[int] | None = None

    def cut(self, length: int) -> Response:
        """Its first `length` tokens."""
        return Response(self.ids[:length], None if self.mask is None else self.mask[:length])

    def after(self, length: int) -> Response:
        """Without its first `length` tokens."""
        return Response(self.ids[length:], None if self.mask is None else self.mask[length:])

    def behind(self, context: list[int]) -> Response:
        """With tokens of its context put before it, which are not scored."""
        return Response(context + self.ids, None if self.mask is None else [0] * len(context) + self.mask)

    @property
    def scored(self) -> bool:
        """Whether any token is scored."""
        return bool(self.ids if self.mask is None else any(self.mask))


class Parted(NamedTuple):
    """A prompt, the responses to it, and what is odd about them."""

    prompt: list[int]
    responses: list[Response]
    remarks: int = 0  # flags of fastpref.data.remarks


def part(
    example: Record, sides: Sequence[str], tokenizer: Any, *, responses_as_written: bool = False,
    assistant_only_loss: bool = False,
) -> Parted:  # fmt: skip
    """A prompt and the responses to it, as token ids.

    The prompt ends where, alone, it stops being a prefix of one of the sequences.

    Args:
        example: a record with `prompt` and the `sides`, or with token ids.
        sides: names of the responses, such as `("chosen", "rejected")`.
        tokenizer: a tokenizer of transformers.
        responses_as_written: a response is its text's tokens and EOS (or the record's `{side}_response_ids`), whatever
            the chat template would make of it.
        assistant_only_loss: of a response's messages, only the assistant's are scored.

    Raises:
        ValueError: something in the record is wrong or does not go with the options.
    """
    if tuple(sides) == PAIR and example.keys() >= LABELLED:
        contexts, _, _ = _labelled(example, assistant_only_loss)
        return _parted(min(contexts, key=len), [Response(token_ids(example, f"{side}_ids")) for side in PAIR], 0)
    if f"{sides[0]}_ids" in example:
        given = [_given(example, side, assistant_only_loss) for side in sides]
        return Parted(token_ids(example, "prompt_ids"), given, _same([response.ids for response in given]))
    if responses_as_written:
        return _as_written(example, sides, tokenizer)
    if is_conversational(example, ("prompt", *sides)):
        return _rendered(example, sides, tokenizer, assistant_only_loss)
    _refuse_texts(assistant_only_loss)
    prompt = prompt_ids(example, tokenizer)
    texts = [example["prompt"] + with_eos(example[side], tokenizer) for side in sides]
    sequences = [Response(text_ids(tokenizer, text)) for text in texts]
    return _parted(prompt, sequences, 0)


def prompt_ids(example: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids of the record's `prompt` alone.

    Messages end with the generation header; the template gets the record's `tools` and `chat_template_kwargs`. A text
    begins as the tokenizer begins texts.
    """
    prompt = example["prompt"]
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    options = template.template_options(example)
    return template.template_ids(tokenizer, prompt, add_generation_prompt=True, **options)


def _rendered(example: Record, sides: Sequence[str], tokenizer: Any, assistant_only: bool) -> Parted:
    options, asked = template.template_options(example), len(example["prompt"])
    sequences, found = [], 0
    for side in sides:
        messages = example["prompt"] + example[side]
        text, ids = template.text_and_ids(tokenizer, messages, **options)
        mask = template.assistant_mask(tokenizer, messages, asked, ids, **options) if assistant_only else None
        sequences.append(Response(ids, mask))
        found |= _altered(text, example[side])
    return _parted(prompt_ids(example, tokenizer), sequences, found)


def _parted(prompt: list[int], sequences: list[Response], found: int) -> Parted:
    n = min(common_prefix_length(prompt, sequence.ids) for sequence in sequences)
    if n < len(prompt):
        found |= remarks.OTHER_PROMPT
    responses = [sequence.after(n) for sequence in sequences]
    return Parted(prompt[:n], responses, found | _same([r.ids for r in responses]))


def _altered(text: str, response: Sequence[Record]) -> int:
    return 0 if template.keeps(text, response) else remarks.ALTERED


def _same(responses: Sequence[list[int]]) -> int:
    return remarks.SAME if len(responses) == 2 and responses[0] == responses[1] else 0


def _as_written(example: Record, sides: Sequence[str], tokenizer: Any) -> Parted:
    if not example.get("prompt"):
        raise ValueError("prompt: got none with responses_as_written, want a text or messages")
    responses = [written_ids(example, side, tokenizer) for side in sides]
    found = _same(responses) | _opened_twice(example, sides, tokenizer)
    return Parted(prompt_ids(example, tokenizer), [Response(ids) for ids in responses], found)


def _opened_twice(example: Record, sides: Sequence[str], tokenizer: Any) -> int:
    """Whether a response begins with the tag that the generation header ends in, such as `<think>`."""
    if isinstance(example["prompt"], str):
        return 0
    options = template.template_options(example)
    header = template.template_text(tokenizer, example["prompt"], add_generation_prompt=True, **options)
    tag = OPENING.search(header)
    written = [side for side in sides if example.get(f"{side}_response_ids") is None]
    texts = (example[side] if isinstance(example[side], str) else _only_text(side, example[side]) for side in written)
    return remarks.TWO_BEGINNINGS if tag and any(text.lstrip().startswith(tag[1]) for text in texts) else 0


def written_ids(example: Record, side: str, tokenizer: Any) -> list[int]:
    """A response's tokens as they were sampled, if the record has them; else its text's tokens, and EOS."""
    text, sampled = example[side], example.get(f"{side}_response_ids")
    if not isinstance(text, str):
        text = _only_text(side, text)
    if sampled is None:
        return bare_ids(tokenizer, with_eos(text, tokenizer))
    said = tokenizer.decode(sampled, skip_special_tokens=True)
    if not said.startswith(text):  # what ends it may be no special token
        raise ValueError(
            f"{side}_response_ids: got tokens of {said!r:.60}, want this tokenizer's of the response, {text!r:.60}"
        )
    return list(sampled)


def _only_text(side: str, messages: Sequence[Record]) -> str:
    message = template.without_none(messages[0]) if len(messages) == 1 else {}
    if set(message) != {"role", "content"} or message["role"] != "assistant" or not isinstance(message["content"], str):
        raise ValueError(
            f"{side}: got messages of {', '.join(m['role'] for m in messages)} with responses_as_written, want one of "
            "the assistant, with all of the response as the text of its content"
        )
    return message["content"]


def wholes(
    example: Record, tokenizer: Any, sides: Sequence[str] = PAIR, *, responses_as_written: bool = False
) -> tuple[list[list[int]], int]:
    """([chosen, rejected], or other `sides`, as whole sequences, remarks).

    Each comes after the prompt. The prompt is empty where they have nothing in common.
    """
    prompt = example.get("prompt", [])
    if prompt is None:
        raise ValueError("prompt: got None, want a text or messages")
    if responses_as_written:
        asked, responses, found = _as_written(example, sides, tokenizer)
        return [asked + response.ids for response in responses], found
    if is_conversational(example, ("prompt", *sides) if prompt else sides):
        options, found, sequences = template.template_options(example), 0, []
        for side in sides:
            text, ids = template.text_and_ids(tokenizer, [*prompt, *example[side]], **options)
            sequences.append(ids)
            found |= _altered(text, example[side])
        return sequences, found | _same(sequences)
    # the EOS token is looked for in the whole: in an implicit prompt's texts it may be in common
    texts = [with_eos((prompt or "") + example[side], tokenizer) for side in sides]
    sequences = [text_ids(tokenizer, text) for text in texts]
    return sequences, _same(sequences)


class InContext(NamedTuple):
    """Chosen and rejected responses, each with a context of its own."""

    contexts: list[list[int]]  # of chosen and rejected
    responses: list[Response]
    remarks: int = 0


def in_context(
    example: Record, tokenizer: Any, *, responses_as_written: bool = False, assistant_only_loss: bool = False
) -> InContext:
    """Chosen and rejected with the context of each, made from texts as in TRL's CPO and ORPO."""
    if example.keys() >= LABELLED:
        return _labelled(example, assistant_only_loss)
    if "chosen_ids" in example or responses_as_written:
        options = {"responses_as_written": responses_as_written, "assistant_only_loss": assistant_only_loss}
        prompt, responses, found = part(example, PAIR, tokenizer, **options)
        skips = [example.get(f"{side}_skip") or 0 for side in PAIR]  # of data that we have tokenised
        contexts = [prompt + response.ids[:skip] for response, skip in zip(responses, skips, strict=True)]
        return InContext(contexts, [r.after(skip) for r, skip in zip(responses, skips, strict=True)], found)
    prompt_text, *texts = template_texts(example, tokenizer)
    found, talks = 0, not isinstance(example["prompt"], str)
    masks: list[list[int] | None] = [None, None]
    if talks:
        for text, side in zip(texts, PAIR, strict=True):
            found |= _altered(prompt_text + text, example[side])
            ends_before = text != text.rstrip() and with_eos(text, tokenizer) == text
            found |= remarks.TWO_ENDS if ends_before else 0
    else:
        _refuse_texts(assistant_only_loss)
        texts = [with_eos(text, tokenizer) for text in texts]
    if assistant_only_loss:
        masks = [_mask_of(example, side, tokenizer) for side in PAIR]
    two = [
        _context_and_answer(tokenizer, prompt_text, text, mask, talks) for text, mask in zip(texts, masks, strict=True)
    ]
    responses = [response for _, response in two]
    return InContext([context for context, _ in two], responses, found | _same([r.ids for r in responses]))


def _mask_of(example: Record, side: str, tokenizer: Any) -> list[int]:
    options, messages = template.template_options(example), example["prompt"] + example[side]
    ids = template.template_ids(tokenizer, messages, **options)
    return template.assistant_mask(tokenizer, messages, len(example["prompt"]), ids, **options)


def template_texts(example: Record, tokenizer: Any, sides: Sequence[str] = PAIR) -> tuple[str, ...]:
    """(prompt, responses) as texts. A prompt that ends in an assistant's message is continued."""
    names = ("prompt", *sides)
    if not is_conversational(example, names):
        return tuple(example[name] for name in names)
    options = template.template_options(example)
    role = example["prompt"][-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(f"prompt: got a last message of role {role!r}, want 'user', 'tool' or 'assistant'")
    going_on = role == "assistant"
    prompt = template.template_text(
        tokenizer, example["prompt"], add_generation_prompt=not going_on, continue_final_message=going_on, **options
    )
    texts = [template.template_text(tokenizer, example["prompt"] + example[side], **options) for side in sides]
    prompt = os.path.commonprefix([prompt, *texts])  # noqa: RUF071 - of characters, as meant
    return prompt, *(text[len(prompt) :] for text in texts)


def _context_and_answer(
    tokenizer: Any, prompt: str, answer: str, mask: list[int] | None, close: bool
) -> tuple[list[int], Response]:
    """TRL's `build_tokenized_answer`, with its BOS and EOS. A prompt's last token may have merged with the answer.

    `mask` is of the whole sequence; EOS counts like the token before it. With `close`, EOS is the very last token.
    """
    alone, whole = bare_ids(tokenizer, prompt), bare_ids(tokenizer, prompt + answer)
    start = len(alone) if whole[: len(alone)] == alone else len(alone) - 1
    ids = ended(tokenizer, whole[start:]) if close else whole[start:]
    if mask is not None:
        mask = mask[start:] + mask[-1:] * (start + len(ids) - len(mask))
    return with_bos(tokenizer, whole[:start]), Response(ids, mask)


def solution(
    example: Record, tokenizer: Any, separator: str, last_only: bool
) -> tuple[list[int], list[int], list[int]]:
    """(prompt, steps, labels of the steps' tokens) of a record with labelled steps."""
    if not isinstance(example["prompt"], str):
        raise ValueError(f"prompt: got {type(example['prompt']).__name__}, want a text")
    steps, marks = example["completions"], example["labels"]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"completions: got {steps!r:.80}, want a list of texts")
    if not isinstance(marks, list) or len(marks) != len(steps):
        got = len(marks) if isinstance(marks, list) else marks
        raise ValueError(f"labels: got {got}, want one for each of {len(steps)} completions")
    if not all(mark in (False, True) for mark in marks):
        raise ValueError(f"labels: got {marks!r:.80}, want True or False of each step")
    prompt, *encoded = (bare_ids(tokenizer, text) for text in (example["prompt"], *steps))
    end = bare_ids(tokenizer, separator)
    ids: list[int] = []
    labels: list[int] = []
    for i, (step, mark) in enumerate(zip(encoded, marks, strict=True), 1):
        if not step + end:
            raise ValueError("completions: got a step of no tokens, want at least 1, or a step_separator")
        ids += step + end
        ignored = last_only and i < len(steps)
        labels += [IGNORE_INDEX] * (len(step + end) - 1) + [IGNORE_INDEX if ignored else int(mark)]
    return with_bos(tokenizer, prompt), ids, labels


def is_conversational(example: Record, names: Sequence[str]) -> bool:
    """Whether the values are lists of at least one message each. Otherwise they are texts."""
    values = [example[name] for name in names]
    if all(isinstance(value, str) for value in values):
        return False
    if all(isinstance(value, list) and value for value in values):
        return True
    got = ", ".join(type(value).__name__ if value or isinstance(value, str) else repr(value) for value in values)
    raise ValueError(f"{', '.join(names)}: got {got}, want all of them as texts, or all as lists of messages")


def token_ids(example: Record, name: str) -> list[int]:
    """A record's column of token ids."""
    if name not in example:
        raise ValueError(f"{name}: got none beside {', '.join(sorted(example))}, want it: only rewards need no prompt")
    if not isinstance(example[name], list):
        raise ValueError(f"{name}: got {example[name]!r:.80}, want a list of token ids")
    return example[name]


def _given(example: Record, side: str, assistant_only: bool) -> Response:
    """A response that comes as token ids, with its mask where the data has one."""
    ids, name = token_ids(example, f"{side}_ids"), f"{side}_mask"
    if name not in example:
        if assistant_only:
            raise ValueError(f"{name}: got none with assistant_only_loss, want one beside {side}_ids")
        return Response(ids)
    mask = example[name]
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(value in (0, 1) for value in mask):
        got = f"{len(mask)} values" if isinstance(mask, list) and len(mask) != len(ids) else f"{mask!r:.80}"
        raise ValueError(f"{name}: got {got}, want 0 or 1 for each of {len(ids)} tokens of {side}_ids")
    return Response(ids, [int(value) for value in mask])


def _labelled(example: Record, assistant_only: bool) -> InContext:
    """Pairs that TRL's CPO or ORPO tokenised: whole sequences, and their labels, -100 in the context."""
    if assistant_only:
        raise ValueError("assistant_only_loss: got chosen_labels, want messages, or token ids with a mask")
    contexts, responses = [], []
    for side in PAIR:
        ids, labels = token_ids(example, f"{side}_ids"), example[f"{side}_labels"]
        start = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        if labels[start:] != ids[start:]:
            raise ValueError(f"{side}_labels: got {labels!r:.80}, want -100 in the context, then {side}_input_ids")
        contexts.append(ids[:start])
        responses.append(Response(ids[start:]))
    return InContext(contexts, responses, _same([response.ids for response in responses]))


def _refuse_texts(assistant_only: bool) -> None:
    if assistant_only:
        raise ValueError("assistant_only_loss: got texts, want messages, or token ids with a mask")
