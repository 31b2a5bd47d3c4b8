"""The KTO trainer: single responses labelled desirable or undesirable."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.data import formats, tokenize
from fastpref.data.collators import UnpairedCollator
from fastpref.objectives.tokens import sequence_logprobs
from fastpref.objectives.unpaired import KTOLoss, UnpairedOutput
from fastpref.trainers.base import Items
from fastpref.trainers.config import KTOConfig
from fastpref.trainers.loading import given_args
from fastpref.trainers.policy import ReferencedTrainer


class KTOTrainer(ReferencedTrainer):
    """KTO and APO-zero on single responses, with the arguments of TRL 1.16's `KTOTrainer`.

    Each record has a `label`: whether its response is desirable. Pairs are split into two records each. Arguments and
    errors are otherwise as in `DPOTrainer`, with a `KTOConfig`.

    KTO compares rewards with z0, an estimate of the KL divergence to the reference. As in TRL it is made of mismatched
    completions: they are rotated by one within consecutive blocks of `per_device_train_batch_size` examples. So with
    `loss_type="kto"` sampling must be sequential, and a batch needs at least two examples.
    """

    config_class = KTOConfig
    reads_images = True
    signature_columns = (
        "prompt_ids", "completion_ids", "completion_mask", "label", "kl_completion_ids", "kl_completion_mask",
        "ref_logps", "ref_KL_logps",
    )  # fmt: skip

    def __init__(
        self, model: Any, ref_model: Any = None, args: KTOConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        args = given_args(args, KTOConfig, model, "KTO")
        self.loss_fn = KTOLoss(args.beta, args.desirable_weight, args.undesirable_weight, args.loss_type)
        self.with_kl = args.loss_type == "kto"
        if self.with_kl and args.train_sampling_strategy != "sequential":
            raise ValueError(f"train_sampling_strategy: got {args.train_sampling_strategy!r}, want 'sequential'")
        if self.with_kl and args.per_device_train_batch_size < 2:
            raise ValueError("per_device_train_batch_size: got 1, want at least 2: KTO mismatches within a batch")
        ids = ("prompt_ids", "completion_ids", "completion_mask")
        self.hashed_columns = (*ids, "kl_completion_ids", "kl_completion_mask") if self.with_kl else ids
        self.reference_columns = ("ref_logps", "ref_KL_logps") if self.with_kl else ("ref_logps",)
        super().__init__(
            model, ref_model, args, UnpairedCollator(), train_dataset, eval_dataset, processing_class,
            data_collator=data_collator, **options,
        )  # fmt: skip

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        if name == "train" and {"chosen", "rejected"} <= set(formats.column_names(dataset)):
            warnings.warn(
                "train_dataset: got pairs, of which each 1,000 become 1,000 chosen responses and then as many rejected "
                "ones, as in TRL: most batches have one class. For both in every batch, give "
                "fastpref.data.formats.unpaired(dataset).shuffle()",
                stacklevel=4,
            )
        found = self._tokenized(dataset, name, args)
        if name == "train" and hasattr(found, "select"):
            _advise_weights(found["label"], args.desirable_weight, args.undesirable_weight)
        return found

    def _tokenized(self, dataset: Any, name: str, args: Any) -> Any:
        singles = self.pictured(formats.unpaired(dataset), ("completion",), args, name)
        block_size = args.per_device_train_batch_size if self.with_kl else None
        return tokenize.tokenize_unpaired(
            singles, self.tokenizer_in_use, block_size=block_size, **args.tokenizing(name)
        )

    def reference_part(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.data_collator.reference_part(examples) if self.with_kl else super().reference_part(examples)

    def reference_logps(self, model: Any, part: Mapping[str, Any]) -> Tensor:
        return sequence_logprobs(self.token_logps(model, part), part["labels"], cu_seqlens=part["cu_seqlens"])

    @torch.no_grad()
    def before_parts(self, model: Any, inputs: dict[str, Any]) -> None:
        """Computes z0 of the whole batch, for all of its parts."""
        if not self.with_kl:
            return
        policy, reference = [], []
        with self.compute_loss_context_manager():
            for part in inputs["kl_parts"]:
                self.before_part(model, part)
                reference.append(part["ref_logps"])
                policy.append(self.inside(model, functools.partial(self._logps, part)))
        ratios = torch.cat(policy) - torch.cat(reference)
        kl = self._mean_kl(ratios, inputs.get("real", True))
        if self.model.training:
            self.metrics.add("kl", kl)
        else:
            self.metrics.keep("kl", ratios)
        for part in inputs["parts"]:
            part["kl"] = kl

    def _mean_kl(self, ratios: Tensor, real: bool) -> Tensor:
        """The mean over all ranks' examples; never negative."""
        sums = torch.stack([ratios.sum(), torch.full_like(ratios[0], len(ratios))]) * real
        total, count = self.accelerator.reduce(sums, "sum").unbind()
        return (total / count).clamp(min=0)

    def _logps(self, part: Mapping[str, Any]) -> Tensor:
        return self.reference_logps(self.inner, part)

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        (hidden, balance), head = self.scored(part), self.head()
        tokens, labels, desirable = self.measured(hidden, head, part), part["labels"], part["desirable"]
        given = (part["ref_logps"], part.get("kl"), part["cu_seqlens"])
        if tokens is None:
            out = self.loss_fn.from_hidden(
                hidden, head.weight, labels, desirable, head.bias, *given, scored_rows=part["sizes"], **head.options()
            )
        else:
            out = self.loss_fn.from_tokens(tokens.logps, labels, desirable, *given)
        sizes = part["cu_seqlens"].diff()
        chosen = desirable.repeat_interleave(sizes, output_size=len(labels))
        self.add_token_metrics(tokens, part, chosen)
        self._add_class_metrics(out)
        self.keep_responses(out, part)
        self.count_tokens(part)
        return out.loss if balance is None else out.loss + balance

    def keep_responses(self, out: UnpairedOutput, part: Mapping[str, Any]) -> None:
        """In an evaluation, keeps the responses: z0 is not known before its end."""
        if not self.model.training:
            self.metrics.keep("responses", torch.stack([out.logps, part["ref_logps"], out.desirable], 1))

    def whole_loss(self, found: dict[str, Any], rows: Mapping[str, Tensor]) -> dict[str, float]:
        """With the z0 of all the evaluation's examples, in place of each batch's."""
        logps, ref_logps, desirable = rows["responses"].double().unbind(1)
        kl = rows["kl"].double().mean().clamp(min=0) if self.with_kl else None
        found = found | {"loss": float(self.loss_fn(logps, desirable > 0, ref_logps, kl).loss)}
        return super().whole_loss(found if kl is None else found | {"kl": float(kl)}, rows)

    def _add_class_metrics(self, out: UnpairedOutput) -> None:
        for name, members in (("chosen", out.desirable), ("rejected", ~out.desirable)):
            self.metrics.add(f"rewards/{name}", (out.rewards * members).sum(), members.sum())
            self.metrics.add(f"logps/{name}", (out.logps * members).sum(), members.sum())

    def derived_metrics(self, found: dict[str, float]) -> dict[str, float]:
        rewards = [found.get(f"rewards/{name}") for name in ("chosen", "rejected")]
        if rewards[0] is None or rewards[1] is None:
            return found
        return found | {"rewards/margins": rewards[0] - rewards[1]}


def _advise_weights(labels: Sequence[bool], desirable_weight: float, undesirable_weight: float) -> None:
    """Warns if the class weights are outside of 1 <= (n_D lambda_D) / (n_U lambda_U) <= 4/3.

    KTO's authors advise that range (arXiv 2402.01306, section 4.2). It is computed with TRL's rounding.
    """
    desirable = max(sum(labels), 1)
    undesirable = max(len(labels) - desirable, 1)
    if desirable == undesirable:
        return
    balance = undesirable * undesirable_weight / desirable
    wanted = round(balance, 2), round(balance * 1.33, 2)
    balance = desirable * desirable_weight / undesirable
    other = round(balance / 1.33, 2), round(balance, 2)
    if not (wanted[0] <= desirable_weight <= wanted[1] or other[0] <= undesirable_weight <= other[1]):
        warnings.warn(
            f"desirable_weight, undesirable_weight: got {desirable_weight} and {undesirable_weight} for {desirable} "
            f"desirable and {undesirable} undesirable examples; either desirable_weight in [{wanted[0]}, {wanted[1]}] "
            f"or undesirable_weight in [{other[0]}, {other[1]}] is advised",
            stacklevel=4,
        )
