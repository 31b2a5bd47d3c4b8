"""The head is known, or refused, in whatever precision the model runs and whoever wrapped its forward before."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from support import DEVICE
from support_models import model_of
from torch import nn

from fastpref import linear_token_logprobs, models

REFUSED = "whose logits are not its hidden states times its output embeddings"
HALVES = (torch.bfloat16, torch.float16)


def prepared(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `Accelerator.prepare_model` leaves it: autocast around its forward, its outputs in fp32."""
    forward = torch.autocast(DEVICE, dtype)(model.forward.__func__)
    model.forward = types.MethodType(convert_outputs_to_fp32(forward), model)
    return model


def head_in_fp32(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    layer = model.to(dtype).get_output_embeddings().float()
    layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))
    return model


PRECISIONS = {
    "fp32": lambda model, dtype: model,
    "weights": lambda model, dtype: model.to(dtype),
    "prepared": prepared,
    "prepared twice": lambda model, dtype: prepared(prepared(model, torch.bfloat16), dtype),
    "weights, prepared": lambda model, dtype: prepared(model.to(dtype), dtype),
    "head in fp32": head_in_fp32,
    "head in fp32, prepared": lambda model, dtype: prepared(head_in_fp32(model, dtype), dtype),
}
CASES = [(how, dtype) for how in PRECISIONS for dtype in HALVES if how != "fp32" or dtype == HALVES[0]]


def family(how: str) -> str:
    return "Granite" if "twice" in how else "Llama"  # whose own division of the logits rounds otherwise than a product


@pytest.mark.parametrize(("how", "dtype"), CASES, ids=str)
def test_a_plain_head_is_known_and_another_one_refused(how, dtype) -> None:
    model = PRECISIONS[how](model_of(family(how), tie_word_embeddings=False), dtype)
    for around in (contextlib.nullcontext(), torch.autocast(DEVICE, dtype)):
        with around:
            inside = torch.is_autocast_enabled(DEVICE)
            models.output_head(model)
            assert torch.is_autocast_enabled(DEVICE) == inside
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, logits: logits * 1.03)
    with pytest.raises(ValueError, match=REFUSED):
        models.output_head(model)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_cap_that_fresh_weights_do_not_reach_is_refused(dtype) -> None:
    model = model_of("Llama", tie_word_embeddings=False).to(dtype)
    nn.init.normal_(model.lm_head.weight, std=0.002)
    models.output_head(model)
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: 30.0 * torch.tanh(logits / 30.0))
    with pytest.raises(ValueError, match=REFUSED):
        models.output_head(model)


def test_a_forward_that_was_replaced_is_the_one_that_is_tried() -> None:
    model = model_of("Llama")
    own = model.forward

    def forward(**inputs):
        output = own(**inputs)
        output.logits = output.logits + 1.0 * (torch.arange(output.logits.shape[-1], device=DEVICE) % 2)
        return output

    model.forward = forward
    with pytest.raises(ValueError, match=REFUSED):
        models.output_head(model)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_head_in_fp32_multiplies_in_fp32(dtype) -> None:
    model, ids = head_in_fp32(model_of("Llama", tie_word_embeddings=False), dtype), torch.arange(3, 12)[None].to(DEVICE)
    hidden, head = models.hidden_and_head(model, ids)
    found = linear_token_logprobs(hidden[:, :-1], head.weight, ids[:, 1:], head.bias, **head.options())
    wanted = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_4_bit_layers_pass_gradients_on_after_an_evaluation(tmp_path) -> None:
    """bitsandbytes repacks them for inference in a forward of evaluation mode, on CPUs with AVX512-BF16."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model_of("Llama", hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantised)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ids = torch.arange(3, 12)[None].to(model.device)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    models.output_head(model)
    models.hidden_states(model.train(), ids).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
