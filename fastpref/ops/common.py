"""What every operator needs: no autocast inside, no second derivative, and a way to scale a finished gradient."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastpref.common.precision import wide as wide
from fastpref.plans.products import scaled_rows

Objective = TypeVar("Objective")


def first_order_only(op: Any) -> None:
    """Let differentiating the operator `op`, itself a backward, raise a `RuntimeError`."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op._qualname}: fastpref's gradients cannot be differentiated again (create_graph=True)")

    op.register_autograd(refuse)


def split_names(names: str) -> tuple[str, ...]:
    """The names in a comma-separated list. Operators take strings, but no lists of strings."""
    return tuple(name for name in names.split(",") if name)


def encode(objective: NamedTuple) -> str:
    """An objective as JSON: operators take strings, but no named tuples."""
    return json.dumps(objective._asdict())


def decoder(kind: Callable[..., Objective]) -> Callable[[str], Objective]:
    """The inverse of `encode` for objectives of the class `kind`. It remembers what it has read."""

    @functools.lru_cache(maxsize=256)
    def decode(text: str) -> Objective:
        fields: dict[str, Any] = json.loads(text)
        lists: dict[str, Any] = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return kind(**(fields | lists))

    return decode


def without_autocast(f: Callable) -> Callable:
    """Decorator: run `f` without autocast. The public functions have cast already; nothing may be cast again."""

    @functools.wraps(f)
    def wrapped(*args, **kwargs):
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device, enabled=False):
            return f(*args, **kwargs)

    return wrapped


# One scalar for each row (or one in all) times a gradient that the forward has already formed.


@torch.library.custom_op("fastpref::scale_gradient", mutates_args=())
def scale_gradient(gradient: Tensor, coefs: Tensor, of: Tensor) -> Tensor:
    """`gradient * coefs`, the gradient of the tensor `of`, in its dtype.

    It is out of place, since a second backward must find `gradient` as it was. It scales before it rounds. Since `of`
    is an argument, a second differentiation reaches this operator, and its refusal.
    """
    return scaled_rows(gradient, coefs, of.dtype)


@scale_gradient.register_fake
def _(gradient, coefs, of):
    return torch.empty_like(gradient, dtype=of.dtype)


first_order_only(scale_gradient)


def register_ready_coefs(op: Any, num_inputs: int) -> None:
    """Register the backward of an operator whose outputs are loss, metrics, d loss / d its first input."""

    def save(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[2], inputs[0])

    def backward(ctx, grad, *unused):
        if grad is None:
            return (None,) * num_inputs
        coefs, first = ctx.saved_tensors
        return torch.ops.fastpref.scale_gradient(coefs, grad, first), *(None,) * (num_inputs - 1)

    op.register_autograd(backward, setup_context=save)
