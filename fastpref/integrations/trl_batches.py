"""Makes packed batches from the padded ones of TRL's collators, for `fastpref.integrations.trl_trainers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.data.collators import PackedCollator
from fastpref.data.packing import Scored

KEY = "fastpref"  # of the packed batch, in TRL's


def _sequences(batch: Mapping[str, Any], prefix: str = "") -> list[Scored]:
    """The sequences of a padded batch. Tokens in the completion mask are scored; without a mask, none is."""
    ids, attended = (batch[f"{prefix}{name}"].cpu().numpy() for name in ("input_ids", "attention_mask"))
    completion = batch[f"{prefix}completion_mask"].cpu().numpy() if f"{prefix}completion_mask" in batch else 0 * ids
    found = []
    for row, mask, scored in zip(ids, attended.astype(bool), completion.astype(bool), strict=True):
        of_row = scored[mask]
        first = int(of_row.argmax()) if of_row.any() else len(of_row)
        found.append(Scored(row[mask].tolist(), first, mask=of_row[first:]))
    return found


@dataclass
class PackingCollator(PackedCollator):
    """Wraps another collator: its padded batch, and in it, under `KEY`, the same sequences packed."""

    collator: Any = None

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = self.collator(examples)
        return {**batch, KEY: self.packed(batch)}

    def packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch's pairs, packed: [B chosen; B rejected]."""
        sequences = _sequences(batch)
        pairs = len(sequences) // 2
        part = self.pack(list(zip(sequences[:pairs], sequences[pairs:], strict=True)))
        return part | {
            "examples": pairs, "chosen_rows": int(part["cu_seqlens"][pairs]), "tokens": _tokens(sequences)
        }  # fmt: skip


@dataclass
class PackingUnpaired(PackingCollator):
    """The same for KTO's single responses."""

    def packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The completions, packed. With KTO's z0 also the mismatched completions, as a batch of their own.

        For a reference that is not precomputed there is one more batch, of both at once.
        """
        groups = [[s] for s in _sequences(batch)]
        part = self.pack(groups) | {"examples": len(groups), "tokens": _tokens([s for (s,) in groups])}
        part["desirable"] = torch.as_tensor(batch["label"]).bool()
        mismatched = [[s] for s in _sequences(batch, "KL_")] if "KL_input_ids" in batch else None
        if mismatched is not None:
            part["kl_part"] = self.pack(mismatched)
        if "ref_logps" not in batch:
            both = groups if mismatched is None else [a + b for a, b in zip(groups, mismatched, strict=True)]
            part["reference_part"] = self.pack(both)
        return part


def _tokens(sequences: list[Scored]) -> int:
    return sum(len(s.ids) for s in sequences)
