"""What a model is made of, read off its config and its modules: facts that no probe on a few tokens can replace."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastpref.models.wrappers import inner_model

ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention"))
NOT_MIXING = frozenset(("dense", "sparse", "mlp", "moe"))
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")  # what configs call them
# parameters of state spaces, delta rules and RWKV, whose modules have names as many as there are models
RECURRENT_PARAMETERS = frozenset(("A_log", "dt_bias", "time_decay", "recurrent_param"))


def other_mixers(model: Any) -> list[str]:
    """The kinds of layers that carry something from token to token beside full and sliding attention: state spaces,
    linear attention, recurrences, convolutions, attention in chunks. They know nothing of where in a packed row a
    sequence begins."""
    model = inner_model(model)
    config = model.config.get_text_config()
    found = {str(kind) for name in LAYER_LISTS for kind in getattr(config, name, None) or ()}
    found -= ATTENTION_LAYERS | NOT_MIXING | {"attention"}
    if found:
        return sorted(found)
    modules = list(decoder(model).modules())
    found = {type(m).__name__ for m in modules if isinstance(m, nn.modules.conv._ConvNd | nn.RNNBase)}
    found |= {type(m).__name__ for m in modules if RECURRENT_PARAMETERS & m._parameters.keys()}
    if not found and getattr(model, "_is_stateful", False):  # transformers' word for it
        found.add("recurrent")
    return sorted(found)


def decoder(model: Any) -> nn.Module:
    """The part that reads text, without the towers for images and sound that stand beside it."""
    model = inner_model(model)
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if any(isinstance(m, nn.ModuleList) for m in found.modules()):
        return base(model) if found is model else found
    return base(model)  # ModernBERT calls its head a decoder


def base(model: Any) -> Any:
    """A transformers model without its head; the model itself, where there is none."""
    found = getattr(model, "base_model", model)
    if found is model and hasattr(model, "lm_head"):
        return getattr(model, "model", model)  # Llama 4's text model is not where its prefix says
    return found
