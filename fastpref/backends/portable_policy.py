"""The portable backend's policy-gradient loss: derivatives are autograd's of the specification."""

from __future__ import annotations

from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients


def policy_loss(
    logps: Tensor, old_logps: Tensor | None, ref_logps: Tensor | None, advantages: Tensor, entropy: Tensor | None,
    weights: Tensor, objective: reference.PolicyObjective,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.policy_loss`."""

    def token_losses(logps: Tensor) -> tuple[Tensor, Tensor]:
        return reference.policy_token_losses(logps, old_logps, ref_logps, advantages, entropy, objective)

    _, (coefs,) = value_and_gradients(lambda logps: (token_losses(logps)[0] * weights).sum(), logps)
    losses, metrics = token_losses(logps)
    coef_entropy = logps.new_empty(0) if entropy is None else -objective.entropy_coef * weights
    return losses * weights, metrics, coefs, coef_entropy
