"""Records in any accepted format to TRL's formats with an explicit prompt.

Responses and prompts are texts, or lists of messages `{"role", "content"}` (conversational). Pairs are accepted as

    prompt, chosen, rejected                     TRL, explicit prompt
    chosen, rejected                             TRL, implicit prompt: what both begin with
    conversations, chosen, rejected              LLaMA-Factory: turns {"from", "value"}, responses as turns or texts
    messages, chosen, rejected                   the same with messages; beside a `prompt`, or responses that are
                                                 whole conversations, these columns are passed over
    instruction, chosen, rejected                Alpaca, with `input`, `system` and `history` where there are such
    prompt_ids, chosen_ids, rejected_ids         token ids (reward models: whole sequences, without prompt_ids)

and single responses as

    prompt, completion, label                    TRL
    messages, label (or conversations, label)    LLaMA-Factory: the last message is the response
    prompt_ids, completion_ids, label            token ids

Every function takes a `Dataset` or an `IterableDataset`, decides by the columns and the first record, and passes other
columns through. `num_proc` is for a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpref import __version__

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
STEPWISE = ("prompt, completions, labels", "input_ids, labels")
PROMPTS = ("prompt", "messages", "conversations", "instruction")
LEGACY = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "observation": "tool"}
ROLES |= {role: role for role in ROLES.values()}
CONVERTED = ("conversations", "messages", "instruction", "input", "system", "history")


def paired(dataset: Any, num_proc: int | None = None) -> Any:
    """`prompt, chosen, rejected`; token ids as they are.

    Raises:
        ValueError: says which columns there are and which are wanted, or which record is wrong.
    """
    columns, first = peek(dataset)
    if set(LEGACY) <= columns and "chosen_ids" not in columns:
        return dataset.rename_columns(LEGACY)
    if {"chosen_ids", "rejected_ids"} <= columns:
        return dataset
    if not {"chosen", "rejected"} <= columns:
        raise _not_understood(columns, PAIRED)
    convert = _pair_converter(columns, first)
    return dataset if convert is None else _map(dataset, convert, columns, num_proc)


def _pair_converter(columns: set[str], first: Record) -> Callable[[Record], Record] | None:
    if "prompt" not in columns:
        if columns & {"conversations", "messages"} and not _begins_before_the_response(first["chosen"]):
            return _pair_of_turns
        return _pair_of_instruction if "instruction" in columns else _pair_with_implicit_prompt
    prompt, response = is_conversational(first["prompt"]), is_conversational(first["chosen"])
    if response and not prompt:  # a copy of the question, which the messages begin with
        return _pair_with_implicit_prompt
    return _pair_of_messages if prompt and not response else None


def _begins_before_the_response(value: Any) -> bool:
    """Is it a whole conversation? Then `messages` beside it are a copy of one, as in UltraFeedback binarized."""
    return is_conversational(value) and value[0]["role"] != "assistant"


def _pair_of_turns(example: Record) -> Record:
    return {"prompt": _system(example) + _turns(example)} | _responses(example)


def _pair_of_instruction(example: Record) -> Record:
    return {"prompt": _instruction(example)} | _responses(example)


def _pair_of_messages(example: Record) -> Record:
    return _responses(example)


def _pair_with_implicit_prompt(example: Record) -> Record:
    """TRL's `extract_prompt`: all but what follows the first difference; texts part before a space."""
    chosen, rejected = example["chosen"], example["rejected"]
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, str | list):
            raise ValueError(f"{name}: got {type(value).__name__}, want a text or a list of messages")
    shorter = min(len(chosen), len(rejected))
    n = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(0, shorter - 1))
    if 0 < n < shorter and chosen[n] != rejected[n] and chosen[n - 1] == " ":
        n -= 1
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def unpaired(dataset: Any, num_proc: int | None = None) -> Any:
    """`prompt, completion, label`; token ids as they are. Pairs become two records each, ordered as in TRL: of every
    1,000 pairs first all chosen responses, then all rejected ones.

    Raises:
        ValueError: says which columns there are and which are wanted, or which record is wrong.
    """
    columns, _ = peek(dataset)
    if {"chosen", "rejected"} <= columns:
        dataset = paired(dataset, num_proc)
        # not by num_proc processes, on which the order would depend
        return dataset.map(_unpair, batched=True, batch_size=1000, remove_columns=column_names(dataset))
    if "label" in columns and ({"prompt", "completion"} <= columns or {"prompt_ids", "completion_ids"} <= columns):
        return dataset
    if "label" in columns and columns & {"conversations", "messages"}:
        return _map(dataset, _response_of_turns, columns, num_proc)
    raise _not_understood(columns, UNPAIRED + PAIRED[:-2])


def _unpair(batch: Record) -> Record:
    pairs = len(batch["chosen"])
    others = {name: values * 2 for name, values in batch.items() if name not in ("chosen", "rejected")}
    return others | {
        "completion": batch["chosen"] + batch["rejected"],
        "label": [True] * pairs + [False] * pairs,
    }


def _response_of_turns(example: Record) -> Record:
    *prompt, response = _turns(example)
    if response["role"] != "assistant":
        raise ValueError(f"messages: got a last one of role {response['role']!r}, want 'assistant'")
    return {"prompt": _system(example) + prompt, "completion": [response]}


def stepwise(dataset: Any, num_proc: int | None = None) -> Any:
    """`prompt, completions, labels`: a solution's steps and whether each is right; token ids as they are.

    Raises:
        ValueError: says which columns there are and which are wanted.
    """
    columns, _ = peek(dataset)
    if {"input_ids", "labels"} <= columns or {"prompt", "completions", "labels"} <= columns:
        return dataset
    raise _not_understood(columns, STEPWISE)


def prompts(dataset: Any, num_proc: int | None = None) -> Any:
    """`prompt`, and nothing else.

    Raises:
        ValueError: says which columns there are and which are wanted, or which record is wrong.
    """
    columns, _ = peek(dataset)
    if {"chosen", "rejected"} <= columns:
        dataset = paired(dataset, num_proc)
    elif "prompt" in columns:
        pass
    elif columns & {"conversations", "messages"}:
        dataset = _map(dataset, _prompt_of_turns, columns, num_proc)
    elif "instruction" in columns:
        dataset = _map(dataset, _prompt_of_instruction, columns, num_proc)
    else:
        raise _not_understood(columns, PROMPTS + PAIRED[:-2])
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
    """An `IterableDataset` may have to be begun to know its columns."""
    return list(dataset.column_names or peek(dataset)[1])


def peek(dataset: Any) -> tuple[set[str], Record]:
    """Columns and first record.

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


def _not_understood(columns: set[str], wanted: tuple[str, ...]) -> ValueError:
    return ValueError(f"dataset: got columns {', '.join(sorted(columns))}; want one of: {' | '.join(wanted)}")


def _map(dataset: Any, convert: Callable[[Record], Record], columns: set[str], num_proc: int | None) -> Any:
    options = {"num_proc": num_proc, "desc": "Converting records"} if hasattr(dataset, "__len__") else {}
    return dataset.map(
        _converted, with_indices=True, remove_columns=[name for name in CONVERTED if name in columns],
        # datasets finds a cached result by the function's name: not one of another version
        fn_kwargs={"convert": convert, "version": __version__}, **options,
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
    """LLaMA-Factory's reading of Alpaca records: `history` is a list of [question, answer]."""
    turns = _system(example)
    for question, answer in example.get("history") or []:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = "\n".join(part for part in (example["instruction"], example.get("input")) if part)
    return [*turns, {"role": "user", "content": text}]
