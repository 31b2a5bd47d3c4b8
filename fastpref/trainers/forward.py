"""A model's hidden states of packed sequences, and the layout of them that it can run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.data.packing import LAYOUTS, Scored, pack
from fastpref.models import attention, backbone, has_parameters, inner_model

INPUTS = ("input_ids", "attention_mask", "position_ids", attention.KWARG)
ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention"))
WRONG = 0.1  # of the error of an attention that mixes sequences


def hidden_rows(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """The backbone's last hidden states `[N, d]` of a batch from `fastpref.data.packing.pack`."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    packed = attention.KWARG in inputs
    if packed:
        inputs["attention_mask"] = attention.prepared_mask(inputs["input_ids"])
    with attention.packed_rows() if packed else contextlib.nullcontext():
        output = backbone(model)(**inputs, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def scored_hidden(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Those of the rows that score a token `[M, d]`, in the order of `labels`."""
    return hidden_rows(model, batch).index_select(0, batch["rows"])


def choose_layout(model: Any, wanted: str) -> tuple[str, bool]:
    """(layout, whether fastpref's attention runs it) for this model: the first that gives its own hidden states.

    Tried on a few tokens, against the sequences one by one. Whether layers attend further back than these few tokens
    show (a recurrence, chunks) is read off the config.
    """
    tried = {"auto": LAYOUTS, "packed": ("packed", "padded"), "shared": LAYOUTS, "padded": ("padded",)}[wanted]
    reasons: list[str] = []
    for layout in tried:
        for ours in (True, False) if layout == "packed" else (layout == "shared",):
            reason = _fault(model, layout, ours)
            if reason is None:
                if wanted != layout and reasons and layout != "shared":
                    warnings.warn(
                        f"layout: {type(inner_model(model)).__name__} runs {layout!r} batches ({'; '.join(reasons)})",
                        stacklevel=3,
                    )
                return layout, ours
            reasons.append(f"not {layout!r}{'' if ours else ' with its own attention'}: {reason}")
    raise AssertionError("padded batches need nothing")


def _fault(model: Any, layout: str, ours: bool) -> str | None:
    """Why this model cannot run it, or None."""
    if layout == "padded":
        return None
    inner = inner_model(model)
    layers = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    if ours and not layers <= ATTENTION_LAYERS:
        return f"it has {', '.join(sorted(layers - ATTENTION_LAYERS))} layers"
    if getattr(inner.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not has_parameters(inner):
        return None if ours and layers else "its parameters are not here to try it"  # sharded before the trainer
    if ours:
        try:
            attention.enable(inner)
        except (ValueError, NotImplementedError, AttributeError) as error:
            return str(error).splitlines()[0]
    try:
        fault = _probe(inner, layout, ours)
    except Exception as error:  # a model may refuse packed rows in any way
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault is not None and ours:
        attention.disable(inner)
    return fault


@torch.no_grad()
def _probe(inner: Any, layout: str, ours: bool) -> str | None:
    device = next(inner.parameters()).device
    vocab = inner.config.get_text_config().vocab_size
    ids = (torch.arange(24) * 7 + 3).remainder(vocab).tolist()
    prompt, other = ids[:5], ids[5:8]
    groups = [
        [Scored(prompt + ids[8:12], 1), Scored(prompt + ids[12:18], 1)],
        [Scored(other + ids[18:20], 1), Scored(other + ids[20:24], 1)],
    ]
    training = inner.training
    inner.eval()
    try:
        batch = to_device(pack(groups, layout), device)
        if not ours:
            batch.pop(attention.KWARG)
        found = scored_hidden(inner, batch)
        dtype, found = found.dtype, found.float()
        alone = [to_device(pack([[s]], "padded"), device) for branch in zip(*groups, strict=True) for s in branch]
        wanted = torch.cat([scored_hidden(inner, b) for b in alone]).float()
        careless = {"input_ids": batch["input_ids"], "rows": batch["rows"]}  # as if it were one sequence
        worst = float((scored_hidden(inner, careless).float() - wanted).abs().max())
    finally:
        inner.train(training)
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    rounding = max(1e-5, 8 * torch.finfo(dtype).eps) * size
    # where even a careless attention is within rounding (half precision, weights just initialised), only the layers'
    # types can tell
    if error <= WRONG * worst or (error <= rounding and (dtype == torch.float32 or worst <= rounding)):
        return None
    return f"its hidden states differ by {error:.1e}"


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}
