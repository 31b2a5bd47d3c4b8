"""The matrix products of the plans. Sums are in fp32 and rounded once, and nothing else of the head's size is made."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.common.memory import MIB
from fastpref.common.precision import HALF
from fastpref.plans.compact import chunks
from fastpref.plans.head import Head, Needs

SCRATCH = 64 * MIB  # of a product that cannot be stored as it comes
MIXED_OUTPUT = ("cuda",)  # devices with products of operands in half precision whose result is fp32
ONE_WAVE = 132 * 128 * 256  # elements of a result that has as many tiles as an H100 has multiprocessors


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the logits `hidden @ weight.T + bias` to `out`."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def scaled_rows(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * scale` in `dtype`, in one pass and rounded once. `scale` is one factor for each row, or one in all."""
    scale = scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.ndim else scale
    return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))


def scaled_in_place(product: Tensor, coefs: Tensor, dtype: torch.dtype) -> Tensor:
    """`product` with its rows times `coefs`, in `dtype`. Written over `product` if that is of `dtype` already."""
    return product.mul_(coefs[:, None]) if product.dtype == dtype else scaled_rows(product, coefs, dtype)


def unit_product(u: Tensor, weight: Tensor) -> Tensor:
    """U W `[n, d]` in the compute dtype.

    For few rows cuBLAS may split the sum over V among thread blocks. It would add up their parts in the dtype of the
    result, so that is fp32 then.
    """
    half = u.dtype in HALF
    if u.device.type in MIXED_OUTPUT and half and u.shape[0] * weight.shape[1] < ONE_WAVE:
        return torch.mm(u, weight, out_dtype=torch.float32).to(u.dtype)
    return torch.mm(u, weight)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`out = a @ b`, or `out += a @ b` with `add`. Added up in fp32, and rounded only when stored as `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type in MIXED_OUTPUT:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # none on the CPU (torch 2.13): the product of copies, a slice of the sum at a time
        if not (add or a.shape[1]):
            out.zero_()
        for part in chunks(a.shape[1], max(1, SCRATCH // (out.element_size() * (a.shape[0] + b.shape[1])))):
            left, right = a[:, part].to(out.dtype), b[part].to(out.dtype)
            torch.addmm(out, left, right, beta=1 if add or part.start else 0, out=out)


def _slices(out: Tensor) -> list[slice]:
    """Slices of a result's rows, as many at a time as fit the scratch in fp32."""
    return list(chunks(out.shape[0], max(1, SCRATCH // (4 * max(1, out.shape[1])))))


class ParameterGradients:
    """dW `[V, d]` and db `[V]` of the head, added up in `dtype` over groups of rows. None where not needed."""

    def __init__(self, head: Head, needs: Needs, dtype: torch.dtype) -> None:
        self.weight = torch.empty_like(head.weight, dtype=dtype) if needs.weight else None
        self.bias = torch.empty_like(head.bias, dtype=dtype) if needs.bias and head.bias is not None else None
        self._started = False

    def add(self, u: Tensor, hidden: Tensor, coefs: Tensor, columns: slice = slice(None)) -> None:
        """Add U^T (c * H) to dW and U^T c to db, in the vocabulary rows `columns`.

        Call `finish` after each pass over the vocabulary. The first pass writes, later ones add.
        """
        dtype = torch.float32 if u.dtype == torch.float16 else u.dtype
        if self.weight is not None:
            self._add(self.weight[columns], u, scaled_rows(hidden, coefs, dtype))
        if self.bias is not None:
            self._add(self.bias[columns, None], u, coefs[:, None].to(dtype))

    def _add(self, total: Tensor, u: Tensor, scaled: Tensor) -> None:
        """total += U^T scaled, where `scaled` is c * H. In the first pass it is written instead of added."""
        if u.dtype != torch.float16:
            matmul_into(total, u.t(), scaled, add=self._started)
            return
        # Coefficients of 1e-6 would underflow in fp16, and a GradScaler's 65536 would overflow. So the product is of
        # values of size 1. Dividing and multiplying by a power of two rounds nothing.
        peak = scaled.abs().amax() if scaled.numel() else scaled.new_ones(())
        peak = peak.masked_fill(peak == 0, 1)
        peak = peak / torch.frexp(peak).mantissa
        values = (scaled / peak).to(u.dtype)
        if total.dtype == torch.float32 and not self._started:
            matmul_into(total, u.t(), values, add=False)
            total.mul_(peak)
            return
        for part in _slices(total):
            product = torch.empty_like(total[part], dtype=torch.float32)
            matmul_into(product, u[:, part].t(), values, add=False)
            product.mul_(peak)
            total[part].add_(product) if self._started else total[part].copy_(product)

    def finish(self) -> None:
        """End a pass over the vocabulary: what comes next is added."""
        self._started = True
