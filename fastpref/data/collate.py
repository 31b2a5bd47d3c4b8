"""From text pairs to padded batches, for a training loop of your own: template, truncation, shifted labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.data.batches import padded
from fastpref.data.ids import IGNORE_INDEX, common_prefix_length
from fastpref.data.pairs import Pair
from fastpref.data.template import template_ids


class TokenizedPair(NamedTuple):
    """A pair as token ids. `prompt` is what both sequences begin with."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class PairBatch(NamedTuple):
    """A right-padded batch `[2B, T]`, the B chosen sequences first.

    `labels[s, t]` is the token that position t scores, or -100.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> PairBatch:
        return PairBatch(*(x.to(device) for x in self))


def tokenize_pair(pair: Pair, tokenizer: Any) -> TokenizedPair:
    """A pair's token ids, as TRL makes them.

    A completion is all that the template adds to the prompt with its generation header, including what closes the
    assistant's turn. The prompt ends where it stops being a prefix of either sequence.
    """
    prompt = template_ids(tokenizer, pair.prompt, add_generation_prompt=True)
    chosen = template_ids(tokenizer, pair.prompt + pair.chosen)
    rejected = template_ids(tokenizer, pair.prompt + pair.rejected)
    n = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return TokenizedPair(chosen[:n], chosen[n:], rejected[n:])


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, max_length: int) -> list[TokenizedPair]:
    """Tokenises pairs and cuts their sequences at `max_length` tokens.

    Pairs whose prompt leaves no room for a completion are left out.

    Raises:
        ValueError: no pair is left.
    """
    tokenized = (tokenize_pair(pair, tokenizer) for pair in pairs)
    kept = [
        TokenizedPair(prompt, chosen[: max_length - len(prompt)], rejected[: max_length - len(prompt)])
        for prompt, chosen, rejected in tokenized
        if len(prompt) < max_length
    ]
    if not kept:
        raise ValueError(
            f"max_length: got {max_length}, want more: the prompt alone is that long in each of {len(pairs)} pairs"
        )
    return kept


def collate_pairs(pairs: Sequence[TokenizedPair], pad_token_id: int) -> PairBatch:
    """Pads tokenised pairs into a batch."""
    sequences = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    ids, mask = padded([prompt + completion for prompt, completion in sequences], pad_token_id, "right")
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(sequences):
        first, end = max(len(prompt), 1), len(prompt) + len(completion)  # nothing scores a sequence's first token
        labels[row, first - 1 : end - 1] = ids[row, first:end]
    return PairBatch(ids, mask, labels)
