"""The precision that training arguments choose: the device's, and a sentence where it is not the one that was asked."""

from __future__ import annotations

import warnings

import pytest
import torch
from support_trainers import METHODS, data_of, tiny

from fastpref import trainers
from fastpref.trainers import config as module

CONFIGS = [name for name in dir(trainers) if name.endswith("Config")]
SENTENCE = "there is no accelerator that has it; training is in fp32"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def without_bf16(monkeypatch):
    monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: False)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_by_default_where_the_device_has_it(name, monkeypatch, tmp_path) -> None:
    config_class = getattr(trainers, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{SENTENCE}")
        assert config_class(str(tmp_path), use_cpu=True).bf16
        assert not config_class(str(tmp_path), bf16=False).bf16
    monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: False)
    with pytest.warns(UserWarning, match=f"bf16: {SENTENCE}"):
        args = config_class(str(tmp_path))
    assert not args.bf16 and not args.fp16 and args.mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what transformers says without a GPU")
def test_bf16_that_was_asked_for_is_as_transformers_has_it(tmp_path) -> None:
    with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
        trainers.DPOConfig(str(tmp_path), bf16=True)
    assert trainers.DPOConfig(str(tmp_path), bf16=True, use_cpu=True).mixed_precision == "bf16"


def test_fp16_on_a_cpu_is_fp32_and_says_so(tmp_path) -> None:
    with pytest.warns(UserWarning, match=f"fp16: {SENTENCE}"):
        args = trainers.DPOConfig(str(tmp_path), fp16=True, use_cpu=True)
    assert not args.fp16 and not args.bf16 and args.mixed_precision == "no"
    with pytest.raises(ValueError, match="At most one of fp16 and bf16"):
        trainers.DPOConfig(str(tmp_path), fp16=True, bf16=True, use_cpu=True)


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize("method", ["dpo", "cpo"])
def test_a_newcomer_without_a_gpu(method, tmp_path, monkeypatch) -> None:
    """Nothing set at all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trainer_class, config_class, _ = METHODS[method]
    (model, tokenizer), data = tiny(), data_of(method).select(range(8))
    with pytest.warns(UserWarning, match=f"bf16: {SENTENCE}"):
        trainer = trainer_class(model, args=config_class("out"), train_dataset=data, processing_class=tokenizer)
    assert trainer.train().training_loss > 0
