"""The operators: torch.library custom ops with fakes and autograd, opaque to torch.compile without a graph break.

Everything here works on flattened rows; shapes and argument errors are dealt with by the public functions. The
backward formulas are operators themselves, so that differentiating them again raises instead of silently
returning part of the answer.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref import checks, plans
from fastpref.backends import backend_for
from fastpref.reference import STATISTICS, LogitTransform, PairedObjective

SEPARABLE_EXCEPT = ("aot", "aot_unpaired")  # these sort across the batch


def encode(objective: PairedObjective) -> str:
    """Operators take strings, not named tuples."""
    return json.dumps(objective._asdict())


@functools.lru_cache(maxsize=256)
def decode(text: str) -> PairedObjective:
    fields = json.loads(text)
    return PairedObjective(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _first_order_only(op: Any) -> None:
    def refuse(ctx, *grads):
        raise RuntimeError(f"{op._qualname}: fastpref's gradients cannot be differentiated again (create_graph=True)")

    op.register_autograd(refuse)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _with_autocast_off(f: Callable) -> Callable:
    """The public functions have cast already; nothing inside an operator may be cast again."""

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return f(*args, **kwargs)

    return wrapped


# One scalar a row (or one in all) times a gradient that the forward has already formed.


@torch.library.custom_op("fastpref::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, coefs: Tensor, of: Tensor) -> Tensor:
    """The gradient of the tensor `of`. Out of place, since a second backward must find `gradient` as it was, and
    before rounding. `of` gives the dtype, and makes a second differentiation reach this operator's refusal."""
    coefs = coefs.reshape(-1, *[1] * (gradient.ndim - 1)) if coefs.ndim else coefs
    return (gradient * coefs).to(of.dtype)


@scale_gradient.register_fake
def _(gradient, coefs, of):
    return torch.empty_like(gradient, dtype=of.dtype)


_first_order_only(scale_gradient)


# Log-probs from logits.


@torch.library.custom_op("fastpref::token_logprobs", mutates_args=())
@_with_autocast_off
def token_logprobs(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, logit_scale: float,
    softcap: float | None, statistics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, lse, then STATISTICS in order, empty where not in the comma-separated `statistics`), each `[N]`."""
    checks.label_range(labels, logits.shape[-1], ignore_index)
    wanted = tuple(s for s in statistics.split(",") if s)
    out = backend_for(logits).row_logprob(
        logits, labels, transform=LogitTransform(temperature, logit_scale, softcap),
        ignore_index=ignore_index, statistics=wanted,
    )  # fmt: skip
    absent = (out[name] if name in out else logits.new_empty(0) for name in STATISTICS)
    return (out["logps"], out["lse"], *absent)


@token_logprobs.register_fake
def _(logits, labels, ignore_index, temperature, logit_scale, softcap, statistics):
    n, dtype = labels.numel(), _wide(logits.dtype)

    def result(name):
        if name not in statistics.split(","):
            return logits.new_empty(0)
        return logits.new_empty(n, dtype=torch.bool if name == "is_top1" else dtype)

    base = (logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype))
    return (*base, *(result(name) for name in STATISTICS))


@torch.library.custom_op("fastpref::token_logprobs_backward", mutates_args=())
@_with_autocast_off
def token_logprobs_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, labels: Tensor, logps: Tensor,
    lse: Tensor, entropy: Tensor, ignore_index: int, temperature: float, logit_scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    backend_for(logits).row_gradient(
        logits, labels, logps, lse, d_logits.view(-1, logits.shape[-1]),
        transform=LogitTransform(temperature, logit_scale, softcap), ignore_index=ignore_index,
        grad_logps=grad_logps.contiguous(), entropy=None if grad_entropy is None else entropy,
        grad_entropy=None if grad_entropy is None else grad_entropy.contiguous(),
    )  # fmt: skip
    return d_logits


@token_logprobs_backward.register_fake
def _(grad_logps, grad_entropy, logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


_first_order_only(token_logprobs_backward)


def _save_token_logprobs(ctx, inputs, output):
    logits, labels, *options = inputs
    logps, lse, entropy, *_ = output
    differentiable = (logps, entropy) if "entropy" in options[-1].split(",") else (logps,)
    ctx.mark_non_differentiable(*(t for t in output if all(t is not d for d in differentiable)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, logps, lse, entropy)
    ctx.options = options[:-1]


def _backward_token_logprobs(ctx, grad_logps, _, grad_entropy, *unused):
    if grad_logps is None and grad_entropy is None:
        return (None,) * 7
    d_logits = torch.ops.fastpref.token_logprobs_backward(grad_logps, grad_entropy, *ctx.saved_tensors, *ctx.options)
    return d_logits, *(None,) * 6


token_logprobs.register_autograd(_backward_token_logprobs, setup_context=_save_token_logprobs)


# Log-probs from hidden states.


def _head(weight, bias, ignore_index, temperature, logit_scale, softcap) -> plans.Head:
    return plans.Head(weight, bias, LogitTransform(temperature, logit_scale, softcap), ignore_index)


@torch.library.custom_op("fastpref::linear_token_logprobs", mutates_args=())
@_with_autocast_off
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, temperature: float,
    logit_scale: float, softcap: float | None, plan: str, workspace_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log-probs `[N]`, lse `[n]`, what the plan keeps for its backward, the n scored rows)."""
    checks.label_range(labels, weight.shape[0], ignore_index)
    head = _head(weight, bias, ignore_index, temperature, logit_scale, softcap)
    return plans.forward(hidden, head, labels, plan, workspace_bytes)


@linear_token_logprobs.register_fake
def _(hidden, weight, labels, bias, ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes):
    n = torch.library.get_ctx().new_dynamic_size()
    dtype = _wide(hidden.dtype)
    kept = hidden.new_empty(0)
    if plan == "store":
        kept = plans.logits_buffer(_head(weight, bias, ignore_index, 1.0, 1.0, None), n)
    elif plan == "frozen":
        kept = torch.empty_like(hidden)
    rows = labels.new_empty(n, dtype=torch.long)
    return hidden.new_empty(hidden.shape[0], dtype=dtype), hidden.new_empty(n, dtype=dtype), kept, rows


@torch.library.custom_op("fastpref::linear_token_logprobs_backward", mutates_args=())
@_with_autocast_off
def linear_token_logprobs_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logps: Tensor, lse: Tensor,
    kept: Tensor, rows: Tensor, ignore_index: int, temperature: float, logit_scale: float, softcap: float | None,
    plan: str, workspace_bytes: int | None, need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dH, dW, db), empty where not needed."""
    head = _head(weight, bias, ignore_index, temperature, logit_scale, softcap)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    parameters = plans.ParameterGradients(head, needs, weight.dtype)
    h, coefs = plans.gather(hidden, rows), plans.gather(grad, rows)
    if plan == "store":
        d_hidden = plans.backward_store(kept, h, head, coefs, needs, parameters)
    else:
        d_hidden = plans.backward_recompute(
            h, head, plans.gather(labels, rows), plans.gather(logps, rows), lse, coefs, needs, parameters,
            workspace_bytes,
        )  # fmt: skip
    absent = hidden.new_empty(0)
    return (
        absent if d_hidden is None else plans.scatter(d_hidden, rows, hidden.shape[0]),
        absent if parameters.weight is None else parameters.weight,
        absent if parameters.bias is None else parameters.bias,
    )


@linear_token_logprobs_backward.register_fake
def _(grad, hidden, weight, labels, bias, logps, lse, kept, rows, *options):
    needs = zip(options[-3:], (hidden, weight, bias), strict=True)
    return tuple(torch.empty_like(t) if need and t is not None else hidden.new_empty(0) for need, t in needs)


_first_order_only(linear_token_logprobs_backward)


def _save_linear(ctx, inputs, output):
    hidden, weight, labels, bias, *options = inputs
    logps, lse, kept, rows = output
    ctx.mark_non_differentiable(lse, kept, rows)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, logps, lse, kept, rows)
    ctx.options = options


def _backward_linear(ctx, grad, *unused):
    if grad is None:
        return (None,) * 10
    hidden, weight, labels, bias, logps, lse, kept, rows = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    plan, ignore_index = ctx.options[4], ctx.options[0]
    if plan == "no_grad" or (plan == "frozen" and (need_weight or need_bias)):
        raise RuntimeError(f"plan {plan!r} kept nothing for the gradients that backward now asks for")
    if plan == "frozen":
        coefs = grad.masked_fill(labels == ignore_index, 0)  # an ignored row's upstream gradient may be anything
        return torch.ops.fastpref.scale_gradient(kept, coefs, hidden), *(None,) * 9
    gradients = torch.ops.fastpref.linear_token_logprobs_backward(
        grad, hidden, weight, labels, bias, logps, lse, kept, rows, *ctx.options, need_hidden, need_weight, need_bias
    )
    d_hidden, d_weight, d_bias = (
        g if need else None for g, need in zip(gradients, (need_hidden, need_weight, need_bias), strict=True)
    )
    return d_hidden, d_weight, None, d_bias, *(None,) * 6


linear_token_logprobs.register_autograd(_backward_linear, setup_context=_save_linear)


# Paired losses from log-probs.


def _chosen_tokens(objective: PairedObjective, labels, cu_seqlens, lengths, pairs: int, ignore_index: int):
    """Scored tokens of all chosen completions: the denominator of an `sft` term, else None."""
    if "sft" not in objective.losses:
        return None
    if lengths is not None:
        return lengths[:pairs].sum()
    scored = labels != ignore_index
    if cu_seqlens is None:
        return scored[: scored.numel() // 2].sum()
    return (scored & (torch.arange(scored.numel(), device=scored.device) < cu_seqlens[pairs])).sum()


@torch.library.custom_op("fastpref::paired_loss", mutates_args=())
@_with_autocast_off
def paired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None,
    lengths: Tensor | None, pair_weights: Tensor | None, objective: str, num_pairs: int, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, B]`, d loss / d token_logps `[N]`)."""
    checks.packed_edges(cu_seqlens, token_logps.numel())
    o = decode(objective)
    return backend_for(token_logps).paired_loss(
        token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights,
        _chosen_tokens(o, labels, cu_seqlens, lengths, num_pairs, ignore_index), o,
        num_pairs=num_pairs, total_pairs=num_pairs, ignore_index=ignore_index,
    )  # fmt: skip


@paired_loss.register_fake
def _(token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights, objective, num_pairs, ignore_index):
    return token_logps.new_empty(()), token_logps.new_empty(6, num_pairs), torch.empty_like(token_logps)


def _save_paired(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], inputs[0])


def _backward_paired(ctx, grad, *unused):
    if grad is None:
        return (None,) * 9
    coefs, token_logps = ctx.saved_tensors
    return torch.ops.fastpref.scale_gradient(coefs, grad, token_logps), *(None,) * 8


paired_loss.register_autograd(_backward_paired, setup_context=_save_paired)


# Paired losses from hidden states, gradients formed in the forward: the `pair` plan.


@torch.library.custom_op("fastpref::linear_paired_loss", mutates_args=())
@_with_autocast_off
def linear_paired_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ref_logps: Tensor | None,
    cu_seqlens: Tensor | None, ignore_index: int, temperature: float, logit_scale: float, softcap: float | None,
    objective: str, num_pairs: int, workspace_bytes: int | None,
    need_hidden: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, metrics `[6, B]`, dH, dW, db), the gradients empty where not needed; dW and db in fp32."""
    checks.label_range(labels, weight.shape[0], ignore_index)
    checks.packed_edges(cu_seqlens, labels.numel())
    o = decode(objective)
    chosen_tokens = _chosen_tokens(o, labels, cu_seqlens, None, num_pairs, ignore_index)
    refs = None if ref_logps is None else ref_logps.view(2, num_pairs)

    def group_loss(logps: Tensor, edges: Tensor, first: int, last: int):
        ref = None if refs is None else refs[:, first:last].reshape(-1)
        return backend_for(logps).paired_loss(
            logps, None, edges, ref, None, None, chosen_tokens, o,
            num_pairs=last - first, total_pairs=num_pairs, ignore_index=ignore_index,
        )  # fmt: skip

    loss, metrics, gradients = plans.forward_pairs(
        hidden, _head(weight, bias, ignore_index, temperature, logit_scale, softcap), labels, cu_seqlens, num_pairs,
        plans.Needs(need_hidden, need_weight, need_bias), workspace_bytes,
        separable=not set(o.losses) & set(SEPARABLE_EXCEPT), group_loss=group_loss,
    )  # fmt: skip
    return loss, metrics, *(hidden.new_empty(0) if g is None else g for g in gradients)


@linear_paired_loss.register_fake
def _(
    hidden, weight, labels, bias, ref_logps, cu_seqlens, ignore_index, temperature, logit_scale, softcap, objective,
    num_pairs, workspace_bytes, need_hidden, need_weight, need_bias,
):  # fmt: skip
    dtype = _wide(hidden.dtype)
    absent = hidden.new_empty(0)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(6, num_pairs, dtype=dtype),
        torch.empty_like(hidden) if need_hidden else absent,
        torch.empty_like(weight, dtype=dtype) if need_weight else absent,
        torch.empty_like(bias, dtype=dtype) if need_bias and bias is not None else absent,
    )


def _save_linear_paired(ctx, inputs, output):
    hidden, weight, _, bias = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:], hidden, weight, bias)


def _backward_linear_paired(ctx, grad, *unused):
    if grad is None:
        return (None,) * 16
    d_hidden, d_weight, d_bias, hidden, weight, bias = ctx.saved_tensors
    # An upstream gradient of exactly 1, known without a sync on a CPU, saves a pass over [V, d].
    eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    as_is = eager and grad.device.type == "cpu" and grad.item() == 1

    def scaled(gradient, of, needed):
        if not needed or (as_is and gradient.dtype == of.dtype):
            return gradient if needed else None
        return torch.ops.fastpref.scale_gradient(gradient, grad, of)

    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    d_hidden = scaled(d_hidden, hidden, need_hidden)
    d_weight = scaled(d_weight, weight, need_weight)
    return d_hidden, d_weight, None, scaled(d_bias, bias, need_bias), *(None,) * 12


linear_paired_loss.register_autograd(_backward_linear_paired, setup_context=_save_linear_paired)
