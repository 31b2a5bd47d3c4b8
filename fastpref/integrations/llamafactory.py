"""LLaMA-Factory's preference stage (DPO, IPO, KTO-pair, ORPO, SimPO, ...) without logits.

    from fastpref.integrations import llamafactory

    llamafactory.patch()  # before llamafactory.train.tuner.run_exp(...)

Nothing else of a LLaMA-Factory script or configuration changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastpref import models
from fastpref.integrations.trl_forwards import IGNORE, mean_logit, token_logps

AVERAGED = ("ipo", "orpo", "simpo")


def concatenated_forward(
    self: Any, model: Any, batch: Mapping[str, Tensor], is_ref_model: bool = False
) -> dict[str, Tensor]:
    """Stands in for `CustomDPOTrainer.concatenated_forward` of LLaMA-Factory 0.9.

    Returns:
        `chosen_logps`, `rejected_logps` and `chosen_logps_avg`, each `[B]`; and `chosen_logits` and `rejected_logits`,
            which are 0-d means here: LLaMA-Factory only logs their means.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    pairs = labels.shape[0] // 2

    def forward(bare: Any) -> tuple[Tensor, ...]:
        hidden, head = models.hidden_and_head(bare, **inputs)
        means = [mean_logit(side, head) for side in (hidden[:pairs], hidden[pairs:])]
        return token_logps(hidden[:, :-1], head, labels), *means

    logps, chosen_logit, rejected_logit = models.run_inside(model, self.accelerator, forward)
    mask = labels != IGNORE
    lengths = mask.sum(1)
    ld_alpha = None if is_ref_model else getattr(self, "ld_alpha", None)
    if ld_alpha:  # LD-DPO: what goes beyond the shorter response counts less
        shorter = lengths.view(2, pairs).amin(0).repeat(2)
        logps = logps.where(mask.cumsum(1) <= shorter[:, None], ld_alpha * logps)
    sums = logps.sum(1)
    averages = sums / lengths.clamp(min=1)
    chosen, rejected = (averages if self.loss_type in AVERAGED else sums).split(pairs)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logit,
        "rejected_logits": rejected_logit,
        "chosen_logps_avg": averages[:pairs],
    }


def patch() -> None:
    """Give LLaMA-Factory's `CustomDPOTrainer` this `concatenated_forward`.

    Raises:
        ImportError: LLaMA-Factory is not installed.
    """
    try:
        from llamafactory.train.dpo.trainer import CustomDPOTrainer
    except ImportError as error:
        raise ImportError(
            "fastpref.integrations.llamafactory: LLaMA-Factory is not installed; run `pip install llamafactory`"
        ) from error
    CustomDPOTrainer.concatenated_forward = concatenated_forward
