"""Operators of log-probs and row statistics from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import checks
from fastpref.ops.common import first_order_only, split_names, wide, without_autocast
from fastpref.reference import STATISTICS, LogitTransform


@torch.library.custom_op("fastpref::token_logprobs", mutates_args=())
@without_autocast
def token_logprobs(
    logits: Tensor, labels: Tensor, ignore_index: int, temperature: float, logit_scale: float,
    softcap: float | None, statistics: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logps, lse, then STATISTICS in their order), each `[N]`.

    A statistic that the comma-separated `statistics` does not name is empty.
    """
    checks.label_range(labels, logits.shape[-1], ignore_index)
    wanted = split_names(statistics)
    out = backend_for(logits).row_logprob(
        logits, labels, transform=LogitTransform(temperature, logit_scale, softcap),
        ignore_index=ignore_index, statistics=wanted,
    )  # fmt: skip
    absent = (out[name] if name in out else logits.new_empty(0) for name in STATISTICS)
    return (out["logps"], out["lse"], *absent)


@token_logprobs.register_fake
def _(logits, labels, ignore_index, temperature, logit_scale, softcap, statistics):
    n, dtype = labels.numel(), wide(logits.dtype)

    def result(name):
        if name not in split_names(statistics):
            return logits.new_empty(0)
        return logits.new_empty(n, dtype=torch.bool if name == "is_top1" else dtype)

    base = (logits.new_empty(n, dtype=dtype), logits.new_empty(n, dtype=dtype))
    return (*base, *(result(name) for name in STATISTICS))


@torch.library.custom_op("fastpref::token_logprobs_backward", mutates_args=())
@without_autocast
def token_logprobs_backward(
    grad_logps: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, labels: Tensor, logps: Tensor,
    lse: Tensor, entropy: Tensor, ignore_index: int, temperature: float, logit_scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """d logits, of their shape. An upstream gradient `[N]` that is None is zero."""
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if grad_logps is None:
        grad_logps = torch.zeros_like(logps)
    backend_for(logits).row_gradient(
        logits, labels, logps, lse, d_logits.view(-1, logits.shape[-1]),
        transform=LogitTransform(temperature, logit_scale, softcap), ignore_index=ignore_index,
        grad_logps=grad_logps, entropy=None if grad_entropy is None else entropy,
        grad_entropy=grad_entropy,
    )  # fmt: skip
    return d_logits


@token_logprobs_backward.register_fake
def _(grad_logps, grad_entropy, logits, *rest):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


first_order_only(token_logprobs_backward)


def _save_token_logprobs(ctx, inputs, output):
    logits, labels, *options = inputs
    logps, lse, entropy, *_ = output
    differentiable = (logps, entropy) if "entropy" in split_names(options[-1]) else (logps,)
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
