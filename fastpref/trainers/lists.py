"""Training on several ranked responses to a prompt: what `DPOTrainer` and `RewardTrainer` do with such data."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpref.data import ranked
from fastpref.data.formats import column_names
from fastpref.objectives.lists import LIST_LOSS_TYPES, ListDPOLoss, ListOutput
from fastpref.reference import TIE_MODELS
from fastpref.trainers.config import DPOConfig
from fastpref.trainers.policy import ReferencedTrainer

logger = logging.getLogger(__name__)

OF_PAIRS = ("loss_weights", "label_smoothing", "f_divergence_type", "ld_alpha", "use_weighting")
IDS = ("prompt_ids", "list_ids", "list_sizes", "list_mask")


def any_ranked(*datasets: Any) -> bool:
    """Whether one of the data sets has rankings. Each is one, several by name, or None."""
    return any(
        any_ranked(*given.values()) if isinstance(given, Mapping) else ranked.is_ranked(given)
        for given in datasets
        if isinstance(given, Mapping) or hasattr(given, "column_names")  # what is no data set is refused later
    )


def list_loss(args: DPOConfig, rankings: bool) -> ListDPOLoss | None:
    """The loss on lists that a configuration asks for, or None if it is one on pairs.

    Args:
        args: the configuration.
        rankings: whether the data are rankings. The loss of DPO on pairs is then that of all their pairs.

    Raises:
        ValueError: a loss on pairs that has no form for rankings, or an option that a loss on lists does not have.
    """
    losses = list(args.loss_type)
    if not set(losses) & set(LIST_LOSS_TYPES):
        if args.nu is not None:
            raise ValueError(f"nu: got {args.nu} with loss_type {losses}, want None: it is of {', '.join(TIE_MODELS)}")
        if not rankings:
            return None
        if losses != ["sigmoid"]:
            raise ValueError(
                f"loss_type: got {losses} with rankings, want one of {', '.join(LIST_LOSS_TYPES)}; or pairs of them, "
                "by `fastpref pairs`"
            )
        logger.warning("loss_type: 'sigmoid' on rankings is 'all_pairs', the mean over all pairs of a prompt")
        losses = ["all_pairs"]
    if len(losses) > 1:
        raise ValueError(f"loss_type: got {losses}, want a loss on lists alone")
    defaults = {name: field.default for name, field in DPOConfig.__dataclass_fields__.items()}
    for name in OF_PAIRS:
        if getattr(args, name) != defaults[name]:
            raise ValueError(
                f"{name}: got {getattr(args, name)!r} with loss_type {losses[0]!r}, want {defaults[name]!r}: it is of "
                "losses on pairs"
            )
    return ListDPOLoss(args.beta, losses[0], args.nu)


class ListTraining(ReferencedTrainer):
    """How a part's lists are scored and measured, where `on_lists` is set. `loss_fn` is then a `ListDPOLoss`."""

    on_lists = False

    def train_on_lists(self) -> None:
        """Sets what the columns are of lists."""
        self.on_lists, self.reads_images = True, False
        self.signature_columns = (*IDS, "ranks", "ref_logps")
        self.reference_columns, self.hashed_columns = ("ref_logps",), IDS

    def prepare_lists(self, dataset: Any, name: str, args: Any) -> Any:
        """The data set tokenised, as `fastpref.data.ranked` says."""
        if given := {"ref_chosen_logps", "ref_rejected_logps"} & set(column_names(dataset)):
            warnings.warn(f"{min(given)}: in {name}_dataset, but not read: a list's are ref_logps", stacklevel=4)
        ties = self.loss_fn.objective.loss in TIE_MODELS
        return ranked.tokenize_ranked(ranked.ranked(dataset), self.tokenizer_in_use, ties=ties, **args.tokenizing(name))

    def list_part_loss(self, part: Mapping[str, Any]) -> Tensor:
        """The mean loss of a part's lists, 0-d."""
        (hidden, balance), head = self.scored(part), self.head()
        tokens, labels, ranks = self.measured(hidden, head, part), part["labels"], part["ranks"]
        given = (part.get("ref_logps"), part["group"], part["cu_seqlens"])
        if tokens is None:
            out = self.loss_fn.from_hidden(
                hidden, head.weight, labels, ranks, head.bias, *given, sizes=part["groups"], scored_rows=part["sizes"],
                **head.options(),
            )  # fmt: skip
        else:
            out = self.loss_fn.from_tokens(tokens, labels, ranks, *given, sizes=part["groups"])
        best = out.best.repeat_interleave(part["cu_seqlens"].diff(), output_size=len(labels)) > 0
        self.add_token_metrics(tokens, part, best)
        self.add_list_metrics(out)
        self.add_loss(out.loss * part["examples"], part["examples"])
        self.count_tokens(part)
        return out.loss if balance is None else out.loss + balance

    def add_list_metrics(self, out: ListOutput) -> None:
        """The metrics of pairs: chosen are the best ranked responses, rejected the worst ones."""
        for name, share in (("chosen", out.best), ("rejected", out.worst)):
            self.metrics.add(f"rewards/{name}", (out.rewards * share).sum(), share.sum())
            self.metrics.add(f"logps/{name}", (out.logps * share).sum(), share.sum())
        self.metrics.add("rewards/accuracies", out.correct.sum(), out.compared.sum())
        self.metrics.add("rewards/margins", (out.rewards * (out.best - out.worst)).sum(), out.best.sum())

    # log-probs of a reference, which differ in number

    def reference_width(self, dataset: Any) -> int:
        return max(map(len, dataset["ranks"])) if self.on_lists else super().reference_width(dataset)

    def add_reference(self, dataset: Any, values: Tensor) -> Any:
        if not self.on_lists:
            return super().add_reference(dataset, values)
        rows = [found[: len(ranks)].tolist() for found, ranks in zip(values, dataset["ranks"], strict=True)]
        return dataset.add_column("ref_logps", rows)

    def by_example(self, logps: Tensor, examples: Sequence[dict[str, Any]]) -> list[Tensor]:
        if not self.on_lists:
            return super().by_example(logps, list(examples))
        return list(torch.split(logps, [len(e["ranks"]) for e in examples]))
