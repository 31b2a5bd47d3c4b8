"""Operators of KL penalties: estimated from sampled tokens, exact from logits, exact from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import first_order_only, wide, without_autocast
from fastpref.ops.linear import fake_head_gradients, head_gradients, head_of
from fastpref.plans import kl_plans, plans
from fastpref.plans.compact import gather
from fastpref.plans.head import logits_buffer
from fastpref.plans.products import ParameterGradients
from fastpref.reference import LogitTransform


@torch.library.custom_op("fastpref::kl_estimate", mutates_args=())
@without_autocast
def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate, d estimate / d logps), each `[N]`."""
    return backend_for(logps).kl_estimate(logps, ref_logps, estimator)


@kl_estimate.register_fake
def _(logps, ref_logps, estimator):
    return torch.empty_like(logps), torch.empty_like(logps)


def _save_estimate(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[0])


def _backward_estimate(ctx, grad, *unused):
    if grad is None:
        return None, None, None
    slope, logps = ctx.saved_tensors
    return torch.ops.fastpref.scale_gradient(slope, grad, logps), None, None


kl_estimate.register_autograd(_backward_estimate, setup_context=_save_estimate)


@torch.library.custom_op("fastpref::kl_penalized_rewards", mutates_args=())
@without_autocast
def kl_penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: Tensor, estimator: str
) -> tuple[Tensor, Tensor]:
    """(rewards `[S, T]`, their sums with the scores `[S]`). beta is 0-d."""
    return backend_for(logps).penalized_rewards(scores, logps, ref_logps, mask, beta, estimator)


@kl_penalized_rewards.register_fake
def _(scores, logps, ref_logps, mask, beta, estimator):
    return torch.empty_like(logps), torch.empty_like(scores)


@torch.library.custom_op("fastpref::kl_penalized_rewards_backward", mutates_args=())
@without_autocast
def kl_penalized_rewards_backward(
    grad_rewards: Tensor | None, grad_sums: Tensor | None, logps: Tensor, ref_logps: Tensor, mask: Tensor,
    beta: Tensor, estimator: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d scores `[S]`, d logps `[S, T]`). An upstream gradient that is None is zero."""
    return backend_for(logps).penalized_rewards_backward(
        grad_rewards, grad_sums, logps, ref_logps, mask, beta, estimator
    )


@kl_penalized_rewards_backward.register_fake
def _(grad_rewards, grad_sums, logps, ref_logps, mask, beta, estimator):
    return logps.new_empty(logps.shape[0]), torch.empty_like(logps)


first_order_only(kl_penalized_rewards_backward)


def _save_rewards(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:5])
    ctx.estimator = inputs[5]


def _backward_rewards(ctx, grad_rewards, grad_sums):
    if grad_rewards is None and grad_sums is None:
        return (None,) * 6
    gradients = torch.ops.fastpref.kl_penalized_rewards_backward(
        grad_rewards, grad_sums, *ctx.saved_tensors, ctx.estimator
    )
    return *gradients, *(None,) * 4


kl_penalized_rewards.register_autograd(_backward_rewards, setup_context=_save_rewards)


@torch.library.custom_op("fastpref::token_kl", mutates_args=())
@without_autocast
def token_kl(
    policy_logits: Tensor, ref_logits: Tensor, mask: Tensor | None, direction: str, temperature: float,
    logit_scale: float, softcap: float | None, beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(divergence, the policy's lse, the reference's, KL(policy || mixture) of a jsd or empty), each `[N]`."""
    out = backend_for(policy_logits).token_kl(
        policy_logits, ref_logits, direction=direction, beta=beta, mask=mask,
        transform=LogitTransform(temperature, logit_scale, softcap),
    )  # fmt: skip
    return out["kl"], out["lse"], out["ref_lse"], out.get("policy_kl", out["kl"].new_empty(0))


@token_kl.register_fake
def _(policy_logits, ref_logits, mask, direction, *options):
    dtype = wide(torch.promote_types(policy_logits.dtype, ref_logits.dtype))
    n = policy_logits.shape[:-1].numel()
    sizes = (n, n, n, n if direction == "jsd" else 0)
    kl, lse, ref_lse, policy_kl = (policy_logits.new_empty(size, dtype=dtype) for size in sizes)
    return kl, lse, ref_lse, policy_kl


@torch.library.custom_op("fastpref::token_kl_backward", mutates_args=())
@without_autocast
def token_kl_backward(
    grad: Tensor, policy_logits: Tensor, ref_logits: Tensor, mask: Tensor | None, kl: Tensor, lse: Tensor,
    ref_lse: Tensor, policy_kl: Tensor, direction: str, temperature: float, logit_scale: float,
    softcap: float | None, beta: float,
) -> Tensor:  # fmt: skip
    """d policy_logits, of their shape, for the upstream gradient `grad` `[N]`."""
    d_logits = torch.empty(policy_logits.shape, dtype=policy_logits.dtype, device=policy_logits.device)
    backend_for(policy_logits).token_kl_gradient(
        policy_logits, ref_logits, policy_kl if direction == "jsd" else kl, lse, ref_lse,
        d_logits.view(-1, policy_logits.shape[-1]), direction=direction, beta=beta,
        transform=LogitTransform(temperature, logit_scale, softcap), mask=mask, grad=grad,
    )  # fmt: skip
    return d_logits


@token_kl_backward.register_fake
def _(grad, policy_logits, *rest):
    return torch.empty(policy_logits.shape, dtype=policy_logits.dtype, device=policy_logits.device)


first_order_only(token_kl_backward)


def _save_token_kl(ctx, inputs, output):
    policy_logits, ref_logits, mask, *options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(policy_logits, ref_logits, mask, *output)
    ctx.options = options


def _backward_token_kl(ctx, grad, *unused):
    if grad is None:
        return (None,) * 8
    return torch.ops.fastpref.token_kl_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 7


token_kl.register_autograd(_backward_token_kl, setup_context=_save_token_kl)


@torch.library.custom_op("fastpref::linear_token_kl", mutates_args=())
@without_autocast
def linear_token_kl(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor | None,
    bias: Tensor | None, ref_bias: Tensor | None, direction: str, ignore_index: int, temperature: float,
    logit_scale: float, softcap: float | None, plan: str, workspace_bytes: int | None,
    compute_weight: Tensor | None = None, scored_rows: int | None = None, beta: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(divergence `[N]`, log-probs `[N]`, reference log-probs `[N]`, lse `[n]`, reference lse `[n]`, KL(policy ||
    mixture) `[n]`, kept, scored rows `[n]`).

    The log-probs are the labels'; they are empty without labels. The KL to the mixture is that of a jsd, else it is
    empty. `kept` is what the plan keeps for its backward.
    """
    if labels is not None:
        checks.label_range(labels, weight.shape[0], ignore_index)
    options = (ignore_index, temperature, logit_scale, softcap)
    head, ref_head = head_of(weight, compute_weight, bias, *options), head_of(ref_weight, None, ref_bias, *options)
    out = kl_plans.forward(
        hidden, head, ref_hidden, ref_head, labels, direction, plan, workspace_bytes, scored_rows, beta
    )
    logps, ref_logps = (out.kl.new_empty(0) if x is None else x for x in (out.logps, out.ref_logps))
    policy_kl = out.policy_kl if direction == "jsd" else out.kl.new_empty(0)
    return out.kl, logps, ref_logps, out.lse, out.ref_lse, policy_kl, out.kept, out.rows


@linear_token_kl.register_fake
def _(hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, direction, ignore_index, *options):
    total, plan, (compute_weight, scored_rows, *_) = hidden.shape[0], options[3], options[5:] or (None, None)
    scored_rows = total if labels is None else scored_rows
    n = torch.library.get_ctx().new_dynamic_size() if scored_rows is None else scored_rows
    dtype = wide(torch.promote_types(hidden.dtype, ref_hidden.dtype))
    kept = hidden.new_empty(0)
    if plan == "store":
        kept = logits_buffer(head_of(weight, compute_weight, None, ignore_index, 1.0, 1.0, None), n)
    elif plan == "frozen":
        kept = torch.empty_like(hidden)
    scored = 0 if labels is None else total
    logps, ref_logps = (hidden.new_empty(scored, dtype=dtype) for _ in range(2))
    sizes = (total, n, n, n if direction == "jsd" else 0)
    kl, lse, ref_lse, policy_kl = (hidden.new_empty(size, dtype=dtype) for size in sizes)
    return kl, logps, ref_logps, lse, ref_lse, policy_kl, kept, hidden.new_empty(n, dtype=torch.long)


@torch.library.custom_op("fastpref::linear_token_kl_backward", mutates_args=())
@without_autocast
def linear_token_kl_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, bias: Tensor | None,
    ref_bias: Tensor | None, kl: Tensor, lse: Tensor, ref_lse: Tensor, policy_kl: Tensor, kept: Tensor, rows: Tensor,
    direction: str,
    ignore_index: int, temperature: float, logit_scale: float, softcap: float | None, plan: str,
    workspace_bytes: int | None, beta: float, need_hidden: bool, need_weight: bool, need_bias: bool,
    compute_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dH, dW, db), empty where not needed."""
    options = (ignore_index, temperature, logit_scale, softcap)
    head = head_of(weight, compute_weight, bias, *options)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    parameters = ParameterGradients(head, needs, weight.dtype)
    h, coefs = gather(hidden, rows), gather(grad, rows)
    if plan == "store":
        d_hidden = plans.backward_store(kept, h, head, coefs, needs, parameters, hidden.dtype)
    else:
        d_hidden = kl_plans.backward_recompute(
            h, head, gather(ref_hidden, rows), head_of(ref_weight, None, ref_bias, *options),
            policy_kl if direction == "jsd" else gather(kl, rows), lse, ref_lse, coefs, direction, needs, parameters,
            workspace_bytes, beta=beta, dtype=hidden.dtype,
        )  # fmt: skip
    return head_gradients(d_hidden, parameters, rows, hidden, bias)


@linear_token_kl_backward.register_fake
def _(grad, hidden, weight, ref_hidden, ref_weight, bias, *rest):
    return fake_head_gradients(rest[15:18], hidden, weight, bias)


first_order_only(linear_token_kl_backward)


def _save_linear(ctx, inputs, output):
    hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, *options, compute_weight, _, beta = inputs
    kl, _, _, *saved = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(labels, compute_weight, hidden, weight, ref_hidden, ref_weight, bias, ref_bias, kl, *saved)
    ctx.options = (*options, beta)


def _backward_linear(ctx, grad, *unused):
    if grad is None:
        return (None,) * 17
    labels, compute_weight, hidden, *rest = ctx.saved_tensors
    need_hidden, need_weight, _, _, _, need_bias, _ = ctx.needs_input_grad[:7]
    ignore_index, plan, kept = ctx.options[1], ctx.options[5], rest[-2]
    if plan == "no_grad" or (plan == "frozen" and (need_weight or need_bias)):
        raise RuntimeError(f"plan {plan!r} kept nothing for the gradients that backward now asks for")
    if labels is not None:  # an ignored row's upstream gradient may be anything
        grad = grad.masked_fill(labels == ignore_index, 0)
    if plan == "frozen":
        return torch.ops.fastpref.scale_gradient(kept, grad, hidden), *(None,) * 16
    needs = (need_hidden, need_weight, need_bias)
    gradients = torch.ops.fastpref.linear_token_kl_backward(
        grad, hidden, *rest, *ctx.options, *needs, compute_weight
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return d_hidden, d_weight, None, None, None, d_bias, *(None,) * 11


linear_token_kl.register_autograd(_backward_linear, setup_context=_save_linear)
