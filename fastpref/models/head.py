"""A language model in two parts: the backbone that gives hidden states, and the output head that gives logits.

A loss from hidden states takes them one by one, so that the logits `[S, T, V]` never exist.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.models.layers import base, decoder
from fastpref.models.vision import Headless, takes_pixels
from fastpref.models.wrappers import evaluating, has_parameters, inner_model, uncompiled, whole

HEAD_TOLERANCE = 1e-4  # relative; two ways of computing logits in fp32 differ by some 1e-6
PROBED, LARGEST_HIDDEN = 50.0, 2.0**14  # the largest logit and hidden state of a probe; fp16 ends at 2^16
SOFTCAPS = {"recurrent_gemma": ("logits_soft_cap",), "xlstm": ("output_logit_soft_cap",)}  # configs with other names


class Head(NamedTuple):
    """An output head: `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`; no cap if it is None."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        """Scale and soft cap as the keyword arguments of fastpref's losses."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d]`, in the dtype of `hidden`."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The last hidden states `[S, T, d]`, without the logits `[S, T, V]` that the model itself would go on to.

    `input_ids` and `attention_mask` are `[S, T]`. `inputs` are other arguments of the model's own forward, such as
    `position_ids`. Wrappers (DDP, FSDP, DeepSpeed) do their work around the model's forward. Under one of them, call
    this from inside its forward (`run_inside`).
    """
    output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return for_head(model, output.last_hidden_state)


def for_head(model: Any, hidden: Tensor) -> Tensor:
    """Hidden states in the dtype of the output layer's weight.

    A head that is kept in fp32 above a backbone in half precision is multiplied in fp32. Under autocast the hidden
    states stay as they are: autocast decides.
    """
    inner = inner_model(model)
    layer: Any = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if getattr(layer, "weight", None) is None or torch.is_autocast_enabled(hidden.device.type):
        return hidden
    return hidden.to(layer.weight.dtype) if layer.weight.is_floating_point() else hidden


def backbone(model: Any) -> Any:
    """The part of a causal language model that gives its hidden states: all but the head.

    Raises:
        ValueError: the model is of another kind, or has prompt learning (whose prompts enter before the backbone).
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("model: got prompt learning, whose prompts enter before the backbone; want other adapters")
    model = inner_model(model)
    found = base(model)
    if takes_pixels(model) and (found is model or not takes_pixels(found)):
        return Headless(model)
    if found is model or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: got {type(model).__name__}, want a transformers causal language model")
    return found


def compile_backbone(model: Any, accelerator: Any, args: Any) -> None:
    """Compile all of the model but its head, in place and once for all lengths.

    That is what `torch_compile=True` does in our trainers. Accelerate would compile the forward that builds logits, so
    its own compilation is turned off.

    Args:
        accelerator: Accelerate's `Accelerator`.
        args: transformers' `TrainingArguments`. They say which backend and which mode.
    """
    accelerator.state.dynamo_plugin.backend = type(accelerator.state.dynamo_plugin.backend).NO
    backbone(model).compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)


def hidden_and_head(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Head]:
    """(`hidden_states`, `read_head`): all that a loss from hidden states takes, for any causal language model.

    It is for training loops, so it does not try out the head. Call `output_head(model)` once before the loop.
    """
    return hidden_states(model, input_ids, attention_mask, **inputs), read_head(model)


def read_head(model: Any) -> Head:
    """The model's output layer as it is now.

    Read it anew in every forward, since FSDP and PEFT exchange its weight. A sharded weight (a DTensor) is gathered,
    and its gradients go back to the shards.

    Raises:
        ValueError: there is no output layer, or it has an adapter beside its weight, or its weight is quantised.
    """
    model = inner_model(model)
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(f"model: got {type(model).__name__}, which has no output embeddings; want a language model")
    if _has_adapter(layer):
        raise ValueError(
            "model: got an adapter on the output head, whose log-probs are formed from its weight alone; want "
            "target_modules without it (modules_to_save may name it)"
        )
    weight: Any = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(
            f"model: got a quantised output head ({type(layer).__name__}), want it in floating point: "
            "llm_int8_skip_modules=['lm_head'] in the quantization_config"
        )
    bias = getattr(layer, "bias", None)
    return Head(whole(layer.weight), None if bias is None else whole(bias), *_logit_transform(model))


def output_head(model: Any) -> Head:
    """`read_head`, after one forward over a few tokens has shown that it gives the model's own logits.

    It is not tried out where the parameters are not there yet: DeepSpeed's stage 3 shards them before there is a
    trainer.

    Raises:
        ValueError: the logits differ, so the model does something to them that fastpref does not know. Or they are not
            finite. Or `read_head` finds no usable head.
    """
    head = read_head(model)
    if not has_parameters(model):
        return head
    wanted, found = _probed_logits(model, head)
    if not wanted.isfinite().all():
        raise ValueError(
            f"model: got {type(model).__name__}, whose logits are not finite; want weights without NaN and infinities"
        )
    limit = max(HEAD_TOLERANCE, 2 * torch.finfo(found.dtype).eps)  # of the logits, their scale and their cap
    found, wanted = found.double(), wanted.double()
    if found.shape != wanted.shape or not (found - wanted).norm() <= limit * wanted.norm():
        raise ValueError(
            f"model: got {type(model).__name__}, whose logits are not its hidden states times its output embeddings; "
            "want a model with a plain output head (a scale and a soft cap are known)"
        )
    return head


def _probed_logits(model: Any, head: Head) -> tuple[Tensor, Tensor]:
    """The model's own logits of a few tokens, and the head's of the same hidden states in the same precision.

    The hidden states are scaled until the largest logit is PROBED, or as large as the soft cap. Logits of fresh weights
    are too small to show a cap. A cap would hide what is done to much larger ones.
    """
    backbone(model)  # or it is a model of another kind
    device, body = head.weight.device, decoder(model)  # OPT's forward passes its backbone over
    probed = PROBED if head.softcap is None else min(PROBED, head.softcap)
    seen, dtypes = [], [head.weight.dtype]  # of the hidden states that reach the head, and of what the head makes

    def no_autocast(*_: Any) -> None:
        """A forward that Accelerate prepared, once or twice, switches autocast on before it comes here."""
        torch.set_autocast_enabled(device.type, False)

    def scaled(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if hidden.shape[-1] != head.weight.shape[1]:
            return output
        largest = head._replace(softcap=None).logits(hidden.to(head.weight.dtype)).abs().max()
        factor = torch.minimum(probed / largest.float(), LARGEST_HIDDEN / hidden.abs().max().float())
        output.last_hidden_state = hidden * factor.to(hidden.dtype)
        seen.append(output.last_hidden_state)
        return output

    def cast(layer: Any, inputs: Any) -> Any:
        """As autocast does where it trains: TRL's CPO keeps 4-bit models' norms in fp32 and their heads in bf16."""
        return tuple(x.to(layer.weight.dtype) for x in inputs)

    hooks = [body.register_forward_pre_hook(no_autocast), body.register_forward_hook(scaled)]
    layer = inner_model(model).get_output_embeddings()
    plain = [part for part in layer.modules() if type(part) is nn.Linear]  # which multiplies what is of one dtype only
    hooks += [part.register_forward_pre_hook(cast) for part in plain]
    hooks.append(layer.register_forward_hook(lambda layer, inputs, output: dtypes.append(output.dtype)))
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            torch.autocast(device.type, enabled=False),
            uncompiled(inner_model(model)),
        ):
            ids = torch.arange(8, device=device)[None] % inner_model(model).config.get_text_config().vocab_size
            wanted = model(input_ids=ids, use_cache=False).logits
            if not seen:
                return wanted, wanted.new_empty(0)
            bias = None if head.bias is None else head.bias.to(dtypes[-1])
            found = head._replace(weight=head.weight.to(dtypes[-1]), bias=bias).logits(seen[-1].to(dtypes[-1]))
    finally:
        for hook in hooks:
            hook.remove()
    return wanted, found


def _has_adapter(layer: nn.Module) -> bool:
    if importlib.util.find_spec("peft") is None:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _logit_transform(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap or None) of the logits, found under the names that transformers' configs use."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM divide by it
        multiplies = config.model_type == "hyperclovax"
        scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", *SOFTCAPS.get(config.model_type, ()))]
    return scale, next((cap for cap in caps if cap), None)
