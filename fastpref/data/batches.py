"""Sequences of token ids in padded batches of similar length, within windows that a stopped job can go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW_BATCHES = 8  # batches that are sorted by length together; what is at most lost when a job is stopped


def padded(rows: Sequence[Sequence[int]], pad_token_id: int, side: str) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both `[S, T]`, padded on the `"left"` or the `"right"`."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), pad_token_id), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask


def pad_id(tokenizer: Any, model: Any) -> int:
    """The token that fills up a batch of the model's.

    It may be any that has an embedding, and a pad token that was added to the tokenizer alone has none.
    """
    body = getattr(model, "backbone", model)
    table = body.get_input_embeddings() if hasattr(body, "get_input_embeddings") else None
    known = getattr(table, "num_embeddings", None)
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in named if i is not None and (known is None or i < known)), 0)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Batches of indices of similar length. The longest come first, so that a lack of memory shows early."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in range(0, len(order), batch_size):
        yield order[i : i + batch_size]


def by_prompt(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[int]:
    """Indices in an order in which those of one prompt follow one another, the longest first, as above.

    Those with an empty prompt have none in common: they are in the order of their lengths.
    """
    known = [tuple(prompt) for prompt in prompts]
    longest: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(known, lengths, strict=True):
        longest[prompt] = max(length, longest.get(prompt, 0))
    ranks = [(longest[prompt] if prompt else length, prompt) for prompt, length in zip(known, lengths, strict=True)]
    return sorted(range(len(ranks)), key=ranks.__getitem__, reverse=True)


def in_windows(
    run: Callable[[list[Any]], list[Any]], items: Sequence[Any], size: int, start: int = 0
) -> Iterator[list[Any]]:
    """Runs `run` on windows of `size` consecutive items. Yields what it returns for those from `start` on, a window at
    a time.

    The windows do not depend on `start`. One that is entered in its middle is run as a whole again.
    """
    for begin in range(start - start % size, len(items), size):
        window = run(list(items[begin : begin + size]))
        yield window[max(0, start - begin) :]
