"""Prompts and their responses as prefix trees, for a training loop of one's own."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastpref import linear_token_statistics, models
from fastpref.data.collators import PackedCollator
from fastpref.data.packing import Scored
from fastpref.models import inner_model, limits
from fastpref.trainers.forward import by_sequence, head_hidden, head_labels, to_device
from fastpref.trainers.layout import choose_layout

# of each model, by what was asked for: it is not tried again for every file and every window
_layouts: weakref.WeakKeyDictionary[Any, dict[str, tuple[str, bool]]] = weakref.WeakKeyDictionary()


class ResponseLogps(NamedTuple):
    """Of the scored tokens of S responses, one response after the other: N tokens in all."""

    logps: Tensor  # [N], in nats, differentiable
    labels: Tensor  # [N], the tokens
    cu_seqlens: Tensor  # [S + 1], where each response begins
    entropy: Tensor | None  # [N], of the distribution that each token was drawn from, where asked for


class PromptTrees:
    """Log-probs of responses by a causal language model. What sequences begin with in common runs once.

    A prompt and its samples are one prompt and so many responses, turns that branch late run up to there once, and a
    response that is given twice enters the head once. Log-probs and gradients are those of separate sequences.

        trees = PromptTrees(model)
        found = trees([prompt] * len(samples), samples)
        out = loss_fn(found.logps, found.labels, advantages, cu_seqlens=found.cu_seqlens)

    Under DDP or FSDP call it inside of the wrapped model's forward (`fastpref.models.run_inside`).

    Args:
        model: of transformers, perhaps with PEFT's adapters. Its attention learns to take packed rows.
        layout: `"auto"`: trees, or what the model can run in their place; it is tried on a few tokens. Or one of
            `"shared"`, `"packed"` and `"padded"`.

    Raises:
        ValueError: the model does not even give sequences of a padded batch what each has alone.
    """

    def __init__(self, model: Any, layout: str = "auto") -> None:
        self.model = model
        known = _layouts.setdefault(model, {})
        if layout not in known:
            known[layout] = choose_layout(model, layout)
        self.layout, ours = known[layout]
        self._collator = PackedCollator(0, self.layout, ours, limits=limits(inner_model(model)))

    def batch(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int] | None] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Token ids of responses and of each one's prompt, packed, on the model's device.

        `masks` are 1 where a response's token is scored. The first token of a sequence is never scored.

        Raises:
            ValueError: not as many prompts as responses, or none; or a sequence is beyond the model's limits.
        """
        if len(prompts) != len(responses) or not responses:
            raise ValueError(f"responses: got {len(responses)} with {len(prompts)} prompts, want one prompt for each")
        given = itertools.repeat(None, len(responses)) if masks is None else masks
        sequences = [
            Scored([*prompt, *response], len(prompt), mask=mask)
            for prompt, response, mask in zip(prompts, responses, given, strict=True)
        ]
        return to_device(self._collator.pack([[s] for s in sequences]), next(self.model.parameters()).device)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """The hidden states `[U, d]` of the rows that the head multiplies: each with each token that it scores once."""
        return head_hidden(self.model, batch)

    def __call__(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
        masks: Sequence[Sequence[int] | None] | None = None, *, entropy: bool = False,
    ) -> ResponseLogps:  # fmt: skip
        """The log-probs of the responses' tokens, in 3 products with the head and its gradients (2 where it is frozen).

        Arguments and errors as in `batch`. `entropy`: also each token's, differentiable.
        """
        batch = self.batch(prompts, responses, masks)
        hidden, head = self.hidden(batch), models.read_head(inner_model(self.model))
        labels, scored = head_labels(batch)
        found = linear_token_statistics(
            hidden, head.weight, labels, head.bias, ("entropy",) if entropy else (),
            scored_rows=scored, **head.options(),
        )  # fmt: skip
        known = None if found.entropy is None else by_sequence(found.entropy, batch)
        return ResponseLogps(by_sequence(found.logps, batch), batch["labels"], batch["cu_seqlens"], known)
