"""What the tests of losses on lists share: groups, ranks with ties, and the losses as a naive loop over pairs."""

from __future__ import annotations

import itertools
import math

import torch
from support import DEVICE, paired_batch
from torch import Tensor

from fastpref import ListDPOLoss

# six sequences, as paired_batch makes: a prompt with three responses, one alone, and a tied pair between them
SIZES = [3, 1, 2]
GROUP = torch.tensor([5, 5, 5, -2, 8, 8], device=DEVICE)
RANKS = torch.tensor([1, 0, 1, 3, 2, 2], device=DEVICE)
LOSSES = {
    "plackett_luce": ListDPOLoss(0.3),
    "all_pairs": ListDPOLoss(0.3, "all_pairs"),
    "rao_kupper": ListDPOLoss(0.3, "rao_kupper", 2.5),
    "davidson": ListDPOLoss(0.3, "davidson", 0.7),
}
VOCAB, WIDTH = 19, 8  # of paired_batch


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def naive_loss(kind: str, scores: list[float], ranks: list, group: list, nu: float) -> float:
    """The mean over prompts, one prompt, one pair and one term at a time."""
    losses = []
    for prompt in dict.fromkeys(group):
        own = [(s, r) for s, r, g in zip(scores, ranks, group, strict=True) if g == prompt]
        if len(own) < 2 or (kind in ("plackett_luce", "all_pairs") and len({r for _, r in own}) < 2):
            continue
        losses.append(_plackett_luce(own) if kind == "plackett_luce" else _pairs(kind, own, nu))
    return sum(losses) / max(1, len(losses))


def _plackett_luce(own) -> float:
    return sum(
        math.log(math.exp(s) + sum(math.exp(t) for t, other in own if other > rank)) - s for s, rank in own
    )  # fmt: skip


def _pairs(kind: str, own, nu: float) -> float:
    total = 0.0
    for (s, rank), (t, other) in itertools.combinations(own, 2):
        d = s - t if rank <= other else t - s
        if kind == "all_pairs":
            total -= log_sigmoid(d) if rank != other else 0.0
        elif kind == "rao_kupper":
            win, loss = 1 / (1 + nu * math.exp(-d)), 1 / (1 + nu * math.exp(d))
            total -= math.log(1 - win - loss if rank == other else win)
        else:
            a, b = math.exp(d), 1.0
            z = a + b + 2 * nu * math.sqrt(a * b)
            total -= math.log((2 * nu * math.sqrt(a * b) if rank == other else a) / z)
    return total / math.comb(len(own), 2)


def list_batch(**options):
    """Padded or packed batch of six sequences, one of them empty, as `paired_batch` makes it."""
    return paired_batch((3, 5, 2, 4, 0, 5), **options)


def call(loss_fn: ListDPOLoss, batch, ranks: Tensor = RANKS, group: Tensor | None = GROUP, **options):
    return loss_fn.from_hidden(
        batch.hidden, batch.weight, batch.labels, ranks, batch.bias, batch.ref_logps, group, batch.cu_seqlens, **options
    )
