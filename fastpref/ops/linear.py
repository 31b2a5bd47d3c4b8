"""Operators from hidden states and the head's weight: log-probs, and what all such operators share.

The matrix products are those of `fastpref.plans.plans`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.common import checks
from fastpref.ops.common import first_order_only, split_names, wide, without_autocast
from fastpref.plans import plans
from fastpref.plans.compact import gather, scatter
from fastpref.plans.head import logits_buffer
from fastpref.plans.products import ParameterGradients
from fastpref.reference import LogitTransform

# Every operator takes `weight` as the parameter that it is: its gradient has that dtype. Under autocast `hidden` may be
# of another dtype. Then `compute_weight` is the weight in that one, cast once for all products. `scored_rows` is what
# the host knows of the rows that labels score (see `fastpref.plans.compact`).


def head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap) -> plans.Head:
    """The head as the plans take it, in the dtype that the products are in."""
    weight = weight if compute_weight is None else compute_weight
    bias = None if bias is None else bias.to(weight.dtype)
    return plans.Head(weight, bias, LogitTransform(temperature, logit_scale, softcap), ignore_index)


@torch.library.custom_op("fastpref::linear_token_logprobs", mutates_args=())
@without_autocast
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int, temperature: float,
    logit_scale: float, softcap: float | None, plan: str, workspace_bytes: int | None, statistics: str = "",
    compute_weight: Tensor | None = None, scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log-probs `[N]`, lse `[n]`, what the plan keeps for its backward, scored rows `[n]`, statistics `[k, N]`)."""
    checks.label_range(labels, weight.shape[0], ignore_index)
    head = head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap)
    names = split_names(statistics)
    logps, lse, kept, rows, values = plans.forward(
        hidden, head, labels, plan, workspace_bytes, names, scored_rows=scored_rows
    )
    return logps, lse, kept, rows, values


@linear_token_logprobs.register_fake
def _(
    hidden, weight, labels, bias, ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, statistics="",
    compute_weight=None, scored_rows=None,
):  # fmt: skip
    n = torch.library.get_ctx().new_dynamic_size() if scored_rows is None else scored_rows
    dtype = wide(hidden.dtype)
    kept = hidden.new_empty(0)
    if plan == "store":
        kept = logits_buffer(head_of(weight, compute_weight, None, ignore_index, 1.0, 1.0, None), n)
    elif plan == "frozen":
        kept = torch.empty_like(hidden)
    rows = labels.new_empty(n, dtype=torch.long)
    logps = hidden.new_empty(hidden.shape[0], dtype=dtype)
    values = hidden.new_empty(len(split_names(statistics)), hidden.shape[0], dtype=dtype)
    return logps, hidden.new_empty(n, dtype=dtype), kept, rows, values


@torch.library.custom_op("fastpref::linear_token_logprobs_backward", mutates_args=())
@without_autocast
def linear_token_logprobs_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, logps: Tensor, lse: Tensor,
    kept: Tensor, rows: Tensor, entropy: Tensor | None, grad_entropy: Tensor | None, ignore_index: int,
    temperature: float, logit_scale: float, softcap: float | None, plan: str, workspace_bytes: int | None,
    need_hidden: bool, need_weight: bool, need_bias: bool, compute_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dH, dW, db), empty where not needed.

    `entropy` `[N]` is given if it was asked for. Then plan `store` has kept logits in place of U.
    """
    head = head_of(weight, compute_weight, bias, ignore_index, temperature, logit_scale, softcap)
    needs = plans.Needs(need_hidden, need_weight, need_bias)
    parameters = ParameterGradients(head, needs, weight.dtype)
    h, y = gather(hidden, rows), gather(labels, rows)
    coefs, grad_entropy = (upstream_of(g, rows, y, ignore_index) for g in (grad, grad_entropy))
    assert coefs is not None
    if plan == "store" and entropy is None:
        d_hidden = plans.backward_store(kept, h, head, coefs, needs, parameters, hidden.dtype)
    else:
        d_hidden = plans.backward_recompute(
            h, head, y, gather(logps, rows), lse, plans.Upstream(coefs, grad_entropy), needs, parameters,
            workspace_bytes, entropy=None if entropy is None else gather(entropy, rows),
            logits=kept if plan == "store" else None, dtype=hidden.dtype,
        )  # fmt: skip
    return head_gradients(d_hidden, parameters, rows, hidden, bias)


def upstream_of(grad: Tensor | None, rows: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    """The upstream gradient of the scored rows `[n]`, from that of all rows `[N]`.

    An upper bound of their number lets in ignored rows. Their upstream gradient may be anything, and becomes 0.
    """
    return None if grad is None else gather(grad, rows).masked_fill(labels == ignore_index, 0)


def head_gradients(
    d_hidden: Tensor | None, parameters: ParameterGradients, rows: Tensor, hidden: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db) as a backward operator returns them, from the gradients of the scored rows."""
    if d_hidden is not None:
        d_hidden = scatter(d_hidden, rows, hidden.shape[0])
    d_bias = parameters.bias if parameters.bias is None or bias is None else parameters.bias.to(bias.dtype)
    return present(plans.Gradients(d_hidden, parameters.weight, d_bias), hidden)


def fake_head_gradients(needs, hidden, weight, bias):
    """The fake of a backward operator that returns (dH, dW, db)."""
    wanted = zip(needs, (hidden, weight, bias), strict=True)
    return tuple(torch.empty_like(t) if need and t is not None else hidden.new_empty(0) for need, t in wanted)


@linear_token_logprobs_backward.register_fake
def _(grad, hidden, weight, labels, bias, logps, lse, kept, rows, entropy, grad_entropy, *options):
    return fake_head_gradients(options[6:9], hidden, weight, bias)


first_order_only(linear_token_logprobs_backward)


def _save_linear(ctx, inputs, output):
    hidden, weight, labels, bias, *options, compute_weight, _ = inputs
    logps, lse, kept, rows, statistics = output
    names = split_names(options[6])
    ctx.entropy_row = names.index("entropy") if "entropy" in names else None
    constants = (lse, kept, rows) if "entropy" in names else (lse, kept, rows, statistics)
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, labels, bias, logps, lse, kept, rows, statistics, compute_weight)
    ctx.options = options[:6]


def _backward_linear(ctx, grad, *unused):
    grad_statistics, row = unused[-1], ctx.entropy_row
    if grad is None and grad_statistics is None:
        return (None,) * 13
    hidden, weight, labels, bias, logps, lse, kept, rows, statistics, compute_weight = ctx.saved_tensors
    need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    options, ignore_index, plan = list(ctx.options), ctx.options[0], ctx.options[4]
    if plan == "no_grad" or (plan == "frozen" and (need_weight or need_bias)):
        raise RuntimeError(f"plan {plan!r} kept nothing for the gradients that backward now asks for")
    if plan == "frozen" and grad_statistics is None:
        coefs = grad.masked_fill(labels == ignore_index, 0)  # an ignored row's upstream gradient may be anything
        return torch.ops.fastpref.scale_gradient(kept, coefs, hidden), *(None,) * 12
    options[4] = "recompute" if plan == "frozen" else plan
    gradients = torch.ops.fastpref.linear_token_logprobs_backward(
        torch.zeros_like(logps) if grad is None else grad, hidden, weight, labels, bias, logps, lse, kept, rows,
        None if row is None else statistics[row], None if grad_statistics is None else grad_statistics[row],
        *options, need_hidden, need_weight, need_bias, compute_weight,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = (
        g if need else None for g, need in zip(gradients, (need_hidden, need_weight, need_bias), strict=True)
    )
    return d_hidden, d_weight, None, d_bias, *(None,) * 9


linear_token_logprobs.register_autograd(_backward_linear, setup_context=_save_linear)


# Below: what losses share that form their gradients in the forward (plan `pair`). Their operators' inputs begin with
# hidden, weight, labels, bias. Their outputs are loss, metrics, dH, dW, db, the gradients in fp32.


def present(gradients: plans.Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db), empty where None: operators return tensors."""
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in gradients)
    return hidden, weight, bias


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: plans.Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """The fake of (dH, dW, db) in the outputs of such an operator."""
    dtype = wide(hidden.dtype)
    gradients = plans.Gradients(
        torch.empty_like(hidden, dtype=dtype) if needs.hidden else None,
        torch.empty_like(weight, dtype=dtype) if needs.weight else None,
        torch.empty_like(bias, dtype=dtype) if needs.bias and bias is not None else None,
    )
    return present(gradients, hidden)


def _graph_is_kept() -> bool:
    """Inside a backward: was it called with `retain_graph`? If torch cannot tell, the answer is yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def register_ready_gradients(op, num_inputs: int) -> None:
    """Register the backward of such an operator: scale the gradients that its forward has formed."""

    def save(ctx, inputs, output):
        hidden, weight, _, bias = inputs[:4]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-3:], hidden, weight, bias)

    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * num_inputs
        d_hidden, d_weight, d_bias, hidden, weight, bias = ctx.saved_tensors
        # An upstream gradient of exactly 1 saves a pass over [V, d]. On a CPU its value is known without a sync. While
        # it is being traced, it is a fake of another type and has no value.
        eager = type(grad) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        # A graph that is kept must keep its gradients. `.grad` becomes the very tensor that is returned here, and is
        # later written in place.
        as_is = eager and not _graph_is_kept() and checks.free_to_read(grad) and grad.item() == 1

        def scaled(gradient, of, needed):
            if not needed or (as_is and gradient.dtype == of.dtype):
                return gradient if needed else None
            return torch.ops.fastpref.scale_gradient(gradient, grad, of)

        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        d_hidden = scaled(d_hidden, hidden, need_hidden)
        d_weight = scaled(d_weight, weight, need_weight)
        return d_hidden, d_weight, None, scaled(d_bias, bias, need_bias), *(None,) * (num_inputs - 4)

    op.register_autograd(backward, setup_context=save)
