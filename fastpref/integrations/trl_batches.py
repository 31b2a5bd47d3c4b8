"""Packed batches from the padded ones of TRL's collators, for `fastpref.integrations.trl_trainers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastpref.data.collators import PackedCollator
from fastpref.data.packing import Scored

KEY = "fastpref"  # of the packed batch, in TRL's


def _sequences(batch: Mapping[str, Any], prefix: str = "") -> list[Scored]:
    """Those of a padded batch, of which the completion mask's tokens are scored; without one, none is."""
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
    """Another collator's padded batches, and in them, under `KEY`, the same sequences packed."""

    collator: Any = None

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = self.collator(examples)
        return {**batch, KEY: self.packed(batch)}

    def packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """[B chosen; B rejected], pair by pair."""
        sequences = _sequences(batch)
        pairs = len(sequences) // 2
        part = self.pack(list(zip(sequences[:pairs], sequences[pairs:], strict=True)))
        return part | {
            "examples": pairs, "chosen_rows": int(part["cu_seqlens"][pairs]), "tokens": _tokens(sequences)
        }  # fmt: skip


@dataclass
class PackingUnpaired(PackingCollator):
    def packed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The completions; the mismatched ones of KTO's z0, a batch of their own; for the reference, both at once."""
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
