"""The execution plans of the linear log-prob op, on real tensors: which matrix products run, in what memory.

With U = onehot - softmax (never scaled) and c the upstream gradient of each row's log-prob,

    dH = c * (U W)          dW = U^T (c * H)          db = U^T c

so c only ever scales something of width d, and U can be written before c is known. Rows that no label scores
never enter a product. Every function here works on flattened `[N, d]` hidden states.

    no_grad    1 product    one tile
    frozen     2            one tile, and U W [N, d] kept for the backward
    store      3            U [n, V] kept in the compute dtype
    pair       3            U of one group of whole pairs or sequences (needs the objective)
    recompute  4            one tile; the backward runs over slices of the vocabulary

An entropy has a gradient of its own, which no scaling of U gives: where one is asked for, `store` keeps the logits in
place of U, and `frozen` recomputes them if a gradient of the entropy arrives (4 products then, else 2).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import memory
from fastpref.common.memory import MIB
from fastpref.common.precision import wide
from fastpref.plans.units import UnitRows
from fastpref.reference import LogitTransform

PLANS = ("no_grad", "frozen", "store", "pair", "recompute")


class Head(NamedTuple):
    """The output layer: `transform(hidden @ weight.T + bias)`."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    ignore_index: int

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]


class Gradients(NamedTuple):
    """Gradients formed before the upstream gradient is known, in fp32 (fp64): scaled, then rounded, by the backward.
    None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Needs(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def tile_rows(head: Head, rows: int, workspace_bytes: int | None) -> int:
    """Rows of logits that exist at once where nothing is kept: up to 1 GiB of them on an accelerator (4096 rows of
    a 128 k vocabulary in bf16, enough for a full-speed product), 80 MiB on a CPU; all tiles about the same size,
    in multiples of 16 (on a CPU, products of 481 rows were 5 % slower than of 496)."""
    tile = 80 * MIB if head.weight.device.type == "cpu" else 1024 * MIB
    limit = max(1, min(tile, workspace_bytes or tile) // (head.vocab * head.weight.element_size()))
    even = math.ceil(rows / max(1, math.ceil(rows / limit)))
    return max(1, min(math.ceil(even / 16) * 16, limit, rows))


def compact(labels: Tensor, ignore_index: int) -> Tensor:
    """Indices of the rows that a label scores `[n]`. The one host sync of the op: n sizes the products."""
    return (labels != ignore_index).nonzero().squeeze(1)


def gather(values: Tensor, rows: Tensor) -> Tensor:
    return values if rows.numel() == values.shape[0] else values.index_select(0, rows)


def scatter(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """Inverse of `gather`: zeros where no row was."""
    if rows.numel() == total:
        return values
    return values.new_zeros(total, *values.shape[1:]).index_copy_(0, rows, values)


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def row_stride(columns: int, like: Tensor) -> int:
    """Elements from one row to the next in logits that we allocate: their backend says where rows should start."""
    return backend_for(like).row_stride(columns, like.element_size())


def logits_buffer(head: Head, rows: int) -> Tensor:
    """An uninitialised `[rows, V]` in the compute dtype."""
    return head.weight.new_empty(rows, row_stride(head.vocab, head.weight))[:, : head.vocab]


@contextlib.contextmanager
def borrowed_logits(rows: int, columns: int, like: Tensor) -> Iterator[Tensor]:
    """The same as scratch, for the duration of a `with` block."""
    with memory.borrowed(rows, row_stride(columns, like), like=like) as buffer:
        yield buffer[:, :columns]


def _project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


def fold(
    tile: Tensor, hidden: Tensor, labels: Tensor, head: Head, *, write_u: bool, statistics: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Logits of `hidden` into `tile`, then their `logps`, `lse` and statistics; with `write_u` the tile ends as U."""
    backend = backend_for(tile)
    _project(hidden, head.weight, head.bias, tile)
    exact = None
    if tile.dtype in (torch.bfloat16, torch.float16):
        exact = backend.target_logits(hidden, head.weight, head.bias, labels)
    return backend.row_logprob(
        tile, labels, transform=head.transform, ignore_index=head.ignore_index, statistics=statistics,
        target_logits=exact, write_u=write_u,
    )  # fmt: skip


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """`out = a @ b`, or `+=`: accumulated in fp32 and, on CUDA, rounded only when stored as `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # no mixed-output product on the CPU (torch 2.13): each product is rounded once
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)


class ParameterGradients:
    """dW and db of the head, added up over groups of rows in `dtype`; None where not needed."""

    def __init__(self, head: Head, needs: Needs, dtype: torch.dtype) -> None:
        self.weight = torch.empty_like(head.weight, dtype=dtype) if needs.weight else None
        self.bias = torch.empty_like(head.bias, dtype=dtype) if needs.bias and head.bias is not None else None
        self._started = False

    def add(self, u: Tensor, hidden: Tensor, coefs: Tensor, columns: slice = slice(None)) -> None:
        """Add U^T (c * H) and U^T c to the vocabulary rows `columns`; `finish` after each pass over them."""
        if self.weight is not None:
            self._add(self.weight[columns], u, hidden * coefs[:, None])
        if self.bias is not None:
            self._add(self.bias[columns, None], u, coefs[:, None])

    def _add(self, total: Tensor, u: Tensor, scaled: Tensor) -> None:
        """total += U^T scaled, with `scaled` rounded once, from fp32."""
        if u.dtype != torch.float16:
            _matmul_into(total, u.t(), scaled.to(u.dtype), add=self._started)
            return
        # Coefficients of 1e-6 would underflow in fp16, and a GradScaler's 65536 overflow: the product is of values
        # of size 1, at the price of a buffer.
        # Dividing and multiplying by a power of two rounds nothing.
        peak = scaled.abs().max() if scaled.numel() else scaled.new_ones(())
        peak = peak.masked_fill(peak == 0, 1)
        peak = peak / torch.frexp(peak).mantissa
        product = torch.empty_like(total, dtype=torch.float32)
        _matmul_into(product, u.t(), (scaled / peak).to(u.dtype), add=False)
        product.mul_(peak)
        total.add_(product) if self._started else total.copy_(product)

    def finish(self) -> None:
        self._started = True


class Forward(NamedTuple):
    logps: Tensor  # [N]
    lse: Tensor  # [n]
    kept: Tensor  # what the plan keeps for its backward: U or logits [n, V], U W [N, d], or empty
    rows: Tensor  # the scored rows [n]
    statistics: Tensor  # [k, N], as requested


def forward(
    hidden: Tensor, head: Head, labels: Tensor, plan: str, workspace_bytes: int | None,
    statistics: Sequence[str] = (), *, keep_logits: bool = False,
) -> Forward:  # fmt: skip
    """`keep_logits`: plan `store` keeps them in place of U, as it does for an entropy."""
    total = hidden.shape[0]
    rows = compact(labels, head.ignore_index)
    labels = gather(labels, rows)
    n = rows.numel()
    results = hidden.new_empty(2 + len(statistics), n, dtype=wide(hidden.dtype))
    step = tile_rows(head, n, workspace_bytes)
    unit_hidden = torch.zeros_like(hidden) if plan == "frozen" else None
    u = logits_buffer(head, n) if plan == "store" else None
    write_u = plan == "frozen" or (plan == "store" and not keep_logits and "entropy" not in statistics)
    with borrowed_logits(0 if u is not None else step, head.vocab, head.weight) as scratch:
        for part in _chunks(n, step):
            tile = scratch[: part.stop - part.start] if u is None else u[part]
            h = hidden.index_select(0, rows[part])
            folded = fold(tile, h, labels[part], head, write_u=write_u, statistics=statistics)
            for result, name in zip(results, ("logps", "lse", *statistics), strict=True):
                result[part] = folded[name]
            if unit_hidden is not None:
                unit_hidden.index_copy_(0, rows[part], torch.mm(tile, head.weight))
    kept = hidden.new_empty(0) if u is None else u
    logps, lse, *values = results
    scattered = torch.stack([scatter(v, rows, total) for v in values]) if values else results.new_empty(0, total)
    return Forward(
        scatter(logps, rows, total), lse.clone(), kept if unit_hidden is None else unit_hidden, rows, scattered
    )


def backward_store(
    u: Tensor, hidden: Tensor, head: Head, coefs: Tensor, needs: Needs, parameters: ParameterGradients
) -> Tensor | None:
    """The two gradient products from a stored U, everything on scored rows; returns dH `[n, d]`, not yet rounded."""
    d_hidden = None
    if needs.hidden:
        product = torch.empty_like(hidden, dtype=wide(u.dtype))
        _matmul_into(product, u, head.weight, add=False)
        d_hidden = product.mul_(coefs[:, None])
    parameters.add(u, hidden, coefs)
    parameters.finish()
    return d_hidden


class Upstream(NamedTuple):
    """Gradients that arrive at the scored rows `[n]`."""

    logps: Tensor
    entropy: Tensor | None = None

    def split(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, logps, entropy): what a row of width d is scaled by, and what is mixed into its logits' gradient.

        The mixture is of size about 1: coefficients of 1e-6 times probabilities would underflow in fp16.
        """
        if self.entropy is None:
            return self.logps, None, None
        scale = torch.maximum(self.logps.abs(), self.entropy.abs())
        scale = scale.masked_fill(scale == 0, 1)
        return scale, self.logps / scale, self.entropy / scale


def backward_recompute(
    hidden: Tensor, head: Head, labels: Tensor, logps: Tensor, lse: Tensor, upstream: Upstream, needs: Needs,
    parameters: ParameterGradients, workspace_bytes: int | None, *,
    entropy: Tensor | None = None, logits: Tensor | None = None, first_column: int = 0,
) -> Tensor | None:  # fmt: skip
    """Three products over slices of the vocabulary, everything on scored rows; returns dH `[n, d]`, not yet rounded.

    Two products with the `logits` `[n, V]` at hand. `entropy` `[n]` is needed where its gradient is. `first_column` is
    the vocabulary index of the head's first row, if it is a part of the head whose labels and `lse` these are.
    """
    n = hidden.shape[0]
    width = tile_rows(head, n, workspace_bytes) * head.vocab // max(1, n)
    if width < head.vocab:
        width = min(head.vocab, max(128, width // 128 * 128))  # slices begin on 16-byte boundaries
    d_hidden = torch.zeros_like(hidden, dtype=wide(hidden.dtype)) if needs.hidden else None
    scale, grad_logps, grad_entropy = upstream.split()
    backend = backend_for(hidden)
    with borrowed_logits(n, width, hidden) as tile:
        for part in _chunks(head.vocab, width):
            weight = head.weight[part]
            u = tile[:, : part.stop - part.start]
            if logits is None:
                _project(hidden, weight, None if head.bias is None else head.bias[part], u)
            backend.row_gradient(
                u if logits is None else logits[:, part], labels, logps, lse, u, transform=head.transform,
                ignore_index=head.ignore_index, first_column=first_column + part.start,
                grad_logps=grad_logps, entropy=entropy, grad_entropy=grad_entropy,
            )  # fmt: skip
            if d_hidden is not None:
                _matmul_into(d_hidden, u, weight, add=True)
            parameters.add(u, hidden, scale, part)
    parameters.finish()
    return None if d_hidden is None else d_hidden.mul_(scale[:, None])


def unit_rows(labels: Tensor, cu_seqlens: Tensor | None, sequences: int, sides: int, ignore_index: int) -> UnitRows:
    scored = labels != ignore_index
    if cu_seqlens is None:
        cu_seqlens = torch.arange(sequences + 1, device=labels.device) * (labels.numel() // sequences)
    before = torch.cat([scored.new_zeros(1, dtype=torch.long), scored.long().cumsum(0)])
    return UnitRows(compact(labels, ignore_index), before[cu_seqlens.long()].tolist(), sides)


def forward_units(
    hidden: Tensor, head: Head, labels: Tensor, cu_seqlens: Tensor | None, sequences: int, sides: int, needs: Needs,
    workspace_bytes: int | None, separable: bool, group_loss: Callable, statistics: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
    """Loss, metrics and gradients together, one group of whole units at a time.

    `group_loss(logps, cu_seqlens, rows, first, last, **statistics)` returns (loss, metrics `[k, units]`, coefs) of
    units first..last-1, whose token log-probs are those of `rows` of the flattened batch. A group that outgrows the
    workspace (one huge unit, or a loss that couples the whole batch: `separable` false) is recomputed slice by
    slice instead of kept.
    """
    units = unit_rows(labels, cu_seqlens, sequences, sides, head.ignore_index)
    labels = gather(labels, units.rows)
    limits = memory.workspace(hidden.device, workspace_bytes)
    rows_wanted, max_rows = (size // (head.vocab * hidden.element_size()) for size in limits)
    groups = list(units.groups(rows_wanted)) if separable else [(0, units.number)]
    kept_rows = max((size for g in groups if (size := units.size(*g)) <= max_rows), default=0)
    d_hidden = torch.zeros_like(hidden, dtype=wide(hidden.dtype)) if needs.hidden else None
    parameters = ParameterGradients(head, needs, wide(hidden.dtype))
    losses, metrics = [], []
    with borrowed_logits(kept_rows, head.vocab, head.weight) as scratch:
        for first, last in groups:
            at = units.of(first, last)
            rows, y = units.rows[at], labels[at]
            h = hidden.index_select(0, rows)
            edges = units.cu_seqlens(first, last)
            if at.numel() <= max_rows:
                u = scratch[: at.numel()]
                folded = fold(u, h, y, head, write_u=True, statistics=statistics)
                extra = {name: folded[name] for name in statistics}
                loss, metric, coefs = group_loss(folded["logps"], edges, rows, first, last, **extra)
                part = backward_store(u, h, head, coefs, needs, parameters)
            else:
                done = forward(h, head, y, "no_grad", workspace_bytes, statistics)
                extra = dict(zip(statistics, done.statistics, strict=True))
                loss, metric, coefs = group_loss(done.logps, edges, rows, first, last, **extra)
                part = backward_recompute(
                    h, head, y, done.logps, done.lse, Upstream(coefs), needs, parameters, workspace_bytes
                )
            losses.append(loss)
            metrics.append(metric)
            if d_hidden is not None and part is not None:
                d_hidden.index_copy_(0, rows, part)
    return torch.stack(losses).sum(), torch.cat(metrics, 1), Gradients(d_hidden, parameters.weight, parameters.bias)


def forward_tokens(
    hidden: Tensor, head: Head, labels: Tensor, needs: Needs, workspace_bytes: int | None, num_metrics: int,
    token_loss: Callable,
) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
    """Loss, metrics `[num_metrics, N]` and gradients together, tile by tile, for a loss that adds up over tokens.

    `token_loss(rows, logps, entropy)` returns (losses `[n]`, metrics, d loss / d logp, d loss / d entropy or None)
    of a tile's rows. The coefficients are known while the tile's logits still exist, so they are mixed into one
    gradient in place: 3 products (2 with a frozen head) and one tile of memory, an entropy bonus included.
    """
    rows = compact(labels, head.ignore_index)
    labels = gather(labels, rows)
    n, backend = rows.numel(), backend_for(hidden)
    dtype = wide(hidden.dtype)
    metrics = hidden.new_zeros(num_metrics, hidden.shape[0], dtype=dtype)
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs.hidden else None
    parameters = ParameterGradients(head, needs, dtype)
    losses = [hidden.new_zeros((), dtype=dtype)]
    step = tile_rows(head, n, workspace_bytes)
    with borrowed_logits(step, head.vocab, head.weight) as scratch:
        for part in list(_chunks(n, step)) or [slice(0, 0)]:  # without rows, zero gradients all the same
            tile = scratch[: part.stop - part.start]
            h, y = hidden.index_select(0, rows[part]), labels[part]
            folded = fold(tile, h, y, head, write_u=False, statistics=("entropy",))
            logps, entropy = folded["logps"], folded["entropy"]
            loss, metric, coefs, coefs_entropy = token_loss(rows[part], logps, entropy)
            losses.append(loss.sum())
            metrics.index_copy_(1, rows[part], metric)
            if not any(needs):
                continue
            scale, grad_logps, grad_entropy = Upstream(coefs, coefs_entropy).split()
            backend.row_gradient(
                tile, y, logps, folded["lse"], tile, transform=head.transform, ignore_index=head.ignore_index,
                grad_logps=grad_logps, entropy=entropy, grad_entropy=grad_entropy,
            )  # fmt: skip
            d_rows = backward_store(tile, h, head, scale, needs, parameters)
            if d_hidden is not None and d_rows is not None:
                d_hidden.index_copy_(0, rows[part], d_rows)
    return torch.stack(losses).sum(), metrics, Gradients(d_hidden, parameters.weight, parameters.bias)
