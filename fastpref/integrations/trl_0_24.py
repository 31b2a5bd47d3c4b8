"""`DPOTrainer.concatenated_forward` of older TRL (until 0.28; tried with 0.24), without logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref import models
from fastpref.integrations.trl_forwards import IGNORE
from fastpref.objectives.tokens import linear_token_statistics


def _flush(first: Tensor, *values: Tensor) -> list[Tensor]:
    """Each of `values` `[S, T]` with the columns where `first` holds moved to the front, row by row, in their order."""
    order = first.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return [value.gather(1, order) for value in values]


def truncated(
    ids: Tensor, attention: Tensor, scored: Tensor, max_length: int | None, mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences without padding in front or inside, cut at `max_length` tokens."""
    if max_length is not None and max_length < ids.shape[1] and mode == "keep_end":
        padding_first = _flush(attention == 0, ids, attention, scored)
        ids, attention, scored = (value[:, -max_length:] for value in padding_first)
    ids, attention, scored = _flush(attention != 0, ids, attention, scored)
    longest = int(attention.sum(1).max())
    end = longest if max_length is None else min(longest, max_length)
    return ids[:, :end], attention[:, :end], scored[:, :end]


def concatenated_forward(
    self: Any, model: Any, batch: Mapping[str, Any], is_ref_model: bool = False
) -> dict[str, Tensor]:
    """Stands in for the method of TRL's `DPOTrainer`. Only positions that score a completion's token reach the head.

    Returns:
        `chosen_logps`, `rejected_logps` `[B]`, `mean_chosen_logits`, `mean_rejected_logits`, and `nll_loss` for SFT
            terms.
    """
    pairs = batch["prompt_input_ids"].shape[0]
    joined = self.concatenated_inputs(batch, padding_value=self.pad_token_id)
    prompt, completion = joined["prompt_attention_mask"], joined["completion_attention_mask"]
    ids, attention, scored = truncated(
        torch.cat([joined["prompt_input_ids"], joined["completion_input_ids"]], 1),
        torch.cat([prompt, completion], 1), torch.cat([torch.zeros_like(prompt), completion], 1),
        self.max_length, self.truncation_mode,
    )  # fmt: skip
    mask = scored[:, 1:].bool()
    labels = ids[:, 1:].masked_fill(~mask, IGNORE)

    def forward(bare: Any) -> tuple[Tensor, Tensor]:
        hidden, head = models.hidden_and_head(bare, ids, attention)
        found = linear_token_statistics(
            hidden[:, :-1], head.weight, labels, head.bias, ("mean_logit",), **head.options()
        )
        assert found.mean_logit is not None
        return found.logps, found.mean_logit

    logps, logits = models.run_inside(model, self.accelerator, forward)
    sums = logps.sum(1)
    if "ipo" in self.loss_type:
        sums = sums / mask.sum(1)
    output = {"chosen_logps": sums[:pairs], "rejected_logps": sums[pairs:]}
    if self.args.rpo_alpha is not None or "sft" in self.loss_type:
        counted = mask[:pairs] & (labels[:pairs] != 0)  # TRL ignores the token 0 here
        output["nll_loss"] = -(logps[:pairs] * counted).sum() / counted.sum()
    for name, side in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        output[f"mean_{name}_logits"] = logits[side].sum() / mask[side].sum()
    return output
