"""Hosts that do not install here, through stand-ins that call as they do, against the model's own logits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
from support import DEVICE, IGNORE
from support_models import model_of
from torch import Tensor, nn

from fastpref.integrations import llamafactory, openrlhf

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, labels) of 4 sequences: 2 chosen, 2 rejected, with completions of 3, 5, 4 and 2 tokens."""
    ids, labels = torch.randint(3, 61, (4, 9), device=DEVICE), torch.full((4, 9), IGNORE, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate([(3, 3), (2, 5), (4, 4), (3, 2)]):
        mask[row, : prompt + completion] = 1
        labels[row, prompt : prompt + completion] = ids[row, prompt : prompt + completion]
    return ids, mask, labels


def own_logits(model: nn.Module, ids: Tensor, mask: Tensor, **inputs) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits.float()


def gathered(logits: Tensor, ids: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


class PreferenceHost:
    """What LLaMA-Factory's CustomDPOTrainer has that its concatenated_forward reads."""

    accelerator = types.SimpleNamespace(unwrap_model=lambda model: model, autocast=contextlib.nullcontext)
    concatenated_forward = llamafactory.concatenated_forward

    def __init__(self, loss_type: str, ld_alpha: float | None = None) -> None:
        self.loss_type, self.ld_alpha = loss_type, ld_alpha


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi"])
@pytest.mark.parametrize(("loss_type", "ld_alpha"), [("sigmoid", None), ("simpo", None), ("sigmoid", 0.3)])
def test_llamafactory(family, loss_type, ld_alpha) -> None:
    model, (ids, mask, labels) = model_of(family), padded()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    host = PreferenceHost(loss_type, ld_alpha)
    found = host.concatenated_forward(model, batch)
    found["chosen_logps"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    logits = own_logits(model, ids, mask)
    scored = (labels[:, 1:] != IGNORE).float()
    logps, lengths = gathered(logits, ids) * scored, scored.sum(1)
    if ld_alpha is not None:
        short = torch.minimum(lengths[:2], lengths[2:]).repeat(2)
        first = labels.ne(IGNORE).int().argmax(1) - 1  # the position that scores the first completion token
        tail = torch.arange(8, device=DEVICE) >= (first + short)[:, None]
        logps = torch.where(tail, ld_alpha * logps, logps)
        reference = host.concatenated_forward(model, batch, is_ref_model=True)
        plain = (gathered(logits, ids) * scored).sum(1)
        torch.testing.assert_close(reference["rejected_logps"], plain[2:], **CLOSE)
    sums = logps.sum(1)
    wanted = sums / lengths if loss_type == "simpo" else sums
    torch.testing.assert_close(found["chosen_logps"], wanted[:2], **CLOSE)
    torch.testing.assert_close(found["rejected_logps"], wanted[2:], **CLOSE)
    torch.testing.assert_close(found["chosen_logps_avg"], (sums / lengths)[:2], **CLOSE)
    for name, side in (("chosen", slice(2)), ("rejected", slice(2, None))):
        torch.testing.assert_close(found[f"{name}_logits"], logits[side].mean().detach(), rtol=1e-4, atol=1e-5)


class Actor(nn.Module):
    """OpenRLHF's, as far as its forward goes: with logits."""

    packing_samples = False

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False, allgather_logits=False,
        return_logprobs=False, packed_seq_lens=None, return_entropy=False, **mm_inputs,
    ):  # fmt: skip
        positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        logits = own_logits(self.model, sequences, attention_mask, position_ids=positions)
        output = types.SimpleNamespace(logits=logits)
        if return_entropy:
            output.entropy = torch.distributions.Categorical(logits=logits[:, :-1]).entropy()
        if action_mask is None and not return_logprobs:
            return output
        logps = gathered(logits / self.temperature, sequences)
        if action_mask is not None:
            logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
        return (logps, output) if return_output else logps


@pytest.fixture
def actor_class(monkeypatch) -> type[Actor]:
    """A fresh stand-in, which `openrlhf.patch()` finds and patches."""
    fresh = type("Actor", (Actor,), {"forward": Actor.forward})
    package, submodule = types.ModuleType("openrlhf"), types.ModuleType("openrlhf.models")
    submodule.Actor = fresh
    monkeypatch.setitem(sys.modules, "openrlhf", package)
    monkeypatch.setitem(sys.modules, "openrlhf.models", submodule)
    return fresh


@pytest.mark.parametrize("case", ["actions", "actions and entropy", "all tokens", "all tokens at another temperature"])
def test_openrlhf(actor_class, case) -> None:
    model, (ids, mask, _) = model_of("Llama"), padded()
    actor = actor_class(model, temperature=0.7 if "temperature" in case else 1.0)
    action_mask = mask[:, -6:] if "actions" in case else None
    options = {"attention_mask": mask, "return_entropy": "entropy" in case, "return_output": "entropy" in case}
    options |= {"return_logprobs": "all" in case, "allgather_logits": False, "packed_seq_lens": None}
    wanted = actor(ids, action_mask, **options)
    openrlhf.patch()
    patched = actor_class.forward
    openrlhf.patch()
    assert actor_class.forward is patched
    model.lm_head.forward = lambda *_: pytest.fail("the model's own head ran")
    found = actor(ids, action_mask, **options)
    if "entropy" in case:
        entropies = [output.entropy[:, -6:] * action_mask for _, output in (found, wanted)]
        torch.testing.assert_close(*entropies, **CLOSE)
        (found[0].sum() + 0.1 * entropies[0].sum()).backward()
        found, wanted = found[0], wanted[0]
    torch.testing.assert_close(found * (1 if "actions" in case else mask[:, 1:]),
                               wanted * (1 if "actions" in case else mask[:, 1:]), **CLOSE)  # fmt: skip


class Engine(nn.Module):
    """As DeepSpeed's: its `config` is a dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.config, self.calls = module, {"train_batch_size": 1}, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_openrlhf_read_the_config_of_deepspeeds_engine(actor_class) -> None:
    model, (ids, mask, _) = model_of("Llama"), padded()
    engine = Engine(model)
    wanted = actor_class(model)(ids, mask[:, -6:], mask)
    openrlhf.patch()
    found = actor_class(engine)(ids, mask[:, -6:], mask)
    torch.testing.assert_close(found * mask[:, -6:], wanted * mask[:, -6:], **CLOSE)
    assert engine.calls == 1  # whose hooks gather weights and reduce gradients
    model.config.output_router_logits = True
    assert not openrlhf.supported(actor_class(engine), mask, True, False, {})


def test_openrlhf_keeps_its_code_for_the_rest(actor_class) -> None:
    model, (ids, mask, _) = model_of("Llama"), padded()
    actor = actor_class(model, temperature=0.7)
    openrlhf.patch()
    assert actor(ids, attention_mask=mask, return_output=True).logits.shape == (4, 9, 61)
    _, output = actor(ids, mask[:, -6:], mask, return_output=True, return_entropy=True)
    assert output.logits.shape == (4, 9, 61)  # an entropy beside a temperature
    assert not openrlhf.supported(actor, mask, True, False, {"pixel_values": ids})
    actor.packing_samples = True
    assert not openrlhf.supported(actor, mask, True, False, {})


@pytest.mark.parametrize(("name", "package"), [("llamafactory", "LLaMA-Factory"), ("openrlhf", "OpenRLHF")])
def test_a_missing_host(name, package) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"{package} is not installed; run `pip install {name}`"):
        importlib.import_module(f"fastpref.integrations.{name}").patch()


def test_llamafactory_is_patched(monkeypatch) -> None:
    host = type("CustomDPOTrainer", (), {"concatenated_forward": None})
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.dpo"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    trainer = types.ModuleType("llamafactory.train.dpo.trainer")
    trainer.CustomDPOTrainer = host
    monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    llamafactory.patch()
    assert host.concatenated_forward is llamafactory.concatenated_forward


def test_axolotl(monkeypatch) -> None:
    """The plugin, as Axolotl's manager makes and calls it, is one of its BasePlugin and patches TRL."""
    base = type(
        "BasePlugin", (), {"register": lambda self, cfg: None, "post_model_load": lambda self, cfg, model: None}
    )
    modules = {
        name: types.ModuleType(name) for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")
    }
    modules["axolotl.integrations.base"].BasePlugin = base
    modules["axolotl"].__spec__ = importlib.machinery.ModuleSpec("axolotl", None)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fastpref.integrations.axolotl", raising=False)
    plugin = importlib.import_module("fastpref.integrations.axolotl").FastprefPlugin()
    assert isinstance(plugin, base)
    called = []
    monkeypatch.setattr("fastpref.integrations.trl.patch", lambda: called.append(True))
    plugin.register({})
    plugin.pre_model_load({})
    assert called == [True]
    monkeypatch.delitem(sys.modules, "fastpref.integrations.axolotl")
