"""The load-balancing loss of mixture-of-experts models, computed over the tokens of packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.models import inner_model
from fastpref.trainers.config import unsupported


def router_coefficient(model: Any, wanted: float | None, *, on_request: bool) -> float:
    """The weight of the load-balancing loss, as in TRL: `wanted`, or else the model config's own.

    Args:
        model: the language model.
        wanted: the weight that the user asked for, or None.
        on_request: use the config's own only if the config sets `output_router_logits`.

    Raises:
        ValueError: a weight is wanted, but the model has no experts or does not return its router logits.
    """
    config = inner_model(model).config.get_text_config()
    has_experts = hasattr(config, "output_router_logits")
    if wanted and not has_experts:
        raise unsupported(
            "router_aux_loss_coef", wanted, f"{type(inner_model(model)).__name__} is no mixture of experts that "
            "returns its router logits; want None or 0.0",
        )  # fmt: skip
    if wanted is not None:
        return wanted
    if not has_experts or (on_request and not config.output_router_logits):
        return 0.0
    return getattr(config, "router_aux_loss_coef", 0.0) or 0.0


def experts_per_token(model: Any) -> int:
    """How many experts the model sends each token to."""
    return inner_model(model).config.get_text_config().num_experts_per_tok


def routed(router_logits: Sequence[Tensor], copies: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """What the load-balancing loss is made of, summed over layers and tokens.

    Args:
        router_logits: `[N, E]` of each layer.
        copies: `[N]`, how often each token counts: once for every sequence that it is in, and 0 for padding.
        top_k: experts per token.

    Returns:
        `[2, E]` in fp32: how often each of the E experts was chosen, and its summed probability; and how many tokens
            that is, 0-d.
    """
    copies = copies.to(router_logits[0].device, torch.float32)
    chosen = probabilities = torch.zeros(router_logits[0].shape[-1], device=copies.device)
    for logits in router_logits:
        weights = logits.flatten(0, -2).to(copies.device).softmax(-1)  # in its dtype, as transformers
        experts = weights.topk(top_k, -1).indices
        repeated = copies[:, None].expand_as(experts).reshape(-1)
        chosen = chosen.scatter_add(0, experts.reshape(-1), repeated)
        probabilities = probabilities + copies @ weights.float()
    return torch.stack([chosen, probabilities]), copies.sum() * len(router_logits)


def balance_loss(means: Tensor) -> Tensor:
    """`E * sum_i f_i P_i` (Fedus et al. 2021, arXiv 2101.03961, eqs. 4 to 6) of `[2, E]` means over tokens."""
    return means.shape[1] * (means[0] * means[1]).sum()
