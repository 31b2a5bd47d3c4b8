"""Views that hold the same numbers as a contiguous tensor, lying differently in memory."""

from __future__ import annotations

from torch import Tensor

KINDS = ("gaps", "sliced rows", "transposed", "expanded")


def _filled(like: Tensor, *shape: int) -> Tensor:
    """What must not be read: NaN, True, and for integers a plausible token, since an index out of range may crash."""
    return like.new_full(shape, float("nan") if like.is_floating_point() else 1)


def view_of(t: Tensor, kind: str) -> Tensor | None:
    """`t` as such a view, a leaf; None where there is none of that kind. `expanded` repeats the first entry."""
    last = t.shape[-1] if t.ndim else 0
    if t.ndim == 0 or (kind == "transposed" and t.ndim == 1):
        return None
    match kind:
        case "gaps":
            view = _filled(t, *t.shape[:-1], 2 * last)[..., ::2]
        case "sliced rows":  # every other one, 3 elements into wider ones: no 16-byte boundary anywhere
            columns = slice(3, 3 + last)
            view = _filled(t, last + 5)[columns] if t.ndim == 1 else _filled(t, 2 * len(t), *t.shape[1:-1], last + 5)
            view = view if t.ndim == 1 else view[::2, ..., columns]
        case "transposed":
            view = _filled(t, last, *t.shape[1:-1], t.shape[0]).transpose(0, -1)
        case _:
            return t.detach()[:1].expand(t.shape).requires_grad_(t.requires_grad)
    view.copy_(t.detach())
    return view.requires_grad_(t.requires_grad)
