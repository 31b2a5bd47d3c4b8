"""Collators of the trainers: they make packed batches from examples of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastpref.data.formats import PAIR
from fastpref.data.ids import IGNORE_INDEX
from fastpref.data.packing import Scored, in_order, pack, split_by_tokens
from fastpref.data.vision import Vision, context_of
from fastpref.models import Limits, attention
from fastpref.reference import comparisons

Example = dict[str, Any]


class Kept:
    """A batch's examples, wrapped so that code that looks for tensors in batches does not look into them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples


@dataclass
class PackedCollator:
    """Makes batches `{"index": [B], "parts": [...]}`.

    A part is a packed batch of consecutive examples of at most `token_budget` tokens, with their numbers (margins,
    reference log-probs) beside it. `ours` says that fastpref's attention runs packed rows.
    """

    pad_token_id: int = 0
    layout: str = "padded"
    ours: bool = False
    token_budget: int | None = None
    keep_examples: bool = False  # beside the batch, as `kept`
    limits: Limits | None = None  # of the model
    count_copies: bool = False  # of each token: for what sums over tokens, such as a router's loss
    vision: Vision | None = None  # for examples with images

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        """The sequences of each example."""
        raise NotImplementedError

    def pictures(self) -> Vision | None:
        """`vision`, if the data have images."""
        return self.vision if self.vision is not None and self.vision.seen else None

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        """What a part holds besides its sequences."""
        return {}

    def pack(self, groups: Sequence[Sequence[Scored]], examples: Sequence[Example] = ()) -> dict[str, Any]:
        """Packs the sequences into one batch, with the images of their examples beside them.

        Raises:
            ValueError: a sequence is beyond the model's limits.
        """
        if self.limits is not None:
            self.limits.check(s.ids for group in groups for s in group)
        sequences = self.in_order(groups)
        batch = pack(sequences, self.layout, self.pad_token_id, count_copies=self.count_copies)
        places, targets = batch.pop("places"), batch.pop("targets")
        if self.vision is not None and examples and "pixels" in examples[0]:
            shape = batch["input_ids"].shape
            batch["vision"] = self.vision.inputs(sequences, examples, self.layout, places, shape)
        if not self.ours:
            batch.pop(attention.KWARG, None)
        return batch | self.placed(places, targets, examples)

    def in_order(self, groups: Sequence[Sequence[Scored]]) -> list[Scored]:
        """The sequences of all groups in the order of a batch."""
        return in_order(groups)

    def placed(
        self, places: Sequence[np.ndarray], targets: torch.Tensor, examples: Sequence[Example]
    ) -> dict[str, Any]:
        """What a part holds of its tokens: `places` and `targets` are as in `fastpref.data.packing.pack`."""
        return {}

    def part(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One part: the packed examples and what belongs to them."""
        groups = self.groups(examples)
        tokens = sum(len(s.ids) for group in groups for s in group)
        return self.pack(groups, examples) | self.extras(examples) | {"examples": len(examples), "tokens": tokens}

    def split(
        self, examples: Sequence[Example], grouped: Callable[[Sequence[Example]], list[list[Scored]]] | None = None
    ) -> list[Sequence[Example]]:
        """The examples of each part. `grouped` gives the sequences that it runs, by default `groups`."""
        if self.token_budget is None:
            return [examples]
        ranges = split_by_tokens((grouped or self.groups)(examples), self.layout, self.token_budget)
        return [examples[r.start : r.stop] for r in ranges]

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        parts = [self.part(some) for some in self.split(examples)]
        batch = {"index": torch.arange(len(examples)), "parts": parts}
        return batch | {"kept": Kept(examples)} if self.keep_examples else batch


@dataclass
class PairCollator(PackedCollator):
    """Pairs of `prompt_ids, chosen_ids, rejected_ids`, and perhaps the reference's log-probs, as `[B chosen; B
    rejected]`.

    With `score_prompts` the chosen prompts have rows too, labelled by `prompt_labels` only (for ORPO's NLL).
    """

    score_prompts: bool = False

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        sides = (("chosen", 1 if self.score_prompts else None), ("rejected", None))
        vision = self.pictures() if self.score_prompts else None
        without = frozenset() if vision is None else vision.image_tokens
        return [
            [
                response(e, side, e.get(f"{side}_skip", 0), kept, without if kept else frozenset())
                for side, kept in sides
            ]
            for e in examples
        ]

    def part(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = super().part(examples)
        return batch | {"chosen_rows": int(batch["cu_seqlens"][len(examples)])}

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if examples[0].get("ref_chosen_logps") is not None:
            sides = [[e[f"ref_{side}_logps"] for e in examples] for side in PAIR]
            found["ref_logps"] = torch.tensor(sides[0] + sides[1], dtype=torch.float32)
        return found

    def placed(
        self, places: Sequence[np.ndarray], targets: torch.Tensor, examples: Sequence[Example]
    ) -> dict[str, Any]:
        return {"prompt_labels": targets} if self.score_prompts else {}


@dataclass
class RewardCollator(PackedCollator):
    """Pairs of `chosen_ids, rejected_ids` (and `margin`): whole sequences, scored by their last row."""

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [
            [Scored(ids, len(ids), context=context_of(e)) for ids in (e["chosen_ids"], e["rejected_ids"])]
            for e in examples
        ]

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        margins = [e.get("margin") for e in examples]
        if all(margin is None for margin in margins):
            return {}
        if None in margins:
            raise ValueError(f"margin: got None beside {next(m for m in margins if m is not None)}, want all or none")
        return {"margin": torch.tensor(margins, dtype=torch.float32)}


@dataclass
class ListCollator(PackedCollator):
    """Ranked responses as `prompt_ids, list_ids, list_sizes, ranks`, perhaps with a reference's log-probs.

    The sequences of a batch are prompt after prompt.

    With `whole` nothing is scored token by token: a reward is of the last row.
    """

    whole: bool = False

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [[self._sequence(e, start, end) for start, end in _cuts(e["list_sizes"])] for e in examples]

    def _sequence(self, example: Example, start: int, end: int) -> Scored:
        prompt, ids = example["prompt_ids"], example["prompt_ids"] + example["list_ids"][start:end]
        mask = example.get("list_mask")
        return Scored(ids, len(ids) if self.whole else len(prompt), None, None if mask is None else mask[start:end])

    def in_order(self, groups: Sequence[Sequence[Scored]]) -> list[Scored]:
        return [sequence for group in groups for sequence in group]

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        sizes = [len(e["ranks"]) for e in examples]
        ranks, group = torch.cat([torch.tensor(e["ranks"]) for e in examples]), torch.arange(len(sizes))
        group = group.repeat_interleave(torch.tensor(sizes))
        found: dict[str, Any] = {"ranks": ranks, "group": group, "groups": tuple(sizes)}
        if self.whole:  # here, since an accelerator would have to be waited for
            found["compared"] = comparisons(ranks, group)._asdict()
        if examples[0].get("ref_logps") is not None:
            found["ref_logps"] = torch.cat([torch.tensor(e["ref_logps"], dtype=torch.float32) for e in examples])
        return found


def _cuts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))


@dataclass
class StepCollator(PackedCollator):
    """Solutions as `input_ids, labels`: a step's label is at the row where the step ends."""

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [[Scored(e["input_ids"], len(e["input_ids"]))] for e in examples]

    def placed(
        self, places: Sequence[np.ndarray], targets: torch.Tensor, examples: Sequence[Example]
    ) -> dict[str, Any]:
        labels = [np.asarray(e["labels"]) for e in examples]
        rows = [at[x != IGNORE_INDEX] for at, x in zip(places, labels, strict=True)]
        marks = np.concatenate([x[x != IGNORE_INDEX] for x in labels])
        return {"step_rows": torch.from_numpy(np.concatenate(rows)), "step_labels": torch.from_numpy(marks)}


@dataclass
class UnpairedCollator(PackedCollator):
    """Single responses as `prompt_ids, completion_ids, label`.

    KTO's mismatched `kl_completion_ids` become parts of their own.
    """

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [[response(e, "completion")] for e in examples]

    def extras(self, examples: Sequence[Example]) -> dict[str, Any]:
        found: dict[str, Any] = {"desirable": torch.tensor([bool(e["label"]) for e in examples])}
        if "ref_logps" in examples[0]:
            found["ref_logps"] = torch.tensor([e["ref_logps"] for e in examples], dtype=torch.float32)
        return found

    def kl_groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        """The sequences of the mismatched completions."""
        return [[response(e, "kl_completion")] for e in examples]

    def kl_part(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The mismatched completions, as a part."""
        part = self.pack(self.kl_groups(examples), examples)
        part["examples"] = len(examples)
        if "ref_KL_logps" in examples[0]:
            part["ref_logps"] = torch.tensor([e["ref_KL_logps"] for e in examples], dtype=torch.float32)
        return part

    def reference_part(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Both completions of each prompt, for a pass without gradients: [B; B mismatched]."""
        groups = [[response(e, side) for side in ("completion", "kl_completion")] for e in examples]
        return self.pack(groups, examples) | {"examples": len(examples)}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        batch = super().__call__(examples)
        if "kl_completion_ids" in examples[0]:
            batch["kl_parts"] = [self.kl_part(some) for some in self.split(examples, self.kl_groups)]
        return batch


def response(
    example: Example, side: str, skip: int = 0, kept: int | None = None, without: frozenset[int] = frozenset()
) -> Scored:
    """A response after its prompt. Its first `skip` tokens still count as context."""
    prompt, ids, mask = example["prompt_ids"], example[f"{side}_ids"], example.get(f"{side}_mask")
    scored = None if mask is None else mask[skip:]
    return Scored(prompt + ids, len(prompt) + skip, kept, scored, without, context_of(example))
