"""Turns a data set's records into token ids, exactly as TRL 1.16 does, and cuts them to their length.

Every function takes a `Dataset` or an `IterableDataset` as `fastpref.data.formats` gives it, or one of token ids. It
returns one with only the columns that it names, and `length`: the row's number of tokens when the common beginning of
its sequences is there once. `num_proc` is for a `Dataset`, `name` for its progress bar and messages.

`options` are `responses_as_written`, and where tokens are scored `assistant_only_loss` (see
`fastpref.data.encode.part`); steps have none. With `assistant_only_loss`, or where the data has token ids with masks,
there are columns `chosen_mask, rejected_mask` or `completion_mask`: 0 or 1 for each token of a response.

What is left out and what is odd is said once, with its number. For a stream it is said at its end, too.

All raise ValueError if a record is wrong, with the record's number. They also do if no record is left, after those
without room for a response within `max_length` are left out (None: never cut).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastpref import __version__
from fastpref.data.encode import Response, in_context, part, solution, token_ids, wholes
from fastpref.data.formats import PAIR, column_names
from fastpref.data.ids import IGNORE_INDEX, common_prefix_length
from fastpref.data.images import prepared_columns
from fastpref.data.remarks import LEFT_OUT, Remarks, remarks_of, with_remarks
from fastpref.objectives.unpaired import mismatched_indices

Record = dict[str, Any]
IDS, MASK = ["int32"], ["int8"]  # lists of them
RESPONSES = ("completion_ids", "completion_mask", "kl_completion_ids", "kl_completion_mask")
BATCH = 1000  # records that `map` passes at once


def tokenize_paired(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train",
    **options: bool,
) -> Any:  # fmt: skip
    """`prompt_ids, chosen_ids, rejected_ids`, as TRL's `DPOTrainer` scores them.

    A text's response ends with the EOS token. Of messages, a response is all that the chat template puts after the
    prompt with its generation header. The prompt ends where it stops being a prefix of either sequence.

    `ref_chosen_logps` and `ref_rejected_logps` are passed through.
    """
    columns = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS} | mask_columns(dataset, PAIR, options)
    numbers = ("ref_chosen_logps", "ref_rejected_logps")
    return tokenized(
        dataset, _paired_row, columns, numbers, name, num_proc, tokenizer=tokenizer, max_length=max_length, **options
    )


def tokenize_unpaired(
    dataset: Any, tokenizer: Any, *, max_length: int | None, block_size: int | None, num_proc: int | None = None,
    name: str = "train", **options: bool,
) -> Any:  # fmt: skip
    """`prompt_ids, completion_ids, label`, and `kl_completion_ids`, mismatched as in TRL's `KTOTrainer`.

    For these, completions are rotated by one within consecutive blocks of `block_size` records (None: there are none).
    The prompt of a mismatched pair is the record's own.

    `ref_logps` is passed through. So is `ref_KL_logps`, together with the `kl_completion_ids` that it belongs to, which
    then stay as they are (and `kl_completion_mask`, where completions have masks).
    """
    masks = mask_columns(dataset, ("completion",), options)
    columns: dict[str, Any] = {"prompt_ids": IDS, "completion_ids": IDS, "label": "bool"} | masks
    numbers: tuple[str, ...] = ("ref_logps",)
    kl_columns = {"kl_completion_ids": IDS} | ({"kl_completion_mask": MASK} if masks else {})
    there = set(column_names(dataset))
    mismatched = block_size is not None and "ref_KL_logps" in there
    if mismatched and (missing := sorted(set(kl_columns) - there)):
        raise ValueError(f"ref_KL_logps: got a data set without {', '.join(missing)}, want both: it is of these tokens")
    if mismatched:
        columns |= kl_columns
        numbers += ("ref_KL_logps",)
    dataset = tokenized(
        dataset, _unpaired_row, columns, numbers, name, num_proc, tokenizer=tokenizer, max_length=max_length, **options
    )
    found = {**columns, **_present(dataset, numbers), **prepared_columns(dataset), "length": "int32"}
    if block_size is not None:
        found |= kl_columns
    # by one process, or blocks would end where its share does; blocks are whole in every batch
    block = block_size or 1
    result = dataset.map(
        _cut_and_mismatch, batched=True, batch_size=block * max(1, BATCH // block),
        features=_features(found),
        fn_kwargs={"max_length": max_length, "block_size": block_size, "version": __version__},
    )  # fmt: skip
    return with_remarks(result, remarks_of(dataset))


def tokenize_reward(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train",
    prompts: bool = False, **options: bool,
) -> Any:  # fmt: skip
    """`chosen_ids, rejected_ids`: whole sequences, as in TRL's `RewardTrainer`.

    As there, a pair is left out if one of its sequences is longer than `max_length`. `margin` is passed through. With
    `prompts` there is `prompt_hash`, which tells prompts apart.
    """
    columns = {"chosen_ids": IDS, "rejected_ids": IDS} | _prompt_hash(prompts)
    return tokenized(
        dataset, _reward_row, columns, ("margin",), name, num_proc, tokenizer=tokenizer, max_length=max_length,
        prompts=prompts, **options,
    )  # fmt: skip


def tokenize_reference_free(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train",
    **options: bool,
) -> Any:  # fmt: skip
    """`prompt_ids, chosen_ids, rejected_ids, chosen_skip, rejected_skip`, as TRL's `CPOTrainer` and `ORPOTrainer` score
    them.

    The chat template makes texts. Their sequences begin with one BOS token and end with one EOS token.

    A tokenizer may merge the end of the prompt with one response and not with the other. So `prompt_ids` is what both
    contexts have in common, and the first `chosen_skip` (`rejected_skip`) tokens of a response are still its context.

    Three things differ from TRL. `tools` reach the template. None means no maximum length (there 512). A pair is left
    out if one of its responses would have no tokens left (there its loss is constant, or NaN where means are taken).
    """
    columns = {
        "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "chosen_skip": "int32", "rejected_skip": "int32",
    } | mask_columns(dataset, PAIR, options)  # fmt: skip
    return tokenized(
        dataset, _reference_free_row, columns, (), name, num_proc, tokenizer=tokenizer, max_length=max_length, **options
    )


def tokenize_stepwise(
    dataset: Any, tokenizer: Any, *, max_length: int | None, max_prompt_length: int | None = None,
    max_completion_length: int | None = None, step_separator: str = "\n", train_on_last_step_only: bool = False,
    num_proc: int | None = None, name: str = "train", prompts: bool = False,
) -> Any:  # fmt: skip
    """`input_ids, labels`, as the `PRMTrainer` of TRL 1.13 makes them.

    A step's label (0 or 1) is at the last token of the separator that ends it. All other labels are -100.

    The last `max_prompt_length` tokens of the prompt, with its BOS token, are kept. Of the steps together the first
    `max_completion_length` are kept, and of the sequence the first `max_length`. `prompts` is as in `tokenize_reward`.
    """
    columns = {"input_ids": IDS, "labels": IDS} | _prompt_hash(prompts)
    return tokenized(
        dataset, _stepwise_row, columns, (), name, num_proc, tokenizer=tokenizer, max_length=max_length,
        max_prompt_length=max_prompt_length, max_completion_length=max_completion_length,
        step_separator=step_separator, train_on_last_step_only=train_on_last_step_only, prompts=prompts,
    )  # fmt: skip


# one record each: its columns, or None where it is left out


def _paired_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    prompt, responses, found = part(example, PAIR, tokenizer, **options)
    kept = fitting([prompt, prompt], responses, PAIR, max_length)
    if kept is None:
        return None
    length = len(prompt) + sum(len(response.ids) for response in kept)
    return {"prompt_ids": prompt, "length": length, "remarks": found} | response_columns(kept, PAIR)


def _unpaired_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    """A record's row. The completion stays whole here: it is cut later, after another prompt too."""
    prompt, responses, found = part(example, ("completion",), tokenizer, **options)
    if fitting([prompt], responses, ("completion",), max_length) is None:
        return None
    if example["label"] not in (False, True):
        raise ValueError(f"label: got {example['label']!r}, want True or False")
    row = {"prompt_ids": prompt, "label": bool(example["label"]), "length": 0, "remarks": found}
    return row | response_columns(responses, ("completion",))


def fitting(
    contexts: Sequence[list[int]], responses: Sequence[Response], sides: Sequence[str], max_length: int | None
) -> list[Response] | None:
    """The responses cut to their room after their contexts. None if one of them has no room, or nothing scored in it.

    Raises:
        ValueError: a response's mask scores nothing, whatever the room.
    """
    for side, response in zip(sides, responses, strict=True):
        if response.mask is not None and not response.scored:
            raise ValueError(f"{side}: got no token that is scored, want at least 1 that is the assistant's")
    if max_length is None:
        return list(responses)
    room = [max_length - len(context) for context in contexts]
    kept = [response.cut(max(0, length)) for response, length in zip(responses, room, strict=True)]
    if min(room) <= 0 or any(response.mask is not None and not response.scored for response in kept):
        return None
    return kept


def response_columns(responses: Sequence[Response], sides: Sequence[str]) -> Record:
    """`{side}_ids` of each response, and `{side}_mask` where it has a mask."""
    found: Record = {}
    for side, response in zip(sides, responses, strict=True):
        found[f"{side}_ids"] = response.ids
        if response.mask is not None:
            found[f"{side}_mask"] = response.mask
    return found


def _cut_and_mismatch(batch: Record, max_length: int | None, block_size: int | None, version: str) -> Record:
    prompts = batch["prompt_ids"]
    found = {name: batch[name] for name in RESPONSES if name in batch}
    if "kl_completion_ids" not in batch and block_size is not None:
        others = mismatched_indices(len(prompts), block_size) if block_size > 1 else range(len(prompts))
        found |= {f"kl_{name}": [values[i] for i in others] for name, values in found.items()}
    for column, responses in found.items():
        found[column] = [cut(prompt, ids, max_length) for prompt, ids in zip(prompts, responses, strict=True)]
    tokens = (values for name, values in found.items() if name.endswith("_ids"))
    lengths = [sum(map(len, row)) for row in zip(prompts, *tokens, strict=True)]
    return batch | found | {"length": lengths}


def _reward_row(
    example: Record, tokenizer: Any, max_length: int | None, prompts: bool, **options: bool
) -> Record | None:
    if "chosen_ids" in example:
        (chosen, rejected), found = (token_ids(example, f"{side}_ids") for side in PAIR), 0
    else:
        (chosen, rejected), found = wholes(example, tokenizer, PAIR, **options)
    for side, ids in zip(PAIR, (chosen, rejected), strict=True):
        if not ids:
            raise ValueError(f"{side}: got no tokens, want at least 1")
    if max_length is not None and max(len(chosen), len(rejected)) > max_length:
        return None
    common = common_prefix_length(chosen, rejected)
    asked = {"prompt_hash": _hash(example.get("prompt") or chosen[:common])} if prompts else {}
    length = len(chosen) + len(rejected) - common
    return {"chosen_ids": chosen, "rejected_ids": rejected, "length": length, "remarks": found} | asked


def _reference_free_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    contexts, responses, found = in_context(example, tokenizer, **options)
    for side, response in zip(PAIR, responses, strict=True):
        if not response.ids:
            raise ValueError(f"{side}: got a response of no tokens, want at least 1, such as EOS: its mean is taken")
    kept = fitting(contexts, responses, PAIR, max_length)
    if kept is None:
        return None
    n = common_prefix_length(*contexts)
    return {
        "prompt_ids": contexts[0][:n], "chosen_skip": len(contexts[0]) - n, "rejected_skip": len(contexts[1]) - n,
        "length": n + sum(len(context[n:] + r.ids) for context, r in zip(contexts, kept, strict=True)),
        "remarks": found,
    } | response_columns([r.behind(context[n:]) for context, r in zip(contexts, kept, strict=True)], PAIR)  # fmt: skip


def _stepwise_row(
    example: Record, tokenizer: Any, max_length: int | None, max_prompt_length: int | None,
    max_completion_length: int | None, step_separator: str, train_on_last_step_only: bool, prompts: bool,
) -> Record:  # fmt: skip
    if "input_ids" in example:
        ids, labels = example["input_ids"], example["labels"]
    else:
        prompt, steps, marks = solution(example, tokenizer, step_separator, train_on_last_step_only)
        if max_prompt_length is not None:
            prompt = prompt[max(0, len(prompt) - max_prompt_length) :]
        ids = prompt + steps[:max_completion_length]
        labels = [IGNORE_INDEX] * len(prompt) + marks[:max_completion_length]
    ids, labels = ids[:max_length], labels[:max_length]
    begins = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    asked = {"prompt_hash": _hash(example.get("prompt") or ids[:begins])} if prompts else {}
    return {"input_ids": ids, "labels": labels, "length": len(ids)} | asked


def _prompt_hash(wanted: bool) -> dict[str, Any]:
    return {"prompt_hash": "int64"} if wanted else {}


def _hash(prompt: Any) -> int:
    """Of a prompt's text, messages or token ids: 64 bits, for rows that do not tell where their prompts end."""
    text = json.dumps(prompt, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def cut(prompt: Sequence[int], response: list[int], max_length: int | None) -> list[int]:
    """What of a response has room after the prompt."""
    return response if max_length is None else response[: max(0, max_length - len(prompt))]


# data sets


def mask_columns(dataset: Any, sides: Sequence[str], options: Mapping[str, bool]) -> dict[str, Any]:
    """The mask columns that the rows will have."""
    there = set(column_names(dataset))
    given = [f"{side}_mask" for side in sides if f"{side}_mask" in there]
    if given and not {f"{side}_{kind}" for side in sides for kind in ("ids", "mask")} <= there:
        wanted = ", ".join(f"{side}_{kind}" for kind in ("ids", "mask") for side in sides)
        raise ValueError(
            f"{given[0]}: got one beside {', '.join(sorted(there - {*given}))}, want {wanted}: masks are of token ids"
        )
    return {f"{side}_mask": MASK for side in sides} if given or options.get("assistant_only_loss") else {}


def tokenized(
    dataset: Any, row: Callable[..., Record | None], columns: Mapping[str, Any], numbers: Sequence[str], name: str,
    num_proc: int | None, **options: Any,
) -> Any:  # fmt: skip
    """A data set row by row: what `row` makes of each record, without those for which it returns None."""
    found = {**columns, **_present(dataset, numbers), **prepared_columns(dataset), "length": "int32"}
    sized = hasattr(dataset, "__len__")
    told = Remarks(name, options["max_length"], stream=not sized)
    if sized:
        found |= {"record": "int64", "remarks": "int8"}
    # datasets finds a cached result by the function's name: not one of another version
    given: Record = {"row": row, "columns": list(found), "options": options, "version": __version__}
    given |= {"numbers": [number for number in numbers if number in found]}
    result = dataset.map(
        _rows, batched=True, batch_size=BATCH, with_indices=True, remove_columns=column_names(dataset),
        features=_features(found), fn_kwargs=given if sized else given | {"told": told, "seen": {}},
        **({"num_proc": num_proc, "desc": f"Tokenizing {name} data"} if sized else {}),
    )  # fmt: skip
    return _settled(result, len(dataset), told, given["numbers"]) if sized else with_remarks(result, told)


def _rows(
    batch: Record, indices: Sequence[int], row: Callable[..., Record | None], columns: Sequence[str], options: Record,
    version: str, numbers: Sequence[str], told: Remarks | None = None, seen: dict[str, bool] | None = None,
) -> Record:  # fmt: skip
    kept = []
    seen = {} if seen is None else seen
    for index, example in zip(indices, _examples(batch), strict=True):
        try:
            found = row(example, **options)
            for name in numbers:
                _check_number(name, example[name], seen)
        except ValueError as error:
            raise ValueError(f"dataset, record {index + 1}: {error}") from None
        flags = LEFT_OUT if found is None else found.pop("remarks", 0)
        if told is not None:
            told.add(index + 1, flags)
        if found is not None:
            kept.append(example | found | {"record": index + 1, "remarks": flags})
    return {column: [found[column] for found in kept] for column in columns}


def _check_number(name: str, value: Any, seen: dict[str, bool]) -> None:
    """A column of numbers has one in every record, or in none."""
    if value is not None and (isinstance(value, str) or not math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, want a finite number")
    if seen.setdefault(name, value is not None) != (value is not None):
        raise ValueError(_uneven(name, value))


def _uneven(name: str, value: Any) -> str:
    return f"{name}: got {value}, want a number in every record or in none; were files with and without read together?"


def _settled(result: Any, records: int, told: Remarks, numbers: Sequence[str]) -> Any:
    """Says what was found, and removes the columns that were there for that."""
    kept, found = (np.asarray(result.with_format("numpy")[name][:]) for name in ("record", "remarks"))
    flags = np.full(records, LEFT_OUT, dtype=np.int8)
    flags[kept.astype(np.int64) - 1] = found
    told.add_all(flags)
    if not len(result):
        lost = told.sentence(LEFT_OUT).removeprefix("left out, ")
        raise ValueError(f"max_length: got {told.max_length}, want more: {lost} ({told.name})")
    told.say()
    for name in numbers:
        empty = np.isnan(np.asarray(result.with_format("numpy")[name][:], dtype=np.float64))
        if empty.any() and not empty.all():
            raise ValueError(f"dataset, record {kept[empty.argmax()]}: {_uneven(name, None)}")
        if empty.all() and name.startswith("ref_"):
            result = result.remove_columns(name)
    return result.remove_columns(["record", "remarks"])


def _examples(batch: Record) -> Iterator[Record]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _present(dataset: Any, numbers: Sequence[str]) -> dict[str, str]:
    there = column_names(dataset)
    return {name: "float32" for name in numbers if name in there}


def _features(columns: Mapping[str, Any]) -> Any:
    from datasets import Features, Value

    kinds = {name: [Value(kind[0])] if isinstance(kind, list) else kind for name, kind in columns.items()}
    return Features({name: Value(kind) if isinstance(kind, str) else kind for name, kind in kinds.items()})
