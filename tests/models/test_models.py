"""Any causal language model as (hidden states, head): our log-probs against those of the model's own logits."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import transformers
from support import DEVICE
from support_models import FAMILIES, RECENT, SMALL, model_of
from torch import nn

from fastpref import linear_token_logprobs, models


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(3, 61, (2, 9), device=DEVICE), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    mask[1, -3:] = 0
    return ids, mask


def own_logps(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **inputs) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]


def our_logps(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **inputs) -> torch.Tensor:
    hidden, head = models.hidden_and_head(model, ids, mask, **inputs)
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    return linear_token_logprobs(hidden[:, :-1], head.weight, labels, head.bias, **head.options())


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_the_models_own(family, monkeypatch) -> None:
    if family in RECENT and not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    model, (ids, mask) = model_of(family), batch()
    models.output_head(model)
    wanted = own_logps(model, ids, mask)
    monkeypatch.setattr(model.get_output_embeddings(), "forward", lambda *_: pytest.fail("the model's own head ran"))
    found = our_logps(model, ids, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Phi", "Granite"])
def test_gradients_are_the_models_own(family) -> None:
    model, (ids, mask) = model_of(family), batch()
    gradients = []
    for logps in (own_logps, our_logps):
        model.zero_grad()
        logps(model, ids, mask).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_more_inputs_reach_the_backbone() -> None:
    model, (ids, mask) = model_of("GPT2"), batch()
    positions = torch.arange(9, device=DEVICE).flip(0).expand(2, 9)
    wanted = own_logps(model, ids, mask, position_ids=positions)
    torch.testing.assert_close(our_logps(model, ids, mask, position_ids=positions), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(our_logps(model, ids, mask), wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
def test_half_precision_heads_are_verified_too(family, dtype) -> None:
    model = model_of(family).to(dtype)
    models.output_head(model)
    layer = model.get_output_embeddings()
    layer.register_forward_hook(lambda layer, inputs, output: output * 1.2)
    with pytest.raises(ValueError, match="whose logits are not its hidden states times"):
        models.output_head(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_called_so(value) -> None:
    """They were called a head of another kind."""
    model = model_of("Llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match="whose logits are not finite; want weights without NaN and infinities"):
        models.output_head(model)


def test_verification_needs_no_eval_mode_and_leaves_no_hook() -> None:
    model = model_of("GPT2").train()
    assert model.config.resid_pdrop > 0
    models.output_head(model)
    assert model.training and not model.base_model._forward_hooks


def lora(model: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def test_adapters_inside_the_layers() -> None:
    model, (ids, mask) = lora(model_of("Llama")), batch()
    head = models.output_head(model)
    assert not head.weight.requires_grad
    wanted = own_logps(model, ids, mask)
    torch.testing.assert_close(our_logps(model, ids, mask), wanted, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        reference = own_logps(model, ids, mask)
        torch.testing.assert_close(our_logps(model, ids, mask), reference, rtol=1e-5, atol=1e-5)
    assert (wanted - reference).abs().max() > 1e-3


def test_a_head_that_is_trained_beside_adapters_is_the_active_copy() -> None:
    model, (ids, mask) = lora(model_of("Llama", tie_word_embeddings=False), modules_to_save=["lm_head"]), batch()
    original = models.inner_model(model).lm_head.original_module.weight
    trained = models.read_head(model).weight
    assert trained.requires_grad and trained is not original
    with torch.no_grad():
        trained.add_(torch.randn_like(trained))
    models.output_head(model)
    torch.testing.assert_close(our_logps(model, ids, mask), own_logps(model, ids, mask), rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert models.read_head(model).weight is original
        torch.testing.assert_close(our_logps(model, ids, mask), own_logps(model, ids, mask), rtol=1e-5, atol=1e-5)


def test_an_adapter_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(model_of("Llama", tie_word_embeddings=False), config)
    for function in (models.output_head, models.read_head):
        with pytest.raises(ValueError, match="model: got an adapter on the output head"):
            function(model)


def test_prompt_learning_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="model: got prompt learning"):
        models.output_head(peft.get_peft_model(model_of("Llama"), config))


def test_models_of_another_kind_are_refused() -> None:
    config = transformers.LlamaConfig(**SMALL)
    with pytest.raises(ValueError, match="got LlamaModel, which has no output embeddings"):
        models.output_head(transformers.LlamaModel(config))
    ids, mask = batch()
    with pytest.raises(ValueError, match="got LlamaModel, want a transformers causal language model"):
        models.hidden_states(transformers.LlamaModel(config), ids, mask)
    small = transformers.T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration, want a transformers causal language model"):
        models.hidden_states(transformers.T5ForConditionalGeneration(small), ids, mask)


def test_a_compiled_wrapper_was_passed_over() -> None:
    """`torch.compile(DDP(model))`: Accelerate's unwrapping returns the compiled object itself, and the gradients of
    the ranks were never reduced."""
    other = pytest.importorskip("accelerate.utils.other")

    class Wrapper(nn.DataParallel):  # one that Accelerate unwraps, in one process
        calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    bare = model_of("Llama")
    wrapper = Wrapper(bare)
    accelerator = types.SimpleNamespace(unwrap_model=other.extract_model_from_parallel, autocast=contextlib.nullcontext)
    assert models.run_inside(torch.compile(wrapper), accelerator, lambda model: model) is bare
    assert wrapper.calls == 1


def test_a_head_that_is_sharded_before_there_is_a_trainer_was_tried() -> None:
    """DeepSpeed's stage 3 leaves empty parameters, over which no forward runs."""
    model = model_of("Llama")
    model.model.embed_tokens.weight.data = torch.empty(0)
    assert models.output_head(model).weight is models.read_head(model).weight
