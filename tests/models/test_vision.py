"""Every family of vision-language models: its log-probs are those of its own logits, one sequence at a time."""

from __future__ import annotations

import warnings

import pytest
import torch
from support_vision import FAMILIES, own_logps, records

from fastpref import linear_token_logprobs, models
from fastpref.data import images
from fastpref.data.collators import PairCollator
from fastpref.trainers.forward import scored_hidden
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.vision import vision_of

# Gemma 3's image tokens see each other both ways, and Llama 4's layers attend in chunks of positions
PADDED = {"gemma3", "llama4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_tries_models_in_half_precision(family):
    """Its own errors are below rounding there, too: the same layout as in fp32."""
    model, processor = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layout")
        layout = choose_layout(model.bfloat16(), "auto", vision_of(model, processor))
    assert layout == (("padded", False) if family in PADDED else ("shared", True))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.dtype}


@pytest.mark.parametrize("family", ["idefics3", "llama4"])
def test_pixels_come_in_the_dtype_of_a_model_in_double_precision(family):
    model, processor = FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layout")
        layout = choose_layout(model.double(), "auto", vision_of(model, processor))
    assert layout == (("padded", False) if family in PADDED else ("shared", True))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family):
    model, processor = FAMILIES[family]()
    rows = records()
    wanted = [own_logps(model, processor, row, side)[1] for side in ("chosen", "rejected") for row in rows]
    vision = vision_of(model, processor)
    assert vision is not None
    head = models.output_head(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layout")
        layout, ours = choose_layout(model, "auto", vision)
    assert (layout, ours) == (("padded", False) if family in PADDED else ("shared", True))
    for wanted_layout in dict.fromkeys((layout, "padded")):
        collator = PairCollator(layout=wanted_layout, ours=ours and wanted_layout == layout, vision=vision)
        batch = collator.part([images.encode(row, processor, ("chosen", "rejected")) for row in rows])
        hidden = scored_hidden(model, batch)
        found = linear_token_logprobs(hidden, head.weight, batch["labels"], head.bias, **head.options())
        torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=2e-5)
