"""The policy-gradient part of the portable backend: derivatives come from the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import reference


def policy_loss(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None, advantages: Tensor, entropy: Tensor | None,
    weights: Tensor, objective: reference.PolicyObjective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def total(logps: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        losses, metrics = reference.policy_token_losses(logps, old_logps, ref_logps, advantages, entropy, objective)
        return (losses * weights).sum(), (losses * weights, metrics)

    coefs, (losses, metrics) = torch.func.grad(total, has_aux=True)(logps)
    coef_entropy = logps.new_empty(0) if entropy is None else -objective.entropy_coef * weights
    return losses, metrics, coefs, coef_entropy
