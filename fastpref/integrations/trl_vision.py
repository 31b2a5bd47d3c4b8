"""Packed batches of records with images, in place of those of TRL's collators: an image runs once for a pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.data import images
from fastpref.data.collators import PackedCollator, PairCollator, UnpairedCollator
from fastpref.data.formats import PAIR
from fastpref.data.tokenize import cut
from fastpref.integrations.trl_batches import KEY, PackingCollator

COLLATORS = ("DataCollatorForVisionPreference", "DataCollatorForVisionUnpairedPreference")  # TRL's own


@dataclass
class PackingPictures(PackingCollator):
    """Makes packed batches of TRL's records, with the processor and the length of TRL's collator."""

    def encoded(self, example: Mapping[str, Any], sides: Sequence[str]) -> dict[str, Any]:
        """A record as token ids, cut to its length.

        Raises:
            ValueError: its prompt leaves no room for a response, or an image is wrong.
        """
        found = images.encode(dict(example), self.collator.processor, sides)
        prompt, longest = found["prompt_ids"], self.collator.max_length
        if longest is not None and len(prompt) >= longest:
            raise ValueError(f"max_length: got {longest}, want more: a prompt with its images has {len(prompt)} tokens")
        return found | {f"{side}_ids": cut(prompt, found[f"{side}_ids"], longest) for side in sides}

    def own(self, cls: type[PackedCollator]) -> Any:
        """fastpref's collator of such records, which packs them as this one would."""
        return cls(
            self.pad_token_id, self.layout, self.ours, limits=self.limits, count_copies=self.count_copies,
            vision=self.vision,
        )  # fmt: skip

    def __call__(self, examples: Any) -> dict[str, Any]:
        part = self.own(PairCollator).part([self.encoded(example, PAIR) for example in examples])
        return {"index": torch.arange(2 * len(examples)), KEY: part}  # the trainer counts rows


@dataclass
class PackingUnpairedPictures(PackingPictures):
    """The same for KTO's single responses, with the mismatched completions of z0."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        found = [self.encoded(e, ("completion",)) | {"label": bool(e["label"])} for e in examples]
        own = self.own(UnpairedCollator)
        part = own.part(found)
        if not self.collator.calculate_kl:
            part["reference_part"] = dict(part)  # the same sequences: their images are made ready once
            return {"index": torch.arange(len(examples)), KEY: part}
        before = [example["completion_ids"] for example in found[-1:] + found[:-1]]
        longest = self.collator.max_length
        mismatched = [cut(e["prompt_ids"], ids, longest) for e, ids in zip(found, before, strict=True)]
        found = [e | {"kl_completion_ids": ids} for e, ids in zip(found, mismatched, strict=True)]
        part |= {"kl_part": own.kl_part(found), "reference_part": own.reference_part(found)}
        return {"index": torch.arange(len(examples)), KEY: part}
