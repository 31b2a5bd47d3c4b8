"""The execution plans of log-probs from hidden states: which matrix products run, in what memory.

U `[n, V]` is onehot - softmax, never scaled. c `[n]` is the upstream gradient of each row's log-prob. Then

    dH = c * (U W)          dW = U^T (c * H)          db = U^T c

So c only ever scales something of width d, and U can be written before c is known. Rows that no label scores never
enter a product: n of the N rows are scored. All functions here take flattened hidden states `[N, d]`.

    no_grad    1 product    one tile
    frozen     2            one tile, and U W [N, d] kept for the backward
    store      3            U [n, V] kept in the compute dtype
    pair       3            U of one group of whole pairs or sequences (needs the objective)
    recompute  4            one tile; the backward runs over slices of the vocabulary

An entropy has a gradient of its own, which no scaling of U gives. Where an entropy is asked for, `store` keeps the
logits in place of U. `frozen` recomputes them if a gradient of the entropy arrives: 4 products then, else 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common.precision import HALF, wide
from fastpref.plans.compact import chunks, compact, compact_labels, gather_part, joined, put_rows, scatter
from fastpref.plans.head import Gradients as Gradients
from fastpref.plans.head import Head as Head
from fastpref.plans.head import Needs as Needs
from fastpref.plans.head import borrowed_logits, logits_buffer, tile_rows
from fastpref.plans.products import ParameterGradients, matmul_into, project, scaled_in_place, unit_product

PLANS = ("no_grad", "frozen", "store", "pair", "recompute")


def fold(
    tile: Tensor, hidden: Tensor, labels: Tensor, head: Head, *, write_u: bool, statistics: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Write the logits of `hidden` `[n, d]` to `tile` `[n, V]`, and return their `logps`, `lse` and statistics `[n]`.

    With `write_u` the tile ends as U.
    """
    backend = backend_for(tile)
    project(hidden, head.weight, head.bias, tile)
    exact = None
    if tile.dtype in HALF:
        exact = backend.target_logits(hidden, head.weight, head.bias, labels)
    return backend.row_logprob(
        tile, labels, transform=head.transform, ignore_index=head.ignore_index, statistics=statistics,
        target_logits=exact, write_u=write_u,
    )  # fmt: skip


class Forward(NamedTuple):
    """What a forward returns: results of all N rows, and what the backward needs of the n scored ones."""

    logps: Tensor  # [N]
    lse: Tensor  # [n]
    kept: Tensor  # what the plan keeps for its backward: U or logits [n, V], U W [N, d], or empty
    rows: Tensor  # the scored rows [n]
    statistics: Tensor  # [k, N], as requested


def forward(
    hidden: Tensor, head: Head, labels: Tensor, plan: str, workspace_bytes: int | None,
    statistics: Sequence[str] = (), *, keep_logits: bool = False, scored_rows: int | None = None,
) -> Forward:  # fmt: skip
    """The log-prob of every row, and what `plan` keeps for its backward.

    With `keep_logits` plan `store` keeps the logits in place of U, as it does for an entropy. `scored_rows`: see
    `compact`.
    """
    total, dtype = hidden.shape[0], wide(hidden.dtype)
    rows = compact(labels, head.ignore_index, scored_rows)
    labels = compact_labels(labels, rows, head.ignore_index, scored_rows)
    n = rows.numel()
    step = tile_rows(head, n, workspace_bytes)
    found: dict[str, list[Tensor]] = {name: [] for name in ("logps", "lse", *statistics)}
    unit_hidden = None
    if plan == "frozen":
        unit_hidden = torch.empty_like(hidden) if n == total else torch.zeros_like(hidden)
    u = logits_buffer(head, n) if plan == "store" else None
    write_u = plan == "frozen" or (plan == "store" and not keep_logits and "entropy" not in statistics)
    with borrowed_logits(0 if u is not None else step, head.vocab, head.weight) as scratch:
        for part in chunks(n, step):
            tile = scratch[: part.stop - part.start] if u is None else u[part]
            h = gather_part(hidden, rows, part)
            folded = fold(tile, h, labels[part], head, write_u=write_u, statistics=statistics)
            for name, parts in found.items():
                parts.append(folded[name].to(dtype))
            if unit_hidden is not None:
                put_rows(unit_hidden, rows, part, unit_product(tile, head.weight))
    logps, lse, *values = (joined(parts, hidden, dtype) for parts in found.values())
    kept = hidden.new_empty(0) if u is None else u
    scattered = torch.stack([scatter(v, rows, total) for v in values]) if values else logps.new_empty(0, total)
    return Forward(scatter(logps, rows, total), lse, kept if unit_hidden is None else unit_hidden, rows, scattered)


def backward_store(
    u: Tensor, hidden: Tensor, head: Head, coefs: Tensor, needs: Needs, parameters: ParameterGradients,
    dtype: torch.dtype | None = None,
) -> Tensor | None:  # fmt: skip
    """The two gradient products from a stored U. Returns dH `[n, d]`; dW and db go to `parameters`.

    All tensors are of the scored rows. dH is rounded once to `dtype`, or left as it was added up if that is None.
    """
    d_hidden = None
    if needs.hidden:
        product = torch.empty_like(hidden, dtype=wide(u.dtype))
        matmul_into(product, u, head.weight, add=False)
        d_hidden = scaled_in_place(product, coefs, dtype or product.dtype)
    parameters.add(u, hidden, coefs)
    parameters.finish()
    return d_hidden


class Upstream(NamedTuple):
    """Gradients that arrive at the scored rows `[n]`."""

    logps: Tensor
    entropy: Tensor | None = None

    def split(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(scale, logps, entropy), each `[n]` or None: both gradients, with a common factor of each row taken out.

        `scale` multiplies something of width d. The other two are mixed into the logits' gradient. They are of size
        about 1, since coefficients of 1e-6 times probabilities would underflow in fp16.
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
    dtype: torch.dtype | None = None, on_hidden: Callable[[Tensor], None] | None = None,
) -> Tensor | None:  # fmt: skip
    """Three products over slices of the vocabulary. Returns dH `[n, d]`; dW and db go to `parameters`.

    All tensors are of the scored rows.

    Args:
        upstream: the gradients that arrive.
        entropy: `[n]`, needed where `upstream` has a gradient of it.
        logits: `[n, V]`, if they were kept. Then two products suffice.
        first_column: the vocabulary index of the head's first row, if `head` is a shard of a larger head. Labels and
            `lse` are always the whole head's.
        dtype: dH is rounded to it, once. None leaves dH as it was added up.
        on_hidden: is given dH when it is complete, before the last of the weight's products. That leaves time to
            reduce it over ranks.
    """
    n = hidden.shape[0]
    width = tile_rows(head, n, workspace_bytes) * head.vocab // max(1, n)
    if width < head.vocab:
        width = min(head.vocab, max(128, width // 128 * 128))  # slices begin on 16-byte boundaries
    d_hidden = torch.empty_like(hidden, dtype=wide(hidden.dtype)) if needs.hidden else None
    scale, grad_logps, grad_entropy = upstream.split()
    backend = backend_for(hidden)
    with borrowed_logits(n, width, hidden) as tile:
        for part in chunks(head.vocab, width):
            weight = head.weight[part]
            u = tile[:, : part.stop - part.start]
            if logits is None:
                project(hidden, weight, None if head.bias is None else head.bias[part], u)
            backend.row_gradient(
                u if logits is None else logits[:, part], labels, logps, lse, u, transform=head.transform,
                ignore_index=head.ignore_index, first_column=first_column + part.start,
                grad_logps=grad_logps, entropy=entropy, grad_entropy=grad_entropy,
            )  # fmt: skip
            if d_hidden is not None:
                matmul_into(d_hidden, u, weight, add=part.start > 0)
                if part.stop == head.vocab:
                    d_hidden = scaled_in_place(d_hidden, scale, dtype or d_hidden.dtype)
                    if on_hidden is not None:
                        on_hidden(d_hidden)
            parameters.add(u, hidden, scale, part)
    parameters.finish()
    return d_hidden
