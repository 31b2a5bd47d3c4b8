"""Operators of policy-gradient losses: from log-probs, and from hidden states with gradients formed in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import wide, without_autocast
from fastpref.ops.linear import fake_gradients, head_of, present, register_ready_gradients
from fastpref.plans import fused, plans
from fastpref.reference import POLICY_METRICS, PolicyObjective

# metrics of each token that the operator from hidden states returns
LINEAR_METRICS = ("logps", "entropy", *POLICY_METRICS)


@torch.library.custom_op("fastpref::policy_loss", mutates_args=())
@without_autocast
def policy_loss(
    logps: Tensor, entropy: Tensor | None, old_logps: Tensor | None, ref_logps: Tensor | None, advantages: Tensor,
    weights: Tensor, epsilon_low: float, epsilon_high: float, beta: float, entropy_coef: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, POLICY_METRICS `[3, N]`, d loss / d logps `[N]`, d loss / d entropy `[N]` or empty)."""
    objective = PolicyObjective(epsilon_low, epsilon_high, beta, entropy_coef)
    losses, metrics, coefs, coefs_entropy = backend_for(logps).policy_loss(
        logps, old_logps, ref_logps, advantages, entropy, weights, objective
    )
    return losses.sum(), metrics, coefs, coefs_entropy


@policy_loss.register_fake
def _(logps, entropy, *_):
    absent = logps.new_empty(0) if entropy is None else torch.empty_like(logps)
    return logps.new_empty(()), logps.new_empty(3, logps.numel()), torch.empty_like(logps), absent


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], *inputs[:2])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    coefs, coefs_entropy, logps, entropy = ctx.saved_tensors
    scale = torch.ops.fastpref.scale_gradient
    d_entropy = scale(coefs_entropy, grad, entropy) if ctx.needs_input_grad[1] else None
    return scale(coefs, grad, logps) if ctx.needs_input_grad[0] else None, d_entropy, *(None,) * 8


policy_loss.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fastpref::linear_policy_loss", mutates_args=())
@without_autocast
def linear_policy_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, old_logps: Tensor | None,
    ref_logps: Tensor | None, advantages: Tensor, weights: Tensor, ignore_index: int, temperature: float,
    logit_scale: float, softcap: float | None, epsilon_low: float, epsilon_high: float, beta: float,
    entropy_coef: float, workspace_bytes: int | None, need_hidden: bool, need_weight: bool, need_bias: bool,
    compute_weight: Tensor | None = None, scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, LINEAR_METRICS `[5, N]`, dH, dW, db). The gradients are in fp32, and empty where not needed."""
    checks.label_range(labels, weight.shape[0], ignore_index)
    objective = PolicyObjective(epsilon_low, epsilon_high, beta, entropy_coef)
    backend = backend_for(hidden)

    def token_loss(rows: Tensor, logps: Tensor, entropy: Tensor):
        def of(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        losses, metrics, coefs, coefs_entropy = backend.policy_loss(
            logps, of(old_logps), of(ref_logps), advantages[rows], entropy if entropy_coef else None, weights[rows],
            objective,
        )  # fmt: skip
        return losses, torch.cat([logps[None], entropy[None], metrics]), coefs, coefs_entropy if entropy_coef else None

    loss, metrics, gradients = fused.forward_tokens(
        hidden, head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap), labels,
        plans.Needs(need_hidden, need_weight, need_bias), workspace_bytes, len(LINEAR_METRICS), token_loss, scored_rows,
    )  # fmt: skip
    return loss, metrics, *present(gradients, hidden)


@linear_policy_loss.register_fake
def _(hidden, weight, labels, bias, *options):
    dtype = wide(hidden.dtype)
    loss = hidden.new_empty((), dtype=dtype)
    metrics = hidden.new_empty(len(LINEAR_METRICS), hidden.shape[0], dtype=dtype)
    return loss, metrics, *fake_gradients(hidden, weight, bias, plans.Needs(*options[13:16]))


register_ready_gradients(linear_policy_loss, num_inputs=22)
