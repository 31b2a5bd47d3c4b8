"""Chooses how a model's batches are laid out: shared prompts, packed, or padded. Tried on the model before training."""

from __future__ import annotations

import warnings
from typing import Any

from fastpref.data.packing import LAYOUTS
from fastpref.data.vision import Vision
from fastpref.models import attention, has_parameters, inner_model, other_mixers, uncompiled
from fastpref.trainers.probe import batch_fault


def choose_layout(model: Any, wanted: str, vision: Vision | None = None) -> tuple[str, bool]:
    """The first layout in which this model gives each sequence the hidden states that it has alone.

    Layers that carry something from token to token in another way than attention (state spaces, convolutions) get
    padded batches, whatever their weights. Padding is on the right, where causal layers never see it. What a batch
    gives is tried on a few tokens, against the sequences one by one.

    Args:
        model: the model, with or without wrappers.
        wanted: a layout of `LAYOUTS` or `"auto"`. Other layouts are tried where it is not possible.
        vision: for data with images: sequences with images are tried.

    Returns:
        (layout, whether fastpref's attention runs it).

    Raises:
        ValueError: not even padded batches give each sequence what it has alone.
    """
    attention.capped_attention(inner_model(model))
    name = type(inner_model(model)).__name__
    tried = {"auto": LAYOUTS, "packed": ("packed", "padded"), "shared": LAYOUTS, "padded": ("padded",)}[wanted]
    reasons: list[str] = []
    others = [] if wanted == "padded" else other_mixers(model)
    if others:
        reasons = [f"{', '.join(others)} layers would carry one sequence of a packed row into the next"]
        tried = ("padded",)
    reason: str | None = None
    for layout in tried:
        # a model's own masks are not asked for packed rows with images: in those of Gemma 3 (transformers 5.23) some
        # tokens of the text see the next one
        own = [False] if layout == "packed" and vision is None else []
        for ours in [False] if layout == "padded" else [True, *own]:
            reason = _fault(model, layout, ours, vision)
            if reason is None:
                if wanted != layout and reasons and layout != "shared":
                    warnings.warn(f"layout: {name} runs {layout!r} batches ({'; '.join(reasons)})", stacklevel=3)
                return layout, ours
            reasons.append(f"not {layout!r}{'' if ours else ' with its own attention'}: {reason}")
    raise ValueError(f"model: got {name}, whose padded batches do not give each sequence what it has alone: {reason}")


def _fault(model: Any, layout: str, ours: bool, vision: Vision | None) -> str | None:
    """Why the model cannot run this layout, or None."""
    inner = inner_model(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not has_parameters(inner):  # sharded before the trainer
        known = ours and getattr(inner.config.get_text_config(), "layer_types", None)
        return None if known or layout == "padded" else "its parameters are not here to try it"
    if ours:
        try:
            attention.enable(inner)
        except (ValueError, NotImplementedError, AttributeError) as error:
            return str(error).splitlines()[0]
    try:
        with uncompiled(inner):
            fault = batch_fault(inner, layout, ours, vision)
    except Exception as error:  # a model may refuse packed rows in any way
        fault = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if fault is not None and ours:
        attention.disable(inner)
    return fault
