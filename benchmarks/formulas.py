"""Work and memory by formula: what a rate is a share of, and what a memory peak should be."""

from __future__ import annotations

import torch

from fastpref.common import memory
from fastpref.plans import plans
from fastpref.plans.head import row_stride, tile_rows
from fastpref.reference import LogitTransform

WIDE = 4  # bytes of an fp32


def head_bytes(rows: int, scored: int, d: int, vocab: int, element: int, trainable: bool) -> int:
    """Hidden states and head are read once; their gradients are written once."""
    return (scored * d + vocab * d + rows * d + (vocab * d if trainable else 0)) * element


def eager_peak(rows: int, d: int, vocab: int, element: int, trainable: bool) -> int:
    """The peak of `log_softmax` and gather in fp32: the larger of two moments.

    In one there are the log-probs that autograd keeps, the gather's gradient of the same size, and the logits' gradient
    in its own dtype. In the other, later, there is the logits' gradient with the gradients that come of it.
    """
    gradients = (rows * d + (vocab * d if trainable else 0)) * element
    return max(rows * vocab * (2 * WIDE + element), rows * vocab * element + gradients)


def plan_peak(
    plan: str, weight: torch.Tensor, rows: int, scored: int, trainable: bool, workspace_bytes: int | None = None
) -> int:
    """The peak of a plan of `fastpref.plans.plans`, gradients included: the larger of the forward's and the backward's.

    U is `[n, V]` in the compute dtype; in `pair` it has as many rows as the workspace takes. Gradients that are formed
    before their scale is known are fp32.
    """
    (vocab, d), element = weight.shape, weight.element_size()
    head = plans.Head(weight, None, LogitTransform(), -100)
    row = row_stride(head.vocab, head.weight) * element
    tile = tile_rows(head, scored, workspace_bytes) * row
    numbers = rows * d + (vocab * d if trainable else 0)
    gradients, wide_gradients = numbers * element, numbers * WIDE
    limit = memory.workspace(weight.device, workspace_bytes).preferred
    if plan == "no_grad":
        return tile
    if plan == "frozen":  # U W `[N, d]` is kept for the backward, which scales it
        return max(tile + rows * d * element, rows * d * element + gradients)
    if plan == "pair":
        scaled = 0 if element == WIDE and weight.device.type == "cpu" else gradients  # by 1, there in place
        u = min(scored, max(1, limit // row)) * row
        return max(u + wide_gradients, wide_gradients + scaled)
    u = scored * row if plan == "store" else tile
    return u + scored * d * (WIDE + element) + gradients
