"""What a model is made of: its kinds of layers, its decoder, how many tokens and positions it knows.

These facts are read off its config and its modules. Trying out a few tokens would not show them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from fastpref.models.wrappers import inner_model

ATTENTION_LAYERS = frozenset(("full_attention", "sliding_attention"))
NOT_MIXING = frozenset(("dense", "sparse", "mlp", "moe"))
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types")  # what configs call them
# parameters of state spaces, delta rules and RWKV; the names of their modules differ from model to model
RECURRENT_PARAMETERS = frozenset(("A_log", "dt_bias", "time_decay", "recurrent_param"))


def other_mixers(model: Any) -> list[str]:
    """The names of layers that carry something from token to token and are not full or sliding attention.

    Such are state spaces, linear attention, recurrences, convolutions, attention in chunks. They do not know where in a
    packed row a sequence begins, so a model with one of them cannot take packed rows.
    """
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
    """The part of a model that reads text, without the towers for images and sound beside it."""
    model = inner_model(model)
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if any(isinstance(m, nn.ModuleList) for m in found.modules()):
        return base(found)  # Llama 4's with images is a model with a head of its own
    return base(model)  # ModernBERT calls its head a decoder


def base(model: Any) -> Any:
    """A transformers model without its head, or the model itself if it has none."""
    found = getattr(model, "base_model", model)
    if found is model and hasattr(model, "lm_head"):
        return getattr(model, "model", model)  # Llama 4's text model is not where its prefix says
    return found


class Limits(NamedTuple):
    """How many different tokens and how many positions a model knows. None: no limit is known."""

    tokens: int | None
    positions: int | None

    def check(self, sequences: Iterable[Sequence[int]], name: str = "") -> None:
        """Check sequences of token ids. `name` says in the error which sequences they are.

        Raises:
            ValueError: one is longer than the positions, or has a token without an embedding.
        """
        for ids in sequences:
            if self.positions is not None and len(ids) > self.positions:
                raise ValueError(
                    f"max_length: got {name or 'a sequence'} of {len(ids)} tokens, want at most {self.positions}: the "
                    "model has no more positions"
                )
            largest = max(ids, default=0)
            if self.tokens is not None and largest >= self.tokens:
                raise ValueError(
                    f"processing_class: got token {largest} in {name or 'a sequence'}, want ids below {self.tokens}: "
                    "the model has no more embeddings (model.resize_token_embeddings adds some)"
                )


TABLES = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?|positions_embed)$")


def limits(model: Any) -> Limits:
    """The limits of a model, read off its embeddings.

    Rotary positions have no limit. To go beyond the length of pretraining is the user's choice.
    """
    model = inner_model(model)
    tokens = getattr(model.get_input_embeddings(), "num_embeddings", None)
    body = decoder(model)
    tables = [
        module.num_embeddings - getattr(module, "offset", 0)
        for name, module in body.named_modules()
        if isinstance(module, nn.Embedding) and TABLES.search(name)
    ]
    tables += [len(table) for name, table in body.named_buffers() if TABLES.search(name) and table.dim() == 2]
    return Limits(tokens, min(tables, default=None))
