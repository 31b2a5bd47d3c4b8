"""Losses from hidden states whose gradients are formed in the forward: plan `pair`, and losses token by token.

A whole loss knows its own coefficients d loss / d log-prob while the logits still exist. So the gradients' products can
run at once, and the logits need not be kept or computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import memory
from fastpref.common.precision import wide
from fastpref.plans import plans
from fastpref.plans.compact import chunks, compact, compact_labels, gather_part, joined, put_rows
from fastpref.plans.head import Gradients, Head, Needs, borrowed_logits, tile_rows
from fastpref.plans.products import ParameterGradients
from fastpref.plans.units import UnitRows, unit_rows


class _HiddenGradients:
    """dH `[N, d]`, put together from the scored rows of groups of units. Other rows are zeros."""

    def __init__(self, units: UnitRows, hidden: Tensor, dtype: torch.dtype) -> None:
        self.units, self.like, self.dtype = units, hidden, dtype
        self.every = units.rows.numel() == hidden.shape[0]
        self.total: Tensor | None = None

    def put(self, first: int, last: int, part: Tensor) -> None:
        if self.every and last - first == self.units.number:
            self.total = part
            return
        if self.total is None:
            self.total = (torch.empty_like if self.every else torch.zeros_like)(self.like, dtype=self.dtype)
        if not self.every:
            self.total.index_copy_(0, self.units.of(self.units.rows, first, last), part)
            return
        places = self.units.places(first, last)
        for place, rows in zip(places, part.split([p.stop - p.start for p in places]), strict=True):
            self.total[place] = rows


def forward_units(
    hidden: Tensor, head: Head, labels: Tensor, cu_seqlens: Tensor | None, sequences: int, sides: int, needs: Needs,
    workspace_bytes: int | None, separable: bool, group_loss: Callable, statistics: Sequence[str] = (),
    edges: Sequence[int] | None = None, bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
    """(loss, metrics `[k, units]`, gradients), one group of whole units (pairs or sequences) at a time.

    `group_loss(logps, cu_seqlens, rows, first, last, **statistics)` returns (loss, metrics, coefs) of the units
    first..last-1. `logps` are their token log-probs, and `rows` where those lie in the flattened batch.

    A group that outgrows the workspace is recomputed slice by slice instead of kept. That may be one huge unit, or a
    loss that couples the whole batch (`separable` false), for which there is one group. `edges` and `bounds`: see
    `unit_rows`.
    """
    dtype = wide(hidden.dtype)
    units = unit_rows(labels, cu_seqlens, sequences, sides, head.ignore_index, edges, bounds)
    labels = compact_labels(labels, units.rows, head.ignore_index, units.edges[-1])
    limits = memory.workspace(hidden.device, workspace_bytes)
    rows_wanted, max_rows = (size // (head.vocab * hidden.element_size()) for size in limits)
    groups = list(units.groups(rows_wanted)) if separable else [(0, units.number)]
    kept_rows = max((size for g in groups if (size := units.size(*g)) <= max_rows), default=0)
    every = units.rows.numel() == hidden.shape[0]
    d_hidden = _HiddenGradients(units, hidden, dtype)
    parameters = ParameterGradients(head, needs, dtype)
    losses, metrics = [], []
    with borrowed_logits(kept_rows, head.vocab, head.weight) as scratch:
        for first, last in groups:
            size, y = units.size(first, last), units.of(labels, first, last)
            rows, edges_here = units.of(units.rows, first, last), units.cu_seqlens(first, last)
            h = units.of(hidden, first, last) if every else hidden.index_select(0, rows)
            if size <= max_rows:
                u = scratch[:size]
                folded = plans.fold(u, h, y, head, write_u=True, statistics=statistics)
                extra = {name: folded[name] for name in statistics}
                loss, metric, coefs = group_loss(folded["logps"], edges_here, rows, first, last, **extra)
                part = plans.backward_store(u, h, head, coefs, needs, parameters)
            else:
                done = plans.forward(h, head, y, "no_grad", workspace_bytes, statistics, scored_rows=size)
                extra = dict(zip(statistics, done.statistics, strict=True))
                loss, metric, coefs = group_loss(done.logps, edges_here, rows, first, last, **extra)
                part = plans.backward_recompute(
                    h, head, y, done.logps, done.lse, plans.Upstream(coefs), needs, parameters, workspace_bytes
                )
            losses.append(loss)
            metrics.append(metric)
            if part is not None:
                d_hidden.put(first, last, part)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return loss, joined(metrics, hidden, dtype, 1), Gradients(d_hidden.total, parameters.weight, parameters.bias)


def forward_tokens(
    hidden: Tensor, head: Head, labels: Tensor, needs: Needs, workspace_bytes: int | None, num_metrics: int,
    token_loss: Callable, scored_rows: int | None = None,
) -> tuple[Tensor, Tensor, Gradients]:  # fmt: skip
    """(loss, metrics `[num_metrics, N]`, gradients), tile by tile, for a loss that is a sum over tokens.

    `token_loss(rows, logps, entropy)` returns (losses `[n]`, metrics, d loss / d logp, d loss / d entropy or None)
    of a tile's rows. The coefficients are known while the tile's logits still exist. So they are mixed into one
    gradient in place. That takes 3 products (2 with a frozen head) and one tile of memory, an entropy bonus included.
    """
    rows = compact(labels, head.ignore_index, scored_rows)
    labels = compact_labels(labels, rows, head.ignore_index, scored_rows)
    n, backend = rows.numel(), backend_for(hidden)
    dtype = wide(hidden.dtype)
    metrics = hidden.new_zeros(num_metrics, hidden.shape[0], dtype=dtype)
    d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs.hidden else None
    parameters = ParameterGradients(head, needs, dtype)
    losses = [hidden.new_zeros((), dtype=dtype)]
    step = tile_rows(head, n, workspace_bytes)
    with borrowed_logits(step, head.vocab, head.weight) as scratch:
        for part in list(chunks(n, step)) or [slice(0, 0)]:  # without rows, zero gradients all the same
            tile = scratch[: part.stop - part.start]
            h, y = gather_part(hidden, rows, part), labels[part]
            folded = plans.fold(tile, h, y, head, write_u=False, statistics=("entropy",))
            logps, entropy = folded["logps"], folded["entropy"]
            found = token_loss(rows[part], logps, entropy)
            if scored_rows is not None:  # an upper bound lets in ignored rows, of which the loss may know anything
                found = [None if x is None else x.masked_fill(y == head.ignore_index, 0) for x in found]
            loss, metric, coefs, coefs_entropy = found
            losses.append(loss.sum())
            metrics.index_copy_(1, rows[part], metric)
            if not any(needs):
                continue
            scale, grad_logps, grad_entropy = plans.Upstream(coefs, coefs_entropy).split()
            backend.row_gradient(
                tile, y, logps, folded["lse"], tile, transform=head.transform, ignore_index=head.ignore_index,
                grad_logps=grad_logps, entropy=entropy, grad_entropy=grad_entropy,
            )  # fmt: skip
            d_rows = plans.backward_store(tile, h, head, scale, needs, parameters)
            if d_hidden is not None and d_rows is not None:
                put_rows(d_hidden, rows, part, d_rows)
    return torch.stack(losses).sum(), metrics, Gradients(d_hidden, parameters.weight, parameters.bias)
