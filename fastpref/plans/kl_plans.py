"""The execution plans of the exact divergence of two heads: those of `fastpref.plans.plans`, with two tiles of logits.

K `[n, V]` is d divergence / d head output, never scaled. g `[n]` is the upstream gradient of each row. Then

    dH = g * (K W)          dW = K^T (g * H)          db = K^T g

K is written over the policy's logits. The reference has no gradient, so its logits never outlive their tile. The
number of products is for each scored row.

    no_grad    2 products   two tiles
    frozen     3            two tiles, and K W [N, d] kept for the backward
    store      4            one tile, and K [n, V] kept in the compute dtype
    recompute  6            two tiles; the backward runs over slices of the vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common.precision import HALF, wide
from fastpref.plans.compact import chunks, compact, compact_labels, gather_part, joined, put_rows, scatter
from fastpref.plans.head import Head, Needs, borrowed_logits, logits_buffer, tile_rows
from fastpref.plans.products import ParameterGradients, matmul_into, project, scaled_in_place, unit_product


class Forward(NamedTuple):
    """What a forward returns: results of all N rows, and what the backward needs of the n scored ones."""

    kl: Tensor  # [N]
    logps: Tensor | None  # [N], with labels
    ref_logps: Tensor | None
    lse: Tensor  # [n]
    ref_lse: Tensor
    policy_kl: Tensor  # what K subtracts [n]: KL(policy || mixture) of a jsd, else the KL
    kept: Tensor  # K [n, V], K W [N, d], or empty
    rows: Tensor  # the scored rows [n]


def pair_tile_rows(head: Head, rows: int, workspace_bytes: int | None) -> int:
    """Rows of each of two tiles in the memory of one."""
    return max(1, tile_rows(head, 2 * rows, workspace_bytes) // 2)


def _exact(hidden: Tensor, head: Head, labels: Tensor | None) -> Tensor | None:
    """The labels' logits in fp32 `[n]`, if the tile is in half precision; else None."""
    if labels is None or hidden.dtype not in HALF:
        return None
    return backend_for(hidden).target_logits(hidden, head.weight, head.bias, labels)


def forward(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, labels: Tensor | None,
    direction: str, plan: str, workspace_bytes: int | None, scored_rows: int | None = None, beta: float = 0.5,
) -> Forward:  # fmt: skip
    """The divergence of every scored row, and with labels their log-probs under both models.

    Without labels all rows count. `scored_rows`: see `compact`.
    """
    total, backend = hidden.shape[0], backend_for(hidden)
    if labels is None:
        rows = torch.arange(total, device=hidden.device)
    else:
        rows = compact(labels, head.ignore_index, scored_rows)
        labels = compact_labels(labels, rows, head.ignore_index, scored_rows)
    n = rows.numel()
    names = ("kl", "lse", "ref_lse") + (() if labels is None else ("logps", "ref_logps"))
    names += ("policy_kl",) if direction == "jsd" else ()
    dtype = wide(torch.promote_types(hidden.dtype, ref_hidden.dtype))
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    unit_hidden = None
    if plan == "frozen":
        unit_hidden = torch.empty_like(hidden) if n == total else torch.zeros_like(hidden)
    k = logits_buffer(head, n) if plan == "store" else None
    step = pair_tile_rows(head, n, workspace_bytes)
    with (
        borrowed_logits(0 if k is not None else step, head.vocab, head.weight) as scratch,
        borrowed_logits(step, head.vocab, ref_head.weight) as ref_scratch,
    ):
        for part in chunks(n, step):
            size = part.stop - part.start
            tile = scratch[:size] if k is None else k[part]
            ref_tile = ref_scratch[:size]
            h, ref_h = gather_part(hidden, rows, part), gather_part(ref_hidden, rows, part)
            y = None if labels is None else labels[part]
            project(h, head.weight, head.bias, tile)
            project(ref_h, ref_head.weight, ref_head.bias, ref_tile)
            found = backend.token_kl(
                tile, ref_tile, direction=direction, beta=beta, transform=head.transform, labels=y,
                target_logits=_exact(h, head, y), ref_target_logits=_exact(ref_h, ref_head, y),
                write_k=plan in ("frozen", "store"),
            )  # fmt: skip
            for name, values in parts.items():
                values.append(found[name])
            if unit_hidden is not None:
                put_rows(unit_hidden, rows, part, unit_product(tile, head.weight))
    kept = k if unit_hidden is None else unit_hidden
    results = {name: joined(values, hidden, dtype) for name, values in parts.items()}
    policy_kl = results.get("policy_kl", results["kl"])
    if labels is not None and scored_rows is not None:
        results |= _of_scored_rows(results, labels, head)
    scattered = {name: scatter(results[name], rows, total) for name in names if name in ("kl", "logps", "ref_logps")}
    return Forward(
        scattered["kl"], scattered.get("logps"), scattered.get("ref_logps"), results["lse"], results["ref_lse"],
        policy_kl, hidden.new_empty(0) if kept is None else kept, rows,
    )  # fmt: skip


def _of_scored_rows(results: dict[str, Tensor], labels: Tensor, head: Head) -> dict[str, Tensor]:
    """Results where `scored_rows` was given: 0 for the ignored rows that it let in, NaN for all if it was too low."""
    ignored, unknown = labels == head.ignore_index, results["logps"].isnan()
    kl = results["kl"].masked_fill(unknown, float("nan")).masked_fill(ignored, 0)
    return {"kl": kl} | {name: results[name].masked_fill(ignored, 0) for name in ("logps", "ref_logps")}


def backward_recompute(
    hidden: Tensor, head: Head, ref_hidden: Tensor, ref_head: Head, kl: Tensor, lse: Tensor,
    ref_lse: Tensor, coefs: Tensor, direction: str, needs: Needs, parameters: ParameterGradients,
    workspace_bytes: int | None, *, beta: float = 0.5, dtype: torch.dtype | None = None,
    on_hidden: Callable[[Tensor], None] | None = None,
) -> Tensor | None:  # fmt: skip
    """Four products over slices of the vocabulary. Returns dH `[n, d]`; dW and db go to `parameters`.

    All tensors are of the scored rows; `kl` is `Forward.policy_kl`. `dtype` and `on_hidden` are as in
    `plans.backward_recompute`.
    """
    n = hidden.shape[0]
    width = pair_tile_rows(head, n, workspace_bytes) * head.vocab // max(1, n)
    width = min(head.vocab, max(128, width // 128 * 128))  # slices begin on 16-byte boundaries
    d_hidden = torch.empty_like(hidden, dtype=wide(hidden.dtype)) if needs.hidden else None
    backend = backend_for(hidden)
    with (
        borrowed_logits(n, width, head.weight) as tile,
        borrowed_logits(n, width, ref_head.weight) as ref_tile,
    ):
        for part in chunks(head.vocab, width):
            size, weight = part.stop - part.start, head.weight[part]
            k, ref = tile[:, :size], ref_tile[:, :size]
            project(hidden, weight, None if head.bias is None else head.bias[part], k)
            ref_bias = None if ref_head.bias is None else ref_head.bias[part]
            project(ref_hidden, ref_head.weight[part], ref_bias, ref)
            backend.token_kl_gradient(
                k, ref, kl, lse, ref_lse, k, direction=direction, beta=beta, transform=head.transform
            )
            if d_hidden is not None:
                matmul_into(d_hidden, k, weight, add=part.start > 0)
                if part.stop == head.vocab:
                    d_hidden = scaled_in_place(d_hidden, coefs, dtype or d_hidden.dtype)
                    if on_hidden is not None:
                        on_hidden(d_hidden)
            parameters.add(k, hidden, coefs, part)
    parameters.finish()
    return d_hidden
