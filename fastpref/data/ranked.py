"""Several ranked responses to a prompt: the accepted formats, and their token ids.

Accepted are records of

    prompt, responses, ranks         lower is better, equal ranks are ties
    prompt, responses, scores        higher is better: numbers; or those of several judges, which are averaged
    prompt_ids, responses_ids, ranks token ids
    pairs                            in any format of `fastpref.data.formats`; a column `tied` says which are ties

as `fastpref score` and `fastpref pairs --how list` write them. Prompts and responses are texts or messages. Tokens are
those of pairs: a response's do not depend on how many others the prompt has.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from fastpref.data import formats
from fastpref.data.encode import Response, part, token_ids, wholes
from fastpref.data.ids import common_prefix_length
from fastpref.data.images import has_images
from fastpref.data.judgements import COMBINE, judged_scores, ranks_of
from fastpref.data.tokenize import IDS, MASK, fitting, tokenized

logger = logging.getLogger(__name__)

Record = dict[str, Any]
FORMATS = ("prompt, responses, ranks", "prompt, responses, scores", "prompt_ids, responses_ids, ranks")
COLUMNS = {"prompt_ids": IDS, "list_ids": IDS, "list_sizes": IDS, "ranks": IDS}  # list_ids: one after the other


def is_ranked(dataset: Any) -> bool:
    """Whether the data set has several responses to a prompt in a record."""
    return dataset is not None and bool({"responses", "responses_ids"} & set(formats.column_names(dataset)))


def ranked(dataset: Any, num_proc: int | None = None) -> Any:
    """Any accepted format as `prompt, responses, ranks`, ranks from 0. Token ids stay as they are.

    Raises:
        ValueError: the columns are of no accepted format, or a record is wrong. The message says which.
    """
    columns, _ = formats.peek(dataset)
    if has_images(dataset):
        raise ValueError("dataset: got images with rankings, which fastpref does not support: want texts, or pairs")
    if {"prompt_ids", "responses_ids", "ranks"} <= columns:
        return dataset
    if {"prompt", "responses"} <= columns and columns & {"scores", "ranks"}:
        return formats.convert(dataset, _of_responses, columns, num_proc)
    if {"chosen", "rejected"} <= columns:
        dataset = formats.paired(dataset, num_proc)
        return formats.convert(dataset, _of_pair, set(formats.column_names(dataset)), num_proc)
    raise formats.not_understood(columns, FORMATS + formats.PAIRED[:-2])


def _sides(count: int) -> list[str]:
    """What messages call the responses."""
    return [f"response {i + 1}" for i in range(count)]


def _of_responses(example: Record) -> Record:
    responses = example["responses"]
    if not isinstance(responses, list) or not responses:
        raise ValueError(f"responses: got {responses!r:.80}, want a list of at least 1")
    sides = _sides(len(responses))
    found = formats.explicit({"prompt": example["prompt"], **dict(zip(sides, responses, strict=True))}, sides)
    ranks = _ranks(example, len(sides))
    return {"prompt": found["prompt"], "responses": [found[side] for side in sides], "ranks": ranks}


def _ranks(example: Mapping[str, Any], count: int) -> list[int]:
    """One rank for each response: `ranks`, where the record has them, else by `scores`."""
    name = "scores" if example.get("ranks") is None else "ranks"
    judged = judged_scores({name: example.get(name)}, count, name)
    missing = np.isnan(judged).any(0)
    if missing.any():
        raise ValueError(
            f"{name}: got none for response {int(missing.argmax()) + 1} of {count}, want one of each judge for each "
            "response (`fastpref pairs --how list` drops responses without)"
        )
    return ranks_of(COMBINE["mean"](judged))


def _of_pair(example: Record) -> Record:
    tied = example.get("tied")
    if tied not in (None, False, True):
        raise ValueError(f"tied: got {tied!r}, want True or False")
    return {
        "prompt": example["prompt"], "responses": [example["chosen"], example["rejected"]], "ranks": [0, int(not tied)]
    }  # fmt: skip


def tokenize_ranked(
    dataset: Any, tokenizer: Any, *, max_length: int | None, ties: bool, num_proc: int | None = None,
    name: str = "train", **options: bool,
) -> Any:  # fmt: skip
    """`prompt_ids, list_ids, list_sizes, ranks`: all responses' tokens in `list_ids`, cut by `list_sizes`.

    As in `fastpref.data.tokenize`; a list is left out if one of its responses has no room. It is also left out, with a
    count, if nothing in it can be compared: a single response, or all of one rank unless the loss knows `ties`.
    """
    masked = {"list_mask": MASK} if options.get("assistant_only_loss") else {}
    found = tokenized(
        dataset, _list_row, COLUMNS | masked, (), name, num_proc, tokenizer=tokenizer, max_length=max_length, **options
    )
    return _comparable(found, ties, name)


def tokenize_ranked_whole(
    dataset: Any, tokenizer: Any, *, max_length: int | None, ties: bool, num_proc: int | None = None,
    name: str = "train", **options: bool,
) -> Any:  # fmt: skip
    """The same of whole sequences, for reward models: `prompt_ids` are what all begin with.

    As for pairs, a list is left out if one of its sequences is longer than `max_length`.
    """
    found = tokenized(
        dataset, _whole_row, COLUMNS, (), name, num_proc, tokenizer=tokenizer, max_length=max_length, **options
    )
    return _comparable(found, ties, name)


def _given(example: Record) -> tuple[Record, list[str]]:
    """(the record with each response under a name of its own, these names)."""
    responses, ids = example["responses"], example.get("response_ids")
    sides = _sides(len(responses))
    named = dict(zip(sides, responses, strict=True))
    if ids is not None:
        if len(ids) != len(sides):
            raise ValueError(f"response_ids: got {len(ids)}, want {len(sides)}, one per response")
        named |= {f"{side}_response_ids": sampled for side, sampled in zip(sides, ids, strict=True)}
    return example | named, sides


def _row(prompt: list[int], responses: list[Response], ranks: list[int], remarks: int) -> Record:
    row: Record = {
        "prompt_ids": prompt, "list_ids": list(chain.from_iterable(r.ids for r in responses)),
        "list_sizes": [len(r.ids) for r in responses], "ranks": ranks, "remarks": remarks,
    }  # fmt: skip
    masks = [r.mask for r in responses if r.mask is not None]
    row |= {"list_mask": list(chain.from_iterable(masks))} if masks else {}
    return row | {"length": len(prompt) + len(row["list_ids"])}


def _ids_of(example: Record) -> list[list[int]]:
    """Responses that come as token ids."""
    found = example["responses_ids"]
    if not isinstance(found, list) or not found or not all(isinstance(ids, list) for ids in found):
        raise ValueError(f"responses_ids: got {found!r:.80}, want a list of lists of token ids")
    return found


def _list_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    if "responses_ids" in example:
        if options.get("assistant_only_loss"):
            raise ValueError("assistant_only_loss: got token ids, want messages: rankings of token ids have no masks")
        responses, remarks = [Response(ids) for ids in _ids_of(example)], 0
        prompt, sides, ranks = token_ids(example, "prompt_ids"), _sides(len(responses)), _ranks(example, len(responses))
    else:
        given, sides = _given(example)
        prompt, responses, remarks = part(given, sides, tokenizer, **options)
        ranks = example["ranks"]
    kept = fitting([prompt] * len(sides), responses, sides, max_length)
    return None if kept is None else _row(prompt, kept, ranks, remarks)


def _whole_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    if "responses_ids" in example:
        prompt, remarks = token_ids(example, "prompt_ids"), 0
        sequences = [prompt + ids for ids in _ids_of(example)]
        ranks = _ranks(example, len(sequences))
    else:
        given, sides = _given(example)
        (sequences, remarks), ranks = wholes(given, tokenizer, sides, **options), example["ranks"]
    for i, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"response {i + 1}: got no tokens, want at least 1")
    if max_length is not None and max(map(len, sequences)) > max_length:
        return None
    n = min(common_prefix_length(sequences[0], ids) for ids in sequences)
    return _row(sequences[0][:n], [Response(ids[n:]) for ids in sequences], ranks, remarks)


def _comparable(dataset: Any, ties: bool, name: str) -> Any:
    """The lists that say something, and how many do not. Of a stream they are not counted."""
    found = dataset.filter(_compares, input_columns=["ranks"], fn_kwargs={"ties": ties})
    if not hasattr(dataset, "__len__"):
        found.fastpref_remarks = getattr(dataset, "fastpref_remarks", None)
        return found
    lost = len(dataset) - len(found)
    reason = "nothing to compare: a single response" + ("" if ties else ", or all of one rank")
    if not len(found):
        raise ValueError(f"dataset: got {lost} lists with {reason} ({name})")
    if lost:
        logger.warning("%s: left out, %d of %d lists have %s", name, lost, len(dataset), reason)
    return found


def _compares(ranks: list[int], ties: bool) -> bool:
    return len(ranks) > 1 if ties else len(set(ranks)) > 1
