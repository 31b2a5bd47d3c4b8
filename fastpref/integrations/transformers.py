"""fastpref in a loop of your own: `transformers.Trainer`, Accelerate, or plain PyTorch.

A batch is what a model takes: `input_ids` and `attention_mask` `[2B, T]`, chosen sequences first. Labels come in one of
two forms:

- `labels`, transformers' convention: aligned with `input_ids`, -100 where nothing is scored;
- `shift_labels`: position t holds the token that it scores.

`ref_logps` `[2B]` and, for unpaired losses, `desirable` `[S]` and `kl` are passed on to the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpref import models
from fastpref.data.collate import TokenizedPair, collate_pairs
from fastpref.models.adapters import Snapshot, adapters_off
from fastpref.objectives.tokens import linear_token_logprobs, sequence_logprobs

LOSS_INPUTS = ("ref_logps", "desirable", "kl")
LABELS = ("labels", "shift_labels")

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin's base at run time


def pair_batch(pairs: Sequence[TokenizedPair], pad_token_id: int) -> dict[str, Tensor]:
    """A padded batch from tokenised pairs (see `fastpref.data.collate.tokenize_pairs`)."""
    ids, mask, labels = collate_pairs(pairs, pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "shift_labels": labels}


def shifted_labels(batch: Mapping[str, Any]) -> Tensor:
    """The token that each position scores, `[S, T]`; -100 where there is none.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"]
    if batch.get("labels") is None:
        raise ValueError("labels: got none in the batch, want `labels` or `shift_labels`")
    return nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without what only the loss takes."""
    return {name: value for name, value in batch.items() if name not in LOSS_INPUTS and name not in LABELS}


def batch_loss(loss_fn: Any, model: nn.Module, batch: Mapping[str, Any], accelerator: Any = None) -> Any:
    """The loss of a batch by `loss_fn.from_hidden`. The model's own head does not run, and there are no logits.

    Args:
        loss_fn: an objective with `from_hidden`, such as `fastpref.DPOLoss()`.
        model: a model, or what DDP, `fully_shard` or DeepSpeed made of it. They gather weights and reduce gradients as
            they do around the model's own forward.
        batch: see the top of this module.
        accelerator: an `accelerate.Accelerator`, if `model` is what its `prepare` returned.

    Returns:
        The objective's results: the loss, rewards, margins, ...

    Raises:
        ValueError: the batch has no labels, or the model's head is not one that fastpref knows.
    """

    def forward(bare: Any) -> Any:
        hidden, head = models.hidden_and_head(bare, **model_inputs(batch))
        given = {name: batch[name] for name in LOSS_INPUTS if batch.get(name) is not None}
        labels = shifted_labels(batch)
        return loss_fn.from_hidden(hidden, head.weight, labels, bias=head.bias, **given, **head.options())

    return models.run_inside(model, accelerator, forward)


@torch.no_grad()
def reference_logps(model: Any, batch: Mapping[str, Any], accelerator: Any = None, *, adapters: bool = False) -> Tensor:
    """Each sequence's log-prob `[S]` by a reference model.

    A model with adapters runs with them off. `adapters=True` leaves them on: for a reference model that has adapters of
    its own.

    Raises:
        ValueError: the batch has no labels, or the model's head is not one that fastpref knows.
    """

    def forward(bare: Any) -> Tensor:
        with adapters_off(bare) if models.is_peft(bare) and not adapters else contextlib.nullcontext():
            hidden, head = models.hidden_and_head(bare, **model_inputs(batch))
            labels = shifted_labels(batch)
            logps = linear_token_logprobs(hidden, head.weight, labels, head.bias, **head.options())
        return sequence_logprobs(logps, labels)

    return models.run_inside(model, accelerator, forward)


class PreferenceLossMixin(Trainer):
    """`class MyTrainer(PreferenceLossMixin, Trainer)`: `transformers.Trainer` with one of fastpref's losses.

    The loss is a mean over the batch's examples. Under gradient accumulation the Trainer averages over batches.
    `compute_loss(..., return_outputs=True)` also gives the loss's other results (margins, accuracies, ...).

    Args:
        loss_fn: an objective with `from_hidden`, such as `fastpref.DPOLoss()`.
        ref_model: what gives `ref_logps` to batches that have none. A model, or `"adapters"`: the trained model with
            its adapters off, and with what trains beside them as it was. None for losses without a reference, and for
            batches that bring their own.

    Raises:
        ValueError: `torch_compile` is on, `"adapters"` was given for a model that has none, or a model's head is not
            one that fastpref knows.
        TypeError: `ref_model` is something else.
    """

    loss_is_scaled_for_ga = False  # read by transformers >= 5.19; older ones read model_accepts_loss_kwargs

    def __init__(self, *args: Any, loss_fn: nn.Module, ref_model: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_fn, self.ref_model = loss_fn, ref_model
        self.model_accepts_loss_kwargs = False
        if self.args.torch_compile:
            raise ValueError("torch_compile: got True, want False: what is compiled is the forward that builds logits")
        models.output_head(self.model)
        if ref_model is not None and ref_model is self.model:
            raise ValueError("ref_model: got the model that is trained, want another one, or 'adapters'")
        if isinstance(ref_model, nn.Module):
            models.output_head(ref_model)
            self.ref_model = self.accelerator.prepare_model(ref_model.eval(), evaluation_mode=True)
        elif ref_model == "adapters":
            if not models.is_peft(self.model):
                raise ValueError(f"ref_model: got 'adapters' with {type(self.model).__name__}, want a PeftModel")
            self.ref_model, self._beside = None, Snapshot(self.model, outside=True)
        elif ref_model is not None:
            raise TypeError(f"ref_model: got {ref_model!r}, want a model, 'adapters' or None")
        self._adapters_are_reference = ref_model == "adapters"

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = getattr(self, "_signature_columns", None) or []
        setattr(self, "_signature_columns", list(dict.fromkeys([*columns, *LOSS_INPUTS, *LABELS])))  # noqa: B010

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if inputs.get("ref_logps") is None:
            inputs = {**inputs, "ref_logps": self._reference_logps(model, inputs)}
        out = batch_loss(self.loss_fn, model, inputs, self.accelerator)
        return (out.loss, out._asdict()) if return_outputs else out.loss

    def _reference_logps(self, model: Any, inputs: Any) -> Tensor | None:
        if self._adapters_are_reference:
            with self._beside.restored():
                return reference_logps(model, inputs, self.accelerator)
        if self.ref_model is None:
            return None
        return reference_logps(self.ref_model, inputs, self.accelerator, adapters=True)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(loss, margins `[B]`, accuracies `[B]`)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, outputs.get("margins"), outputs.get("accuracies")
