"""Records in any accepted format to TRL's formats with an explicit prompt.

Responses and prompts are texts, or lists of messages `{"role", "content"}` (conversational). Pairs are accepted as

    prompt, chosen, rejected                     TRL, explicit prompt
    chosen, rejected                             TRL, implicit prompt: what both begin with
    conversations, chosen, rejected              LLaMA-Factory: turns {"from", "value"}, responses as turns or texts
    messages, chosen, rejected                   the same with messages; beside a `prompt`, or responses that are
                                                 whole conversations, these columns are passed over
    instruction, chosen, rejected                Alpaca, with `input`, `system` and `history` where there are such
    prompt_ids, chosen_ids, rejected_ids         token ids (reward models: whole sequences, without prompt_ids), also
                                                 by TRL's older names, `prompt_input_ids` and so on; with
                                                 `chosen_labels, rejected_labels` they are as in TRL's CPO and ORPO

and single responses as

    prompt, completion, label                    TRL
    messages, label (or conversations, label)    LLaMA-Factory: the last message is the response
    prompt_ids, completion_ids, label            token ids

A text prompt beside messages is a user's message; one that whole conversations begin with, or a copy of their
question, is not asked twice. Beside token ids, `chosen_mask` and `rejected_mask` (`completion_mask`) may say with 0 and
1 which tokens of a response are scored.

Every function takes a `Dataset` or an `IterableDataset`, decides by the columns, and passes other columns through.
`num_proc` is for a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastpref import __version__
from fastpref.data.template import without_none

Record = dict[str, Any]
Message = dict[str, Any]

PAIRED = (
    "prompt, chosen, rejected",
    "chosen, rejected",
    "conversations, chosen, rejected",
    "messages, chosen, rejected",
    "instruction, chosen, rejected",
    "prompt_ids, chosen_ids, rejected_ids",
    "chosen_ids, rejected_ids",
)
UNPAIRED = (
    "prompt, completion, label",
    "messages, label",
    "conversations, label",
    "prompt_ids, completion_ids, label",
)
COMPLETIONS = (
    "prompt, completion", "messages", "conversations", "prompt, chosen, rejected", "prompt_ids, completion_ids",
    "prompt", "instruction", "prompt_ids",
)  # fmt: skip
PAIR = ("chosen", "rejected")
STEPWISE = ("prompt, completions, labels", "input_ids, labels")
PROMPTS = ("prompt", "messages", "conversations", "instruction")
LEGACY = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}  # beside labels whole sequences
LEGACY_PROMPT = {"prompt_input_ids": "prompt_ids"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
ROLES |= {role: role for role in ROLES.values()}
CONVERTED = ("conversations", "messages", "instruction", "input", "system", "history")


def paired(dataset: Any, num_proc: int | None = None) -> Any:
    """Any accepted format of pairs as `prompt, chosen, rejected`. Token ids stay as they are.

    Raises:
        ValueError: the columns are of no accepted format, or a record is wrong. The message says which.
    """
    columns, _ = peek(dataset)
    if set(LEGACY) <= columns and "chosen_ids" not in columns:
        before = set(LEGACY_PROMPT) <= columns and "chosen_labels" not in columns
        return dataset.rename_columns(LEGACY | (LEGACY_PROMPT if before else {}))
    if {"chosen_ids", "rejected_ids"} <= columns:
        return dataset
    if not {"chosen", "rejected"} <= columns:
        raise not_understood(columns, PAIRED)
    return convert(dataset, _explicit_pair, columns, num_proc)


def _explicit_pair(example: Record) -> Record:
    """A pair from a record whose columns say what it is: `prompt`, turns, an instruction, or whole conversations."""
    if "prompt" in example:
        return explicit(example, PAIR)
    turns = {"conversations", "messages"} & set(example)
    if turns and not _begins_before_the_response(example["chosen"]):
        return {"prompt": _system(example) + _turns(example)} | _responses(example)
    if "instruction" in example and not turns:
        return {"prompt": _instruction(example)} | _responses(example)
    return _pair_with_implicit_prompt(example)


def _begins_before_the_response(value: Any) -> bool:
    """Whether it is a whole conversation. Then `messages` beside it are a copy, as in UltraFeedback binarized."""
    return is_conversational(value) and value[0]["role"] != "assistant"


def explicit(example: Record, sides: Sequence[str]) -> Record:
    """A prompt and the responses to it: all texts, or all messages.

    Raises:
        ValueError: one of them is missing, or a response begins with messages that are not the prompt.
    """
    prompt, *responses = (_value(name, example[name]) for name in ("prompt", *sides))
    if all(isinstance(value, str) for value in (prompt, *responses)):
        return {"prompt": prompt, **dict(zip(sides, responses, strict=True))}
    prompt, talks = _of_messages(prompt, [_as_messages(response) for response in responses], sides)
    return {"prompt": prompt, **dict(zip(sides, talks, strict=True))}


def _value(name: str, value: Any) -> str | list[Message]:
    """A text, or messages."""
    if isinstance(value, str):
        return value
    if value is None or not isinstance(value, list | dict):
        raise ValueError(f"{name}: got {value!r:.80}, want a text or messages")
    return [without_none(_message(name, turn)) for turn in (value if isinstance(value, list) else [value])]


def _as_messages(response: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _of_messages(
    prompt: str | list[Message], responses: list[list[Message]], sides: Sequence[str]
) -> tuple[list[Message] | str, list[list[Message]]]:
    """(prompt, responses) where responses are messages: either those that answer, or whole conversations."""
    going_on = isinstance(prompt, list) and (not prompt or prompt[-1]["role"] == "assistant")
    if isinstance(prompt, list) and prompt and all(response[: len(prompt)] == prompt for response in responses):
        responses = [response[len(prompt) :] for response in responses]
        going_on = True
    for side, response in zip(sides, responses, strict=True):
        if not response:
            raise ValueError(f"{side}: got no messages, want at least 1")
    whole = [response[0]["role"] in ("system", "developer", "user") for response in responses]
    if going_on or not any(whole):
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, responses
    shared = _shared(responses)
    if not _is_copy(prompt, shared):
        wrong = whole.index(True)
        raise ValueError(
            f"{sides[wrong]}: got a conversation that begins with {responses[wrong][0]!r:.80}, want one that "
            "begins with the prompt, or the response alone"
        )
    return shared, [response[len(shared) :] for response in responses]


def _shared(conversations: list[list[Message]]) -> list[Message]:
    """The messages that all conversations begin with, where at least a response follows.

    Of a single conversation: all but the last message.
    """
    first, *others = conversations
    shortest = min(map(len, conversations)) - 1
    same = (i for i in range(shortest) if any(other[i] != first[i] for other in others))
    return first[: next(same, shortest)]


def _is_copy(prompt: str | list[Message], shared: list[Message]) -> bool:
    """Whether the prompt is what the conversations ask, or the text of a question in them."""
    if isinstance(prompt, list):
        return shared[-len(prompt) :] == prompt
    texts = [message.get("content") for message in shared]
    return any(isinstance(text, str) and text and (prompt.strip() in text or text in prompt) for text in texts)


def _pair_with_implicit_prompt(example: Record) -> Record:
    """TRL's `extract_prompt`: the prompt is all before the first difference. Texts are parted before a space."""
    chosen, rejected = example["chosen"], example["rejected"]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise ValueError(f"{name}: got {type(value).__name__}, want a text or a list of messages")
    chosen, rejected = (_value(name, value) for name, value in (("chosen", chosen), ("rejected", rejected)))
    shorter = min(len(chosen), len(rejected))
    n = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(0, shorter - 1))
    if 0 < n < shorter and chosen[n] != rejected[n] and chosen[n - 1] == " ":
        n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def unpaired(dataset: Any, num_proc: int | None = None) -> Any:
    """Any accepted format of single responses as `prompt, completion, label`. Token ids stay as they are.

    Pairs become two records each, in TRL's order: of every 1,000 pairs first all chosen responses, then all rejected
    ones.

    Raises:
        ValueError: the columns are of no accepted format, or a record is wrong. The message says which.
    """
    columns, _ = peek(dataset)
    if {"chosen", "rejected"} <= columns:
        dataset = paired(dataset, num_proc)
        # not by num_proc processes, on which the order would depend
        return dataset.map(_unpair, batched=True, batch_size=1000, remove_columns=column_names(dataset))
    if "label" in columns and {"prompt_ids", "completion_ids"} <= columns:
        return dataset
    if "label" in columns and {"prompt", "completion"} <= columns:
        return convert(dataset, _explicit_single, columns, num_proc)
    if "label" in columns and columns & {"conversations", "messages"}:
        return convert(dataset, _response_of_turns, columns, num_proc)
    raise not_understood(columns, UNPAIRED + PAIRED[:-2])


def completions(dataset: Any, num_proc: int | None = None) -> Any:
    """Any accepted format of completions as `prompt, completion`, or as `prompt` alone. Token ids stay as they are.

    Of a pair the chosen response is the completion. Of messages it is the last one if that is the assistant's, which
    the first record decides for all. `label` is not needed.

    Raises:
        ValueError: the columns are of no accepted format, or a record is wrong. The message says which.
    """
    columns, first = peek(dataset)
    if {"chosen", "rejected"} <= columns:
        return paired(dataset, num_proc).rename_columns({"chosen": "completion"}).remove_columns("rejected")
    if "prompt_ids" in columns:
        return dataset
    if {"prompt", "completion"} <= columns:
        return convert(dataset, _explicit_single, columns, num_proc)
    if "prompt" in columns:
        return dataset
    if columns & {"conversations", "messages"}:
        answered = _turns(first)[-1]["role"] == "assistant"
        return convert(dataset, _response_of_turns if answered else _prompt_of_turns, columns, num_proc)
    if "instruction" in columns:
        return convert(dataset, _prompt_of_instruction, columns, num_proc)
    raise not_understood(columns, COMPLETIONS)


def _explicit_single(example: Record) -> Record:
    return explicit(example, ("completion",))


def _unpair(batch: Record) -> Record:
    batch, pairs = dict(batch), len(batch["chosen"])
    found: Record = {"label": [True] * pairs + [False] * pairs}
    for end in ("", "_response_ids"):
        if f"chosen{end}" in batch:
            found[f"completion{end}"] = batch.pop(f"chosen{end}") + batch.pop(f"rejected{end}")
    return {name: values * 2 for name, values in batch.items()} | found


def _response_of_turns(example: Record) -> Record:
    *prompt, response = _turns(example)
    if response["role"] != "assistant":
        raise ValueError(f"messages: got a last one of role {response['role']!r}, want 'assistant'")
    return {"prompt": _system(example) + prompt, "completion": [response]}


def stepwise(dataset: Any, num_proc: int | None = None) -> Any:
    """Solutions as `prompt, completions, labels`: their steps, and whether each is right. Token ids stay as they are.

    Raises:
        ValueError: the columns are of no accepted format. The message says which are wanted.
    """
    columns, _ = peek(dataset)
    if {"input_ids", "labels"} <= columns or {"prompt", "completions", "labels"} <= columns:
        return dataset
    raise not_understood(columns, STEPWISE)


def prompts(dataset: Any, num_proc: int | None = None) -> Any:
    """Any accepted format as `prompt`, and nothing else.

    Raises:
        ValueError: the columns are of no accepted format, or a record is wrong. The message says which.
    """
    columns, _ = peek(dataset)
    if {"chosen", "rejected"} <= columns:
        dataset = paired(dataset, num_proc)
    elif "prompt" in columns:
        pass
    elif columns & {"conversations", "messages"}:
        dataset = convert(dataset, _prompt_of_turns, columns, num_proc)
    elif "instruction" in columns:
        dataset = convert(dataset, _prompt_of_instruction, columns, num_proc)
    else:
        raise not_understood(columns, PROMPTS + PAIRED[:-2])
    return dataset.select_columns(["prompt"])


def _prompt_of_turns(example: Record) -> Record:
    turns = _turns(example)
    return {"prompt": _system(example) + (turns[:-1] if turns[-1]["role"] == "assistant" else turns)}


def _prompt_of_instruction(example: Record) -> Record:
    return {"prompt": _instruction(example)}


def is_conversational(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def column_names(dataset: Any) -> list[str]:
    """The columns of a data set. An `IterableDataset` may have to be read from to know them."""
    return list(dataset.column_names or peek(dataset)[1])


def peek(dataset: Any) -> tuple[set[str], Record]:
    """(columns, first record) of a data set.

    Raises:
        TypeError: it is no data set.
        ValueError: it is empty.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "map"):
        raise TypeError(f"dataset: got {type(dataset).__name__}, want a datasets.Dataset or IterableDataset")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset: got no records, want at least 1")
    return set(first), first


def not_understood(columns: set[str], wanted: tuple[str, ...]) -> ValueError:
    """The error for columns of no accepted format."""
    rankings = "; rankings are for DPO and reward models, and `fastpref pairs` makes pairs of them"
    return ValueError(
        f"dataset: got columns {', '.join(sorted(columns))}; want one of: {' | '.join(wanted)}"
        + (rankings if "responses" in columns else "")
    )


def convert(dataset: Any, one: Callable[[Record], Record], columns: set[str], num_proc: int | None) -> Any:
    """Every record by the function `one`, whose columns come in place of those it was made from.

    Raises:
        ValueError: `one` raised it; with the record's number.
    """
    options = {"num_proc": num_proc, "desc": "Converting records"} if hasattr(dataset, "__len__") else {}
    return dataset.map(
        _converted, with_indices=True, remove_columns=[name for name in CONVERTED if name in columns],
        # datasets finds a cached result by the function's name: not one of another version
        fn_kwargs={"convert": one, "version": __version__}, **options,
    )  # fmt: skip


def _converted(example: Record, index: int, convert: Callable[[Record], Record], version: str) -> Record:
    try:
        return convert(example)
    except ValueError as error:
        raise ValueError(f"dataset, record {index + 1}: {error}") from None


def _turns(example: Record) -> list[Message]:
    name = "conversations" if "conversations" in example else "messages"
    turns = example[name]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name}: got {turns!r}, want a list of turns")
    return [_message(name, turn) for turn in turns]


def _responses(example: Record) -> Record:
    return {name: _response(name, example[name]) for name in ("chosen", "rejected")}


def _response(name: str, value: Any) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise ValueError(f"{name}: got no messages, want at least 1")
    return [_message(name, turn) for turn in turns]


def _message(name: str, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f'{name}: got {type(turn).__name__}, want turns {{"from", "value"}} or {{"role", "content"}}')
    if "role" in turn:
        return turn
    if turn.get("from") not in ROLES:
        raise ValueError(f"{name}: got a turn from {turn.get('from')!r}, want one of {', '.join(ROLES)}")
    return {"role": ROLES[turn["from"]], "content": turn.get("value")}


def _system(example: Record) -> list[Message]:
    return [{"role": "system", "content": example["system"]}] if example.get("system") else []


def _instruction(example: Record) -> list[Message]:
    """An Alpaca record, as LLaMA-Factory reads it. `history` is a list of [question, answer]."""
    if not isinstance(example["instruction"], str):
        raise ValueError(f"instruction: got {example['instruction']!r:.80}, want a text")
    turns = _system(example)
    for question, answer in example.get("history") or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = "\n".join(part for part in (example["instruction"], example.get("input")) if part)
    return [*turns, {"role": "user", "content": text}]
