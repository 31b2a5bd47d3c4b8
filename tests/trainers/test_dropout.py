"""Dropout switched off is off: a model in training mode computes what it does in evaluation mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from support import DEVICE
from support_models import FAMILIES, RECENT, model_of
from support_trainers import QUIET, pairs, tiny
from support_zoo import tiny_model
from transformers import PretrainedConfig

from fastpref import trainers
from fastpref.trainers.loading import disable_dropout

NOISY = ["biogpt", "bloom", "falcon", "falcon_h1", "gpt_bigcode", "gpt_neo", "gptj", "opt", "phi", "xglm"]


def rates(config: Any) -> dict[str, Any]:
    """Every rate that the config has, at 0.3; those of configs inside of it too."""
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and rates(value):
            found[name] = value.to_dict() | rates(value)
        elif "drop" in name and isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = 0.3
    return found


def assert_off(model: Any, checkpointing: bool) -> None:
    if checkpointing and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.arange(4, 24, device=DEVICE)[None]

    def gradient(training: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model.train(training)(input_ids=ids, use_cache=False).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted = gradient(False)
    assert any(not torch.equal(a, b) for a, b in zip(gradient(True), wanted, strict=True)), "no dropout to switch off"
    disable_dropout(model)
    for found, expected in zip(gradient(True), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    if family in RECENT and not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    model = model_of(family, **rates(model_of(family).config))
    assert_off(model, checkpointing=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("architecture", NOISY)
def test_architectures(architecture):
    model = tiny_model(architecture)
    assert_off(tiny_model(architecture, 3.0, **rates(model.config)).to(DEVICE), checkpointing=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("architecture", ["biogpt", "llama"])
def test_at_learning_rate_zero_the_loss_is_log_2(architecture, precompute, tmp_path):
    tokenizer = tiny()[1]
    small = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = tiny_model(architecture, 3.0, **small, **rates(tiny_model(architecture).config))
    options = {"max_steps": 3, "learning_rate": 0.0, "gradient_checkpointing": True, "max_length": 128}
    args = trainers.DPOConfig(
        str(tmp_path), **(QUIET | options), precompute_ref_log_probs=precompute, reference_cache=str(tmp_path / "cache")
    )
    trainer = trainers.DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses == pytest.approx([math.log(2)] * 3, abs=1e-5)
