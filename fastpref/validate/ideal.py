"""Two readings of every formula: `Exact`, the specification, and `Ideal`, fp64 arithmetic with our rounding points.

The ideal is the best that an implementation can do which stores what ours stores:

    head output      rounded to the inputs' dtype (the product's output); the label's also in fp32, and its rounded
                     self is replaced inside the log-sum-exp
    log-sum-exp      in fp32: its sum, the sum's log, and the total with the maximum
    per row          log-probs, statistics and coefficients c in fp32
    U                rounded to the inputs' dtype
    c * H, c         rounded to the inputs' dtype, as operands of the products for dW and db (fp16: in units of a
                     power of two, against underflow)
    sequence sums    rounded after each token; so is their difference to the reference model's
    U W              rounded where the plan keeps it (`frozen`), and on a CPU, which has no product of half-precision
                     operands with an fp32 result: there each product is rounded before groups or slices are added
    gradients        rounded once at the end

With fp64 inputs nothing is rounded, and the ideal is the truth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref import reference
from fastpref.reference import LogitTransform, TokenStatistics
from fastpref.validate.rounding import (
    EXACT,
    Divergence,
    Rounding,
    divergence,
    divergence_gradient,
    lse_of,
    rounded,
    slope_of,
)


class Partition(NamedTuple):
    """The pieces in which the gradient products run. They matter where each piece is rounded."""

    keeps_product: bool = False  # U W is stored before c is known
    row_groups: tuple[Tensor, ...] = ()  # row indices; none: all rows at once
    slice_width: int | None = None  # of the vocabulary; None: all of it


class HeadInputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Exact:
    """The specification, in the dtype of its inputs. `logps` collects the log-probs that losses are made of."""

    def __init__(self) -> None:
        self.logps: list[Tensor] = []

    def keep(self, logps: Tensor) -> Tensor:
        self.logps.append(logps)
        return logps

    def stored(self, x: Tensor) -> Tensor:
        """An intermediate result that is larger than what is made of it."""
        return x

    def sequence_logprobs(self, logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return reference.sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens)

    def token_logprobs(self, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return self.keep(reference.token_logprobs(logits, labels, **options))

    def token_statistics(self, logits: Tensor, labels: Tensor, **options: Any) -> TokenStatistics:
        return reference.token_statistics(logits, labels, **options)

    def linear_token_logprobs(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, pieces: Partition, **options: Any
    ) -> Tensor:
        return self.keep(reference.linear_token_logprobs(hidden, weight, labels, bias, **options))

    def linear_token_statistics(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, pieces: Partition, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """(log-probs, entropy)."""
        found = reference.token_statistics(F.linear(hidden, weight, bias), labels, **options)
        assert found.entropy is not None
        return found.logps, found.entropy

    def token_kl(
        self, logits: Tensor, ref_logits: Tensor, mask: Tensor, direction: str, beta: float, **options: Any
    ) -> Tensor:  # fmt: skip
        return reference.token_kl(logits, ref_logits, direction, beta=beta, mask=mask, **options)

    def linear_token_kl(
        self, own: HeadInputs, ref: HeadInputs, mask: Tensor, direction: str, beta: float, pieces: Partition,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        given = (own.hidden, own.weight, ref.hidden, ref.weight, own.bias, ref.bias)
        return reference.linear_token_kl(*given, direction=direction, beta=beta, mask=mask, **options)


class Ideal(Exact):
    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding

    def stored(self, x: Tensor) -> Tensor:
        return _Stored.apply(x, self.rounding.wide)

    def sequence_logprobs(self, logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        bounds = reference.sequence_bounds(labels, cu_seqlens)
        flat = logps.reshape(-1)
        return torch.stack([_Sum.apply(flat[a:b], self.rounding.wide) for a, b in bounds])

    def token_logprobs(self, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return self.keep(self.token_statistics(logits, labels, **options).logps)

    def token_statistics(
        self, logits: Tensor, labels: Tensor, *, ignore_index: int = -100, **transform: Any
    ) -> TokenStatistics:
        flat = logits.reshape(-1, logits.shape[-1])
        found = _RowStatistics.apply(
            flat, labels.reshape(-1), ignore_index, LogitTransform(**transform), self.rounding.wide
        )
        logps, entropy, mean, log_sum_sq = (x.view(labels.shape) for x in found)
        top1 = reference.token_statistics(logits, labels, ignore_index=ignore_index, **transform).is_top1
        return TokenStatistics(logps, entropy, mean, top1, log_sum_sq)

    def linear_token_logprobs(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, pieces: Partition, *,
        ignore_index: int = -100, **transform: Any,
    ) -> Tensor:  # fmt: skip
        flat = hidden.reshape(-1, hidden.shape[-1])
        logps = _LinearLogprobs.apply(
            flat, weight, bias, labels.reshape(-1), ignore_index, LogitTransform(**transform), self.rounding, pieces
        )
        return self.keep(logps.view(labels.shape))

    def linear_token_statistics(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, pieces: Partition, *,
        ignore_index: int = -100, **transform: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = hidden.reshape(-1, hidden.shape[-1])
        logps, entropy = _LinearStatistics.apply(
            flat, weight, bias, labels.reshape(-1), ignore_index, LogitTransform(**transform), self.rounding, pieces
        )
        return logps.view(labels.shape), entropy.view(labels.shape)

    def token_kl(
        self, logits: Tensor, ref_logits: Tensor, mask: Tensor, direction: str, beta: float, **options: Any
    ) -> Tensor:  # fmt: skip
        return _TokenKL.apply(
            logits, ref_logits, mask, (direction, beta), LogitTransform(**options), self.rounding.wide
        )

    def linear_token_kl(
        self, own: HeadInputs, ref: HeadInputs, mask: Tensor, direction: str, beta: float, pieces: Partition,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        return _LinearKL.apply(*own, ref, mask, (direction, beta), LogitTransform(**options), self.rounding, pieces)


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Sum(torch.autograd.Function):
    """A sequence's log-prob, token by token: every partial sum is rounded, and so is the coefficient on its way back
    (the log-probs of ignored rows are 0). Rewards subtract such sums from each other."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.shape, ctx.dtype = logps.shape, dtype
        total = logps.new_zeros(())
        for logp in logps.cpu():
            total = rounded(total.cpu() + logp, dtype)
        return total.to(logps.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rounded(grad, ctx.dtype).expand(ctx.shape), None


def _unit_gradient(z: Tensor, lse: Tensor, label: Tensor, logps: Tensor) -> Tensor:
    u = -(z - lse[:, None]).exp()
    return u.scatter(1, label[:, None], -torch.expm1(logps)[:, None])


def _entropy_gradient(z: Tensor, lse: Tensor, entropy: Tensor) -> Tensor:
    log_p = z - lse[:, None]
    p = log_p.exp()
    return torch.where(p > 0, -p * (log_p + entropy[:, None]), 0)


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform, wide) -> Any:
        ignored = labels == ignore_index
        label = labels.masked_fill(ignored, 0).long()
        z = rounded(transform(logits), wide)
        lse = lse_of(z, wide)
        logps = rounded(z.gather(1, label[:, None])[:, 0] - lse, wide)
        p = (z - lse[:, None]).exp()
        energy = rounded(torch.where(p > 0, p * z, 0).sum(1), wide)
        entropy = rounded(lse - energy, wide)
        log_sum_sq = rounded(rounded((2 * z).logsumexp(1), wide) - 2 * lse, wide)
        ctx.save_for_backward(z, lse, label, logps, entropy, ignored)
        ctx.transform, ctx.wide = transform, wide
        values = (logps, entropy, rounded(z.mean(1), wide), log_sum_sq)
        return tuple(x.masked_fill(ignored, 0) for x in values)

    @staticmethod
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor, *unused: Tensor) -> Any:
        z, lse, label, logps, entropy, ignored = ctx.saved_tensors
        gradient = rounded(d_logps, ctx.wide)[:, None] * _unit_gradient(z, lse, label, logps)
        mixed = _entropy_gradient(z, lse, entropy)
        gradient = (gradient + rounded(d_entropy, ctx.wide)[:, None] * mixed) * slope_of(z, ctx.transform)
        return gradient.masked_fill(ignored[:, None], 0), None, None, None, None


def _in_another_order(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The head output as an fp32 product sums it whose terms come in another order.

    Plan `recompute` forms the head output twice, by products of different shapes, which need not agree in the last
    bits: exp(z - lse) inherits an error of some eps |z|. (Rounded to half precision they all but always agree.)
    """
    product = hidden.flip(1).float() @ weight.flip(1).float().t()
    return (product if bias is None else product + bias).to(EXACT)


def _against(u: Tensor, scaled: Tensor, rounding: Rounding) -> Tensor:
    """U^T scaled, with fp16 operands brought to size 1 by a power of two."""
    size = scaled.abs().max() if rounding.io == torch.float16 and scaled.numel() else scaled.new_ones(())
    unit = torch.exp2(size.log2().ceil()) if size > 0 else 1.0
    return rounded(u.t() @ rounded(scaled / unit, rounding.io), rounding.product) * unit


def _head_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor, transform: LogitTransform, rounding: Rounding
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, log-sum-exp, log-probs of the labels)."""
    raw = F.linear(hidden, weight, bias)
    z = rounded(transform(rounded(raw, rounding.io)), rounding.wide)
    own = rounded(transform(rounded(raw.gather(1, label[:, None]), rounding.wide)), rounding.wide)
    lse = lse_of(z.scatter(1, label[:, None], own), rounding.wide)
    return z, lse, rounded(own[:, 0] - lse, rounding.wide)


def _products(
    u: Tensor, coefs: Tensor, hidden: Tensor, weight: Tensor, rounding: Rounding, pieces: Partition, with_bias: bool
) -> tuple[Any, ...]:
    """(dH, dW, db) of rows whose head output has the gradient coefs * u."""
    width = pieces.slice_width or weight.shape[0]
    kept = rounding.io if pieces.keeps_product else rounding.product
    product = sum(rounded(part @ w, kept) for part, w in zip(u.split(width, 1), weight.split(width), strict=True))
    groups = pieces.row_groups or (torch.arange(u.shape[0], device=u.device),)
    d_weight = sum(_against(u[g], coefs[g] * hidden[g], rounding) for g in groups)
    d_bias = None
    if with_bias:
        d_bias = torch.stack([_against(u[g], coefs[g], rounding)[:, 0] for g in groups]).sum(0)
    return coefs * product, d_weight, d_bias


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
        transform: LogitTransform, rounding: Rounding, pieces: Partition,
    ) -> Tensor:  # fmt: skip
        ignored = labels == ignore_index
        label = labels.masked_fill(ignored, 0).long()
        z, lse, logps = _head_rows(hidden, weight, bias, label, transform, rounding)
        if pieces.slice_width is not None and rounding.io == torch.float32:
            z = rounded(transform(_in_another_order(hidden, weight, bias)), rounding.wide)
        u = rounded(_unit_gradient(z, lse, label, logps) * slope_of(z, transform), rounding.io)
        ctx.save_for_backward(u.masked_fill(ignored[:, None], 0), hidden, weight)
        ctx.rounding, ctx.pieces = rounding, pieces
        return logps.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        coefs = rounded(grad, ctx.rounding.wide)[:, None]
        u, hidden, weight = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[2]
        return *_products(u, coefs, hidden, weight, ctx.rounding, ctx.pieces, with_bias), *(None,) * 5


class _LinearStatistics(torch.autograd.Function):
    """Log-probs and entropies. The coefficients of both are mixed into one gradient before it is rounded."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
        transform: LogitTransform, rounding: Rounding, pieces: Partition,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ignored = labels == ignore_index
        label = labels.masked_fill(ignored, 0).long()
        z, lse, logps = _head_rows(hidden, weight, bias, label, transform, rounding)
        log_p = z.log_softmax(1)
        entropy = rounded(-torch.where(log_p.exp() > 0, log_p.exp() * log_p, 0).sum(1), rounding.wide)
        slope = slope_of(z, transform).masked_fill(ignored[:, None], 0)
        unit, mixed = _unit_gradient(z, lse, label, logps) * slope, _entropy_gradient(z, lse, entropy) * slope
        ctx.save_for_backward(unit, mixed, hidden, weight)
        ctx.rounding, ctx.pieces = rounding, pieces
        return logps.masked_fill(ignored, 0), entropy.masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, d_logps: Tensor, d_entropy: Tensor) -> Any:
        unit, mixed, hidden, weight = ctx.saved_tensors
        c, e = (rounded(d, ctx.rounding.wide)[:, None] for d in (d_logps, d_entropy))
        size = torch.maximum(c.abs(), e.abs())
        size = size.masked_fill(size == 0, 1)
        u = rounded(c / size * unit + e / size * mixed, ctx.rounding.io)
        with_bias = ctx.needs_input_grad[2]
        return *_products(u, size, hidden, weight, ctx.rounding, ctx.pieces, with_bias), *(None,) * 5


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, mask: Tensor, what: Divergence, transform, wide
    ) -> Tensor:
        z, ref_z = (rounded(transform(x), wide) for x in (logits, ref_logits))
        kl, own = divergence(z, ref_z, what, wide)
        k = divergence_gradient(z, ref_z, lse_of(z, wide), lse_of(ref_z, wide), own, what) * slope_of(z, transform)
        ctx.save_for_backward(k.masked_fill(~mask[:, None], 0))
        ctx.wide = wide
        return kl.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rounded(grad, ctx.wide)[:, None] * ctx.saved_tensors[0], None, None, None, None, None


class _LinearKL(torch.autograd.Function):
    # with K = d divergence / d head output in the place of U
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_LinearLogprobs.backward(ctx, grad), None

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ref: HeadInputs, mask: Tensor,
        what: Divergence, transform: LogitTransform, rounding: Rounding, pieces: Partition,
    ) -> Tensor:  # fmt: skip
        both = (HeadInputs(hidden, weight, bias), ref)
        z, ref_z = (rounded(transform(rounded(F.linear(*x), rounding.io)), rounding.wide) for x in both)
        kl, own = divergence(z, ref_z, what, rounding.wide)
        lse, ref_lse = lse_of(z, rounding.wide), lse_of(ref_z, rounding.wide)
        if pieces.slice_width is not None and rounding.io == torch.float32:
            z, ref_z = (rounded(transform(_in_another_order(*x)), rounding.wide) for x in both)
        k = divergence_gradient(z, ref_z, lse, ref_lse, own, what) * slope_of(z, transform)
        ctx.save_for_backward(rounded(k, rounding.io).masked_fill(~mask[:, None], 0), hidden, weight)
        ctx.rounding, ctx.pieces = rounding, pieces
        return kl.masked_fill(~mask, 0)
