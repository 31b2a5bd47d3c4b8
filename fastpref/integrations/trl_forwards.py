"""Methods of TRL's trainers that build logits in TRL: the same signatures and results, without logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref import models
from fastpref.objectives.tokens import linear_token_logprobs, linear_token_statistics

IGNORE = -100


def supported(trainer: Any) -> bool:
    """Whether a trainer can use these methods. If not, TRL's own code runs.

    Left to TRL are encoder-decoder models, load-balancing losses, compiled forwards and rarer options of TRL 0.24.
    """
    rare = getattr(getattr(trainer, "args", None), "torch_compile", False)
    rare = rare or any(getattr(trainer, name, False) for name in ("padding_free", "use_weighting"))
    rare = rare or getattr(getattr(trainer, "args", None), "ld_alpha", None) is not None
    return not (rare or any(getattr(trainer, name, False) for name in ("is_encoder_decoder", "aux_loss_enabled")))


def text_only(kwargs: Mapping[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether a method was called with nothing but text."""
    mappings = [x for x in (*args, *kwargs.values()) if isinstance(x, Mapping)]
    return not any("pixel" in key or "image" in key for mapping in mappings for key in mapping)


def token_logps(hidden: Tensor, head: models.Head, labels: Tensor) -> Tensor:
    """The log-probs of `labels`, in their shape."""
    return linear_token_logprobs(hidden, head.weight, labels, head.bias, **head.options())


@torch.no_grad()
def mean_logit(hidden: Tensor, head: models.Head) -> Tensor:
    """The mean logit over all positions of hidden `[..., d]` and over the vocabulary, 0-d.

    Without a soft cap it is the mean hidden state's product with the head's mean row: no product of size V is needed.
    """
    if head.softcap is None:
        row, state = head.weight.mean(0, dtype=torch.float32), hidden.flatten(0, -2).mean(0, dtype=torch.float32)
        offset = 0.0 if head.bias is None else head.bias.mean(dtype=torch.float32)
        return ((row * state).sum() + offset) * head.logit_scale
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
    found = linear_token_statistics(hidden, head.weight, labels, head.bias, ("mean_logit",), **head.options())
    assert found.mean_logit is not None
    return found.mean_logit.mean()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the masked values. 0 if there are none, where TRL divides by zero."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def _reference_free(
    trainer: Any, model: Any, batch: Mapping[str, Any], padding_value: int, *, average: bool, nll: str, logits_end: int
) -> tuple[Tensor, ...]:
    """(chosen_logps, rejected_logps, mean chosen logit, mean rejected logit, NLL of the chosen).

    `nll` is over the chosen responses' "completion", over their "sequence" with the prompt, or "none". TRL only
    averages the logits that its methods return, so the means give the same metrics.
    """
    options = {"label_pad_token_id": IGNORE} if hasattr(trainer, "label_pad_token_id") else {}
    joined = trainer.concatenated_inputs(
        batch, is_encoder_decoder=False, padding_value=padding_value, device=trainer.accelerator.device, **options
    )
    ids, attention = joined["concatenated_input_ids"], joined["concatenated_attention_mask"]
    completion = joined["concatenated_labels"][:, 1:]
    pairs, scored = batch["chosen_labels"].shape[0], completion
    if nll == "sequence":
        everything = ids.masked_fill(attention != 1, IGNORE)[:, 1:]
        scored = torch.cat([everything[:pairs], completion[pairs:]])

    def forward(bare: Any) -> tuple[Tensor, ...]:
        hidden, head = models.hidden_and_head(bare, ids, attention)
        means = [mean_logit(side[:, :logits_end], head) for side in (hidden[:pairs], hidden[pairs:])]
        return token_logps(hidden[:, :-1], head, scored), *means

    logps, chosen_logit, rejected_logit = models.run_inside(model, trainer.accelerator, forward)
    mask = completion != IGNORE
    sums = _mean(logps, mask) if average else (logps * mask).sum(-1)
    nll_mask = scored[:pairs] != IGNORE
    loss = logps.new_zeros(()) if nll == "none" else -_mean(logps[:pairs].flatten(), nll_mask.flatten())
    return sums[:pairs], sums[pairs:], chosen_logit, rejected_logit, loss


def cpo_concatenated_forward(self: Any, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """`CPOTrainer.concatenated_forward` of TRL 0.24 to 1.16 (CPO, SimPO, AlphaPO)."""
    padding = self.pad_token_id if hasattr(self, "pad_token_id") else self.padding_value
    return _reference_free(
        self, model, batch, padding, average=self.loss_type in ("ipo", "simpo"),
        nll="none" if self.cpo_alpha == 0 else "completion", logits_end=batch_width(batch),
    )  # fmt: skip


def orpo_concatenated_forward(self: Any, model: Any, batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """`ORPOTrainer.concatenated_forward` of TRL 0.24 to 1.16."""
    return _reference_free(self, model, batch, self.padding_value, average=True, nll="sequence", logits_end=-1)


def batch_width(batch: Mapping[str, Any]) -> int:
    return max(batch["chosen_labels"].shape[1], batch["rejected_labels"].shape[1])


def online_dpo_forward(
    self: Any, model: Any, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor,
    vision_inputs: Any = None,
) -> Tensor:  # fmt: skip
    """Stands in for `OnlineDPOTrainer._forward` of TRL 0.24 to 1.16.

    Returns log-probs `[S, T]` of all completion tokens, padding included: TRL's metrics sum over it.
    """
    excess = max(prompt_ids.size(1) + completion_ids.size(1) - self.max_length, 0)
    prompt_ids, prompt_mask = prompt_ids[:, excess:], prompt_mask[:, excess:]
    ids, mask = torch.cat((prompt_ids, completion_ids), 1), torch.cat((prompt_mask, completion_mask), 1)
    length = prompt_ids.size(1)

    def forward(bare: Any) -> Tensor:
        hidden, head = models.hidden_and_head(bare, ids, mask)
        return token_logps(hidden[:, length - 1 : -1] if length else hidden, head, completion_ids)

    return models.run_inside(model, self.accelerator, forward)
