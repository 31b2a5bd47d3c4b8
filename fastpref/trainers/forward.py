"""Runs a model's backbone on a packed batch: hidden states, and no logits."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.common.gather import take_rows
from fastpref.models import attention, backbone, for_head
from fastpref.models.vision import in_dtype, packed_decoder

INPUTS = ("input_ids", "attention_mask", "position_ids", attention.KWARG)


def run_backbone(model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
    """The backbone's output of a batch from `fastpref.data.packing.pack`."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    packed = attention.KWARG in inputs
    if "vision" in batch:
        inputs |= in_dtype(batch["vision"], model)
        segments = inputs.pop(attention.KWARG, None)
        with packed_decoder(model, segments) if packed else contextlib.nullcontext():
            return backbone(model)(**inputs, use_cache=False, **options)
    if packed:
        inputs["attention_mask"] = attention.prepared_mask(inputs["input_ids"])
    with attention.packed_rows() if packed else contextlib.nullcontext():
        return backbone(model)(**inputs, use_cache=False, **options)


def hidden_rows(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The backbone's last hidden states `[N, d]` of a batch from `fastpref.data.packing.pack`."""
    return for_head(model, run_backbone(model, batch).last_hidden_state).flatten(0, 1)


def scored_hidden(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The hidden states `[M, d]` of the rows that score a token, in the order of `labels`."""
    return hidden_rows(model, batch).index_select(0, batch["rows"])


def head_hidden(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The hidden states `[U, d]` of the rows that the head multiplies, in the order of `head_labels`."""
    return hidden_rows(model, batch).index_select(0, head_rows(batch))


def head_rows(batch: Mapping[str, Any]) -> Tensor:
    """The rows of a batch whose hidden states the head multiplies, once each: see `packing.distinct_rows`."""
    return batch.get("head_rows", batch["rows"])


def head_labels(batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """(the token that each of `head_rows` scores, how many of them are scored as `scored_rows` takes it)."""
    if "head_labels" not in batch:
        return batch["labels"], batch["sizes"]
    return batch["head_labels"], len(batch["head_labels"])


def at_head_rows(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Values of `rows` `[M, ...]` as values of `head_rows`: the inverse of `by_sequence`."""
    if "head_index" not in batch:
        return values
    index = batch["head_index"]
    one = torch.empty(len(batch["head_rows"]), dtype=torch.long, device=index.device)
    return values.index_select(0, one.scatter_(0, index, torch.arange(len(index), device=index.device)))


def by_sequence(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Values of `head_rows` as values of `rows` `[M]`, in the order of the sequences."""
    return take_rows(values, batch["head_index"]) if "head_index" in batch else values


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with all its tensors on a device."""
    return {
        name: to_device(value, device)
        if isinstance(value, dict)
        else value.to(device)
        if hasattr(value, "to")
        else value
        for name, value in batch.items()
    }
