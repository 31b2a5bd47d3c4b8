"""Every family of vision-language models: its log-probs are those of its own logits, one sequence at a time."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from support_vision import FAMILIES, own_logps, records

from fastpref import linear_token_logprobs, models
from fastpref.data import images
from fastpref.data.collators import PairCollator
from fastpref.trainers import DPOConfig, DPOTrainer
from fastpref.trainers.forward import scored_hidden
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.vision import vision_of

# Gemma 3's image tokens see each other both ways, and Llama 4's layers attend in chunks of positions
PADDED = {"gemma3", "llama4"}


def layout_of(model, vision):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="layout")
        return choose_layout(model, "auto", vision)


def expected(family):
    return ("padded", False) if family in PADDED else ("shared", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_tries_models_in_half_precision(family):
    """Its own errors are below rounding there, too: the same layout as in fp32."""
    model, processor = FAMILIES[family]()
    assert layout_of(model.bfloat16(), vision_of(model, processor)) == expected(family)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.dtype}


@pytest.mark.parametrize("family", ["idefics3", "llama4"])
def test_pixels_come_in_the_dtype_of_a_model_in_double_precision(family):
    model, processor = FAMILIES[family]()
    assert layout_of(model.double(), vision_of(model, processor)) == expected(family)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits(family):
    model, processor = FAMILIES[family]()
    rows = records()
    wanted = [own_logps(model, processor, row, side)[1] for side in ("chosen", "rejected") for row in rows]
    vision = vision_of(model, processor)
    assert vision is not None
    head = models.output_head(model)
    layout, ours = layout_of(model, vision)
    assert (layout, ours) == expected(family)
    for wanted_layout in dict.fromkeys((layout, "padded")):
        collator = PairCollator(layout=wanted_layout, ours=ours and wanted_layout == layout, vision=vision)
        batch = collator.part([images.encode(row, processor, ("chosen", "rejected")) for row in rows])
        hidden = scored_hidden(model, batch)
        found = linear_token_logprobs(hidden, head.weight, batch["labels"], head.bias, **head.options())
        torch.testing.assert_close(found, torch.cat(wanted), rtol=0, atol=2e-5)


@pytest.mark.parametrize("pictures", [False, True])
def test_without_torchvision_texts_of_a_vision_language_model_train(pictures, tmp_path, monkeypatch):
    """Qwen's and Pixtral's processors ask for it. Their tokenizers were not taken in their place."""

    def missing(*args: Any, **options: Any) -> Any:
        raise ImportError("\nAVideoProcessor requires the Torchvision library but it was not found. Check out the page")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", missing)
    model, processor = FAMILIES["llava"]()
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    rows = [row | {"images": row["images"] if pictures else []} for row in records(2)]
    args = DPOConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    error = pytest.raises(ValueError, match="record 1: images: got 1, want none: the model reads texts only")
    with (
        pytest.warns(UserWarning, match="gives its tokenizer only, and images cannot be read: AVideoProcessor"),
        error if pictures else contextlib.nullcontext(),
    ):
        DPOTrainer(str(tmp_path), args=args, train_dataset=Dataset.from_list(rows)).train()
