"""Losses on single responses, each labelled desirable or undesirable: KTO, APO-zero-unpaired, BCO.

Each formula takes log-ratios log(pi / pi_ref) `[S]`, `desirable` `[S]` (bool) and what rewards are compared with (0-d).
It returns the loss of each sequence `[S]`. Numbers such as 2402.01306 are arXiv papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class UnpairedObjective(NamedTuple):
    """The settings of an unpaired loss, all but its tensors. `loss` is a name in `UNPAIRED_LOSSES`."""

    loss: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    mean: str = "batch"  # over all sequences, or "class": the sum of the two classes' means


UNPAIRED_MEANS = ("batch", "class")


def _towards(desirable: Tensor, x: Tensor) -> Tensor:
    """x of a desirable sequence, -x of an undesirable one: what every loss here wants to be large."""
    return torch.where(desirable, x, -x)


def kto(log_ratios: Tensor, desirable: Tensor, z0: Tensor, beta: float) -> Tensor:
    """KTO, 1 - sigmoid(+-beta (log-ratio - z0)): Ethayarajh et al. 2024."""
    y = _towards(desirable, beta * (log_ratios - z0))
    return torch.sigmoid(-y)  # 1 - sigmoid(y) without cancellation: eq. 8 of 2402.01306, with v(x, y) as in eq. 7


def apo_zero_unpaired(log_ratios: Tensor, desirable: Tensor, _: Tensor, beta: float) -> Tensor:
    """APO-zero on single responses, 1 - sigmoid(+-beta log-ratio): D'Oosterlinck et al. 2024."""
    return torch.sigmoid(-_towards(desirable, beta * log_ratios))  # the two terms of eq. 7 of 2408.06266, as in TRL


def bco(log_ratios: Tensor, desirable: Tensor, delta: Tensor, beta: float) -> Tensor:
    """BCO, -log sigmoid(+-(beta log-ratio - delta)): Jung et al. 2024."""
    return -F.logsigmoid(_towards(desirable, beta * log_ratios - delta))  # 2404.04656, with its reward shift delta


UNPAIRED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    f.__name__: f for f in (kto, apo_zero_unpaired, bco)
}


def unpaired_loss(
    sums: Tensor,
    ref_sums: Tensor,
    desirable: Tensor,
    shift: Tensor | None,
    objective: UnpairedObjective,
    *,
    batch_desirable: Tensor | None = None,
) -> Tensor:
    """The batch's loss, 0-d, from summed log-probs `[S]`. `shift` is KTO's z0 or BCO's delta, a 0-d constant.

    A group of sequences out of a larger batch passes the whole batch's labels as `batch_desirable`. Group losses then
    add up to the batch's. A class without sequences contributes 0.
    """
    o, batch = objective, desirable if batch_desirable is None else batch_desirable
    shift = sums.new_zeros(()) if shift is None else shift.detach()
    losses = UNPAIRED_LOSSES[o.loss](sums - ref_sums, desirable, shift, o.beta)
    losses = torch.where(desirable, o.desirable_weight * losses, o.undesirable_weight * losses)
    if o.mean == "batch":
        return losses.sum() / len(batch)
    chosen = batch.sum()
    return (losses / torch.where(desirable, chosen, len(batch) - chosen)).sum()  # E over each class: 2402.01306 eq. 8


def unpaired_metrics(sums: Tensor, ref_sums: Tensor, objective: UnpairedObjective) -> Tensor:
    """`[2, S]`: log-probs and rewards beta * log-ratio."""
    return torch.stack([sums, objective.beta * (sums - ref_sums)])


def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's z0, 0-d and without a gradient, from the summed log-probs `[S]` of mismatched completions.

    Source: arXiv 2402.01306, section 4.1.
    """
    return (logps - ref_logps).mean().clamp(min=0).detach()
