"""Prompts with a completion each, or alone, as token ids and as batches: what distillation trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastpref.data.collators import Example, PackedCollator, response
from fastpref.data.encode import part, prompt_ids, token_ids
from fastpref.data.formats import column_names
from fastpref.data.hidden_cache import HiddenCache
from fastpref.data.packing import Scored
from fastpref.data.tokenize import IDS, Record, fitting, mask_columns, response_columns, tokenized

SIDE = ("completion",)


def has_completions(dataset: Any) -> bool:
    """Whether the records have completions, not prompts alone."""
    return bool({"completion", "completion_ids"} & set(column_names(dataset)))


def tokenize_completions(
    dataset: Any, tokenizer: Any, *, max_length: int | None, num_proc: int | None = None, name: str = "train",
    **options: bool,
) -> Any:  # fmt: skip
    """`prompt_ids, completion_ids`, and `completion_mask` where not all tokens of a completion are scored.

    Arguments and errors are those of the functions in `fastpref.data.tokenize`. A prompt alone has a completion of no
    tokens. It is left out if it has no room for one within `max_length`.
    """
    columns = {"prompt_ids": IDS, "completion_ids": IDS} | mask_columns(dataset, SIDE, options)
    row = _completion_row if has_completions(dataset) else _prompt_row
    return tokenized(dataset, row, columns, (), name, num_proc, tokenizer=tokenizer, max_length=max_length, **options)


def _completion_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    prompt, responses, found = part(example, SIDE, tokenizer, **options)
    kept = fitting([prompt], responses, SIDE, max_length)
    if kept is None:
        return None
    row = {"prompt_ids": prompt, "length": len(prompt) + len(kept[0].ids), "remarks": found}
    return row | response_columns(kept, SIDE)


def _prompt_row(example: Record, tokenizer: Any, max_length: int | None, **options: bool) -> Record | None:
    prompt = token_ids(example, "prompt_ids") if "prompt_ids" in example else prompt_ids(example, tokenizer)
    if not prompt:
        raise ValueError("prompt: got no tokens, want at least 1")
    if max_length is not None and len(prompt) >= max_length:
        return None
    masks: Record = {"completion_mask": []} if options.get("assistant_only_loss") else {}
    return {"prompt_ids": prompt, "completion_ids": [], "length": len(prompt)} | masks


@dataclass
class CompletionCollator(PackedCollator):
    """Prompts and completions, and where they are cached, the teacher's hidden states of the scored rows.

    Examples of one prompt run it once, as all that begins alike.
    """

    caches: dict[str, HiddenCache] = field(default_factory=dict)

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [[response(e, "completion")] for e in examples]

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        if "teacher_row" not in examples[0]:
            return {}
        rows = [self.caches[e["teacher_cache"]].rows(e["teacher_row"]) for e in examples]
        return {"teacher_hidden": torch.cat(rows)}

    def scored_rows(self, example: Example) -> int:
        """How many rows of an example score a token."""
        return len(response(example, "completion").tokens())
