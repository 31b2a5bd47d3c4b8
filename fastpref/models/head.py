"""Language models as a preference loss sees them: a backbone that gives hidden states, and an output head."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpref.models.wrappers import has_parameters, inner_model, whole

HEAD_TOLERANCE = 1e-4  # relative to the largest logit; two ways of computing them in fp32 differ by some 1e-6


class Head(NamedTuple):
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    def options(self) -> dict[str, Any]:
        return {"logit_scale": self.logit_scale, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., V]`, in the dtype of `hidden`."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """The last hidden states `[S, T, d]`, without the logits `[S, T, V]` that the model itself would go on to.

    `inputs` are more of what the model's own forward takes, such as `position_ids`. Wrappers (DDP, FSDP, DeepSpeed)
    do their work around the model's forward: under one, call this from inside of it.
    """
    output = backbone(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return output.last_hidden_state


def backbone(model: Any) -> nn.Module:
    """What gives a causal language model's hidden states.

    Raises:
        ValueError: the model is of another kind.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("model: got prompt learning, whose prompts enter before the backbone; want other adapters")
    model = inner_model(model)
    found = getattr(model, "base_model", model)
    if found is model or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: got {type(model).__name__}, want a transformers causal language model")
    return found


def hidden_and_head(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Head]:
    """`hidden_states` and `read_head`: all that a loss from hidden states takes, for any causal language model.

    For loops: nothing is verified here. Call `output_head(model)` once before the first of them.
    """
    return hidden_states(model, input_ids, attention_mask, **inputs), read_head(model)


def read_head(model: Any) -> Head:
    """The model's output layer as it is now. FSDP and PEFT exchange its weight: read it anew in every forward.

    A sharded weight (a DTensor) is gathered, with gradients going back to its shards.

    Raises:
        ValueError: there is no output layer, or it has an adapter beside its weight.
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
    bias = getattr(layer, "bias", None)
    return Head(whole(layer.weight), None if bias is None else whole(bias), *_logit_transform(model))


def output_head(model: Any) -> Head:
    """`read_head`, found out to give the model's own logits in one forward over a few tokens; unless its parameters
    are not here to try it (DeepSpeed's stage 3 shards them before there is a trainer).

    Raises:
        ValueError: it does not, so the model does something to its logits that fastpref does not know.
    """
    head, seen = read_head(model), []
    if not has_parameters(model):
        return head
    hook = backbone(model).register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state))
    try:
        device = head.weight.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):  # dropout draws
            vocab = inner_model(model).config.get_text_config().vocab_size
            ids = torch.arange(8, device=device)[None] % vocab
            wanted = model(input_ids=ids, use_cache=False).logits.float()
            found = head.logits(seen[-1].to(head.weight.dtype)).float() if seen else wanted.new_empty(0)
    finally:
        hook.remove()
    limit = max(HEAD_TOLERANCE, 4 * torch.finfo(head.weight.dtype).eps) * wanted.abs().max()
    if found.shape != wanted.shape or not (found - wanted).abs().max() <= limit:
        raise ValueError(
            f"model: got {type(model).__name__}, whose logits are not its hidden states times its output embeddings; "
            "want a model with a plain output head (a scale and a soft cap are known)"
        )
    return head


def _has_adapter(layer: nn.Module) -> bool:
    if importlib.util.find_spec("peft") is None:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def _logit_transform(model: Any) -> tuple[float, float | None]:
    """(scale, soft cap) of the logits, by the names that transformers' configs give them."""
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            scale = float(getattr(config, name))
    if getattr(config, "logits_scaling", None) is not None:  # Granite and MiniCPM divide by it
        multiplies = config.model_type == "hyperclovax"
        scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None)
