"""The load-balancing loss of mixture-of-experts models, over the tokens of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.models import inner_model
from fastpref.trainers.config import unsupported


def router_coefficient(model: Any, wanted: float | None, *, on_request: bool) -> float:
    """Weight of the load-balancing loss, as in TRL: `wanted`, or the config's own. `on_request`: the config's own only
    where its `output_router_logits` is set.

    Raises:
        ValueError: one is wanted of a model that has no experts, or does not return its router logits.
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
    return inner_model(model).config.get_text_config().num_experts_per_tok


def routed(router_logits: Sequence[Tensor], copies: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(how often each of E experts was chosen and its probabilities, summed over layers and tokens `[2, E]`, fp32; of
    how many tokens, 0-d). `router_logits` are `[N, E]` of each layer; `copies` `[N]` says how often a token counts: as
    many times as there are sequences that it is in, and padding never."""
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
