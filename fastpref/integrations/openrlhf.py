"""OpenRLHF's `Actor` without logits: the log-probs that its trainers ask for, and the entropy for a bonus.

    from fastpref.integrations import openrlhf

    openrlhf.patch()  # in each process, before models are built

What this forward cannot do stays with OpenRLHF's own code; see `supported`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref import models
from fastpref.objectives.tokens import linear_token_statistics

IGNORE = -100


def supported(
    actor: Any, action_mask: Any, return_logprobs: bool, return_entropy: bool, others: dict[str, Any]
) -> bool:
    """Whether a call can be answered without logits. If not, OpenRLHF's own code runs.

    That is so for packed samples, images, mixtures of experts (which have a loss of their own) and calls that want
    whole logits. It is also so for an entropy beside a temperature, which in OpenRLHF applies to the log-probs alone.
    """
    if getattr(actor, "packing_samples", False) or any(value is not None for value in others.values()):
        return False
    if return_entropy and getattr(actor, "temperature", 1.0) != 1.0:
        return False
    experts = getattr(models.unwrapped(actor.model).config, "output_router_logits", False)
    return not experts and (action_mask is not None or return_logprobs)


def actor_forward(
    self: Any,
    sequences: Tensor,
    action_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
    **mm_inputs: Any,
) -> Any:
    """Stands in for `Actor.forward` of OpenRLHF 0.8 and later.

    Positions that the mask leaves out are 0. OpenRLHF has numbers there that its losses mask.

    Returns:
        Log-probs of actions `[S, A]`, or of all tokens `[S, T - 1]` without an `action_mask`. With `return_output` a
            second result, with None as `logits` and, if `return_entropy`, with `entropy` `[S, T - 1]`.
    """
    from transformers.modeling_outputs import CausalLMOutput

    assert attention_mask is not None  # as OpenRLHF
    position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
    scored = attention_mask[:, 1:].bool()
    if action_mask is not None:
        scored = torch.zeros_like(scored)
        scored[:, -action_mask.shape[1] :] = action_mask.bool()
    labels, statistics = sequences[:, 1:].masked_fill(~scored, IGNORE), ("entropy",) if return_entropy else ()

    def forward(bare: Any) -> Any:
        hidden, head = models.hidden_and_head(bare, sequences, attention_mask, position_ids=position_ids)
        return linear_token_statistics(
            hidden[:, :-1], head.weight, labels, head.bias, statistics,
            temperature=getattr(self, "temperature", 1.0), **head.options(),
        )  # fmt: skip

    found = models.run_inside(self.model, None, forward)  # OpenRLHF trains through DeepSpeed's engine
    logps = found.logps if action_mask is None else found.logps[:, -action_mask.shape[1] :]
    if not return_output:
        return logps
    output = CausalLMOutput()
    if return_entropy:
        output.entropy = found.entropy
    return logps, output


def _replacing(original: Callable) -> Callable:
    @functools.wraps(original)
    def forward(
        self: Any, sequences: Tensor, action_mask: Any = None, attention_mask: Any = None, return_output: bool = False,
        allgather_logits: bool = False, return_logprobs: bool = False, **others: Any,
    ) -> Any:  # fmt: skip
        return_entropy = others.pop("return_entropy", False)
        ours = supported(self, action_mask, return_logprobs, return_entropy, others)
        if not ours and return_entropy:
            others["return_entropy"] = return_entropy
        return (functools.partial(actor_forward, return_entropy=return_entropy) if ours else original)(
            self, sequences, action_mask, attention_mask, return_output, allgather_logits, return_logprobs, **others
        )

    return forward


def patch() -> None:
    """Give OpenRLHF's `Actor` this forward. A second call does nothing.

    Raises:
        ImportError: OpenRLHF is not installed.
    """
    try:
        from openrlhf.models import Actor
    except ImportError as error:
        raise ImportError(
            "fastpref.integrations.openrlhf: OpenRLHF is not installed; run `pip install openrlhf`"
        ) from error
    if not hasattr(Actor.forward, "__wrapped__"):
        Actor.forward = _replacing(Actor.forward)
