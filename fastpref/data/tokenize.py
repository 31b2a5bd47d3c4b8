"""Records to token ids, exactly as TRL 1.16 makes them, cut to their length.

Every function takes a `Dataset` or an `IterableDataset` as `fastpref.data.formats` gives it, or one of token ids, and
returns one with only the columns it names, and `length`: the row's tokens when what its sequences begin with is there
once. `num_proc` is for a `Dataset`, `name` for its progress bar and messages.

All raise ValueError where a record is wrong (its number is given), or where no record is left after those without room
for a response within `max_length` (None: never cut).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fastpref import __version__
from fastpref.data.collate import IGNORE_INDEX, common_prefix_length
from fastpref.data.encode import in_context, part, solution, wholes
from fastpref.data.formats import column_names
from fastpref.objectives.unpaired import mismatched_indices

Record = dict[str, Any]
IDS = ["int32"]  # a list of them
BATCH = 1000  # records that `map` passes at once

logger = logging.getLogger(__name__)


def tokenize_paired(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train"
) -> Any:
    """`prompt_ids, chosen_ids, rejected_ids` as TRL's `DPOTrainer` scores them.

    A text's response ends with the EOS token; of messages it is all that the chat template puts after the prompt with
    its generation header. The prompt ends where it stops being a prefix of either sequence. `ref_chosen_logps`,
    `ref_rejected_logps` and `margin` are passed through.
    """
    columns = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
    numbers = ("ref_chosen_logps", "ref_rejected_logps", "margin")
    return _tokenized(
        dataset, _paired_row, columns, numbers, name, num_proc, tokenizer=tokenizer, max_length=max_length
    )


def tokenize_unpaired(
    dataset: Any, tokenizer: Any, *, max_length: int | None, block_size: int | None, num_proc: int | None = None,
    name: str = "train",
) -> Any:  # fmt: skip
    """`prompt_ids, completion_ids, label`, and `kl_completion_ids` as TRL's `KTOTrainer` mismatches them: completions
    rotated by one within consecutive blocks of `block_size` records (None: without them). The prompt of a mismatched
    pair is the record's own. `ref_logps` is passed through; and `ref_KL_logps` with the `kl_completion_ids` that it
    belongs to, which then stay as they are.
    """
    columns: dict[str, Any] = {"prompt_ids": IDS, "completion_ids": IDS, "label": "bool"}
    numbers: tuple[str, ...] = ("ref_logps",)
    mismatched = block_size is not None and {"kl_completion_ids", "ref_KL_logps"} <= set(column_names(dataset))
    if mismatched:
        columns["kl_completion_ids"] = IDS
        numbers += ("ref_KL_logps",)
    dataset = _tokenized(
        dataset, _unpaired_row, columns, numbers, name, num_proc, tokenizer=tokenizer, max_length=max_length
    )
    found = {**columns, **_present(dataset, numbers), "length": "int32"}
    if block_size is not None:
        found["kl_completion_ids"] = IDS
    # by one process, or blocks would end where its share does; blocks are whole in every batch
    block = block_size or 1
    return dataset.map(
        _cut_and_mismatch, batched=True, batch_size=block * max(1, BATCH // block),
        features=_features(found),
        fn_kwargs={"max_length": max_length, "block_size": block_size, "version": __version__},
    )  # fmt: skip


def tokenize_reward(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train"
) -> Any:
    """`chosen_ids, rejected_ids`: whole sequences, as in TRL's `RewardTrainer`, which leaves out pairs of which one is
    longer than `max_length`. `margin` is passed through."""
    columns = {"chosen_ids": IDS, "rejected_ids": IDS}
    return _tokenized(
        dataset, _reward_row, columns, ("margin",), name, num_proc, tokenizer=tokenizer, max_length=max_length
    )


def tokenize_reference_free(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train"
) -> Any:
    """`prompt_ids, chosen_ids, rejected_ids, chosen_skip, rejected_skip` as TRL's `CPOTrainer` and `ORPOTrainer`
    score them: the chat template makes texts, whose sequences begin with one BOS token and end with one EOS token.

    A tokenizer may merge the end of the prompt with one response and not with the other. `prompt_ids` is what both
    contexts have in common, and the first `chosen_skip` (`rejected_skip`) tokens of a response still are its context.

    Unlike there, `tools` reach the template; None is no maximum length (there 512); and a pair of which a response
    would be left with no tokens is left out (there its loss is constant, or NaN where means are taken).
    """
    columns = {
        "prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS, "chosen_skip": "int32", "rejected_skip": "int32",
    }  # fmt: skip
    return _tokenized(
        dataset, _reference_free_row, columns, (), name, num_proc, tokenizer=tokenizer, max_length=max_length
    )


def tokenize_stepwise(
    dataset: Any, tokenizer: Any, *, max_length: int | None, max_prompt_length: int | None = None,
    max_completion_length: int | None = None, step_separator: str = "\n", train_on_last_step_only: bool = False,
    num_proc: int | None = None, name: str = "train",
) -> Any:  # fmt: skip
    """`input_ids, labels` as the `PRMTrainer` of TRL 1.13 makes them: a step's label (0 or 1) is at the last token of
    the separator that ends it, all others are -100.

    Of the prompt, with its BOS token, the last `max_prompt_length` tokens are kept; of the steps, all together, the
    first `max_completion_length`; of the sequence the first `max_length`.
    """
    columns = {"input_ids": IDS, "labels": IDS}
    return _tokenized(
        dataset, _stepwise_row, columns, (), name, num_proc, tokenizer=tokenizer, max_length=max_length,
        max_prompt_length=max_prompt_length, max_completion_length=max_completion_length,
        step_separator=step_separator, train_on_last_step_only=train_on_last_step_only,
    )  # fmt: skip


# one record each: its columns, or None where it is left out


def _paired_row(example: Record, tokenizer: Any, max_length: int | None) -> Record | None:
    prompt, (chosen, rejected) = part(example, ("chosen", "rejected"), tokenizer)
    if max_length is not None and len(prompt) >= max_length:
        return None
    chosen, rejected = (_cut(prompt, ids, max_length) for ids in (chosen, rejected))
    length = len(prompt) + len(chosen) + len(rejected)
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "length": length}


def _unpaired_row(example: Record, tokenizer: Any, max_length: int | None) -> Record | None:
    """The completion whole: it is cut after another prompt too."""
    prompt, (completion,) = part(example, ("completion",), tokenizer)
    if max_length is not None and len(prompt) >= max_length:
        return None
    if example["label"] not in (False, True):
        raise ValueError(f"label: got {example['label']!r}, want True or False")
    return {"prompt_ids": prompt, "completion_ids": completion, "label": bool(example["label"]), "length": 0}


def _cut_and_mismatch(batch: Record, max_length: int | None, block_size: int | None, version: str) -> Record:
    prompts, completions = batch["prompt_ids"], batch["completion_ids"]
    found = {"completion_ids": completions}
    if "kl_completion_ids" in batch:
        found["kl_completion_ids"] = batch["kl_completion_ids"]
    elif block_size is not None:
        others = mismatched_indices(len(completions), block_size) if block_size > 1 else range(len(completions))
        found["kl_completion_ids"] = [completions[i] for i in others]
    for column, responses in found.items():
        found[column] = [_cut(prompt, ids, max_length) for prompt, ids in zip(prompts, responses, strict=True)]
    lengths = [sum(map(len, row)) for row in zip(prompts, *found.values(), strict=True)]
    return batch | found | {"length": lengths}


def _reward_row(example: Record, tokenizer: Any, max_length: int | None) -> Record | None:
    if "chosen_ids" in example:
        chosen, rejected = example["chosen_ids"], example["rejected_ids"]
    else:
        chosen, rejected = wholes(example, tokenizer)
    if max_length is not None and max(len(chosen), len(rejected)) > max_length:
        return None
    length = len(chosen) + len(rejected) - common_prefix_length(chosen, rejected)
    return {"chosen_ids": chosen, "rejected_ids": rejected, "length": length}


def _reference_free_row(example: Record, tokenizer: Any, max_length: int | None) -> Record | None:
    pairs = [(context, _cut(context, answer, max_length)) for context, answer in in_context(example, tokenizer)]
    if not all(answer for _, answer in pairs):
        return None
    n = common_prefix_length(pairs[0][0], pairs[1][0])
    chosen, rejected = (context[n:] + answer for context, answer in pairs)
    return {
        "prompt_ids": pairs[0][0][:n], "chosen_ids": chosen, "rejected_ids": rejected,
        "chosen_skip": len(pairs[0][0]) - n, "rejected_skip": len(pairs[1][0]) - n,
        "length": n + len(chosen) + len(rejected),
    }  # fmt: skip


def _stepwise_row(
    example: Record, tokenizer: Any, max_length: int | None, max_prompt_length: int | None,
    max_completion_length: int | None, step_separator: str, train_on_last_step_only: bool,
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
    return {"input_ids": ids, "labels": labels, "length": len(ids)}


def _cut(prompt: Sequence[int], response: list[int], max_length: int | None) -> list[int]:
    return response if max_length is None else response[: max(0, max_length - len(prompt))]


# data sets


def _tokenized(
    dataset: Any, row: Callable[..., Record | None], columns: Mapping[str, Any], numbers: Sequence[str], name: str,
    num_proc: int | None, **options: Any,
) -> Any:  # fmt: skip
    found = {**columns, **_present(dataset, numbers), "length": "int32"}
    sized = hasattr(dataset, "__len__")
    result = dataset.map(
        _rows, batched=True, batch_size=BATCH, with_indices=True, remove_columns=column_names(dataset),
        features=_features(found),
        # datasets finds a cached result by the function's name: not one of another version
        fn_kwargs={"row": row, "columns": list(found), "options": options, "version": __version__},
        **({"num_proc": num_proc, "desc": f"Tokenizing {name} data"} if sized else {}),
    )  # fmt: skip
    if sized and len(result) < len(dataset):
        lost = f"{len(dataset) - len(result)} of {len(dataset)} records do not fit max_length={options['max_length']}"
        if not len(result):
            raise ValueError(f"max_length: got {options['max_length']}, want more: {lost} ({name})")
        logger.warning("%s: left out, %s", name, lost)
    return result


def _rows(
    batch: Record, indices: Sequence[int], row: Callable[..., Record | None], columns: Sequence[str], options: Record,
    version: str,
) -> Record:  # fmt: skip
    kept = []
    for index, example in zip(indices, _examples(batch), strict=True):
        try:
            found = row(example, **options)
        except ValueError as error:
            raise ValueError(f"dataset, record {index + 1}: {error}") from None
        if found is not None:
            kept.append(example | found)
    return {column: [found[column] for found in kept] for column in columns}


def _examples(batch: Record) -> Iterator[Record]:
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _present(dataset: Any, numbers: Sequence[str]) -> dict[str, str]:
    there = column_names(dataset)
    return {name: "float32" for name in numbers if name in there}


def _features(columns: Mapping[str, Any]) -> Any:
    from datasets import Features, Value

    return Features(
        {name: [Value(kind[0])] if isinstance(kind, list) else Value(kind) for name, kind in columns.items()}
    )
