"""What every operator needs: no autocast inside, no second derivative, and a way to scale a finished gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpref.common.precision import wide as wide
from fastpref.plans.products import scaled_rows


def first_order_only(op: Any) -> None:
    """Let differentiating the operator `op`, itself a backward, raise a `RuntimeError`."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op._qualname}: fastpref's gradients cannot be differentiated again (create_graph=True)")

    op.register_autograd(refuse)


def split_names(names: str) -> tuple[str, ...]:
    """The names in a comma-separated list. Operators take strings, but no lists of strings."""
    return tuple(name for name in names.split(",") if name)


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
