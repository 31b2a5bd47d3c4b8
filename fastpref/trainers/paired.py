"""Trainers on preference pairs: DPO and its family, IPO, and the methods without a reference (ORPO, CPO, SimPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.data import formats, tokenize
from fastpref.data.collators import ListCollator, PairCollator
from fastpref.data.ids import IGNORE_INDEX
from fastpref.objectives.paired import DPOLoss, IPOLoss, PairedLoss, PreferenceOutput
from fastpref.objectives.reference_free import CPOLoss, ORPOLoss, SimPOLoss
from fastpref.ops.paired import SEPARABLE_EXCEPT
from fastpref.reference import TokenStatistics
from fastpref.reference.paired import log_odds
from fastpref.trainers.base import NLL_TERM, Items
from fastpref.trainers.config import CPOConfig, DPOConfig, IPOConfig, ORPOConfig, SimPOConfig
from fastpref.trainers.lists import ListTraining, any_ranked, list_loss
from fastpref.trainers.loading import given_args
from fastpref.trainers.policy import PolicyTrainer, ReferencedTrainer

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
MASKS = ("chosen_mask", "rejected_mask")
SKIPS = ("chosen_skip", "rejected_skip")


class PairTraining(PolicyTrainer):
    """How a part's pairs are scored and measured. `loss_fn` is one of fastpref's paired losses."""

    loss_fn: Any  # a PairedLoss
    reads_images = True

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        (hidden, balance), head = self.scored(part), self.head()
        denominator, options = self._denominator(part, items), self.loss_options(part)
        fused = bool(options) and "head_index" not in part
        tokens = self.measured(hidden, head, part, differentiable=not fused)
        labels, ref_logps, edges = part["labels"], part.get("ref_logps"), part["cu_seqlens"]
        if tokens is None or fused:
            out = self.loss_fn.from_hidden(
                hidden, head.weight, labels, head.bias, ref_logps, edges, nll_tokens=denominator,
                scored_rows=part["sizes"], **head.options(), **options,
            )  # fmt: skip
        else:
            out = self.loss_fn.from_tokens(tokens, labels, ref_logps, edges, nll_tokens=denominator, **options)
        chosen = torch.arange(len(part["rows"]), device=hidden.device) < part["cu_seqlens"][part["examples"]]
        self.add_token_metrics(tokens, part, chosen)
        self.add_pair_metrics(out)
        nll_tokens = part["chosen_rows"] if denominator is None else denominator
        self.add_method_metrics(out, part, nll_tokens)
        self.add_loss_terms(out, part, tokens)
        self.count_tokens(part)
        return out.loss if balance is None else out.loss + balance

    def add_loss_terms(self, out: PreferenceOutput, part: Mapping[str, Any], tokens: TokenStatistics | None) -> None:
        """In an evaluation, adds the terms of its loss.

        The NLL is a mean over tokens and the rest is a mean over pairs, so they are added apart.
        """
        if self.model.training:
            return
        objective, pairs, loss = self.loss_fn.objective, part["examples"], out.loss
        weight = dict(zip(objective.losses, objective.weights, strict=True)).get("sft", 0.0)
        if weight:
            nll, count = weight * self.nll_sum(out, part, tokens), part["chosen_rows"]
            self.add_loss(nll, count, NLL_TERM)
            loss = loss - nll / max(1, count)
        self.add_loss(loss * pairs, pairs)
        if set(objective.losses) & set(SEPARABLE_EXCEPT):
            sizes = part["cu_seqlens"].diff().view(2, -1)
            self.metrics.keep(
                "pairs", torch.stack([out.chosen_logps, out.rejected_logps, *part["ref_logps"].view(2, -1), *sizes], 1)
            )

    def whole_loss(self, found: dict[str, Any], rows: Mapping[str, Tensor]) -> dict[str, float]:
        if "pairs" in rows:  # sorted over all of the data, not in each batch
            found = found | {"loss": float(self.loss_fn(*rows["pairs"].double().unbind(1)).loss), NLL_TERM: 0.0}
        return super().whole_loss(found, rows)

    def nll_sum(self, out: PreferenceOutput, part: Mapping[str, Any], tokens: TokenStatistics | None) -> Tensor:
        """The negative log-likelihood of a part's chosen tokens, summed, 0-d."""
        if tokens is None:
            return -out.chosen_logps.sum()
        scored = part["labels"][: part["chosen_rows"]] != IGNORE_INDEX
        return -(tokens.logps.detach()[: part["chosen_rows"]] * scored).sum()

    def loss_options(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """More arguments of the loss, for a part."""
        return {}

    def add_method_metrics(self, out: PreferenceOutput, part: Mapping[str, Any], nll_tokens: Tensor | int) -> None:
        """Adds the metrics that only this method logs."""

    def nll_tokens(self, part: Mapping[str, Any]) -> int:
        return part["chosen_rows"]

    def _denominator(self, part: Mapping[str, Any], items: Items) -> Tensor | None:
        """What a part's NLL is divided by, or None for its own number of tokens.

        A part's loss is weighted by its share of the update's examples. Its NLL must be weighted by its share of the
        tokens.
        """
        if isinstance(items.examples, int) and part["examples"] == items.examples:
            return None
        return items.tokens_tensor(part["examples"], self.args.device)

    def add_pair_metrics(self, out: PreferenceOutput) -> None:
        for name in ("chosen", "rejected"):
            self.metrics.add_mean(f"rewards/{name}", getattr(out, f"{name}_rewards"))
            self.metrics.add_mean(f"logps/{name}", getattr(out, f"{name}_logps"))
        self.metrics.add_mean("rewards/accuracies", out.accuracies)
        self.metrics.add_mean("rewards/margins", out.margins)

    def refuse_budget(self, losses: tuple[str, ...]) -> None:
        """Refuses a token budget for losses that sort a whole batch.

        Raises:
            ValueError: there is a token budget, and one of the losses sorts.
        """
        sorting = sorted(set(losses) & set(SEPARABLE_EXCEPT))
        if self.args.token_budget is not None and sorting:
            raise ValueError(
                f"token_budget: got {self.args.token_budget} with loss_type {sorting[0]!r}, want None: it sorts a batch"
            )


class _ReferencedPairs(PairTraining, ReferencedTrainer):
    signature_columns = (*IDS, *MASKS, "ref_chosen_logps", "ref_rejected_logps")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")
    hashed_columns = (*IDS, *MASKS)

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        pairs = self.pictured(formats.paired(dataset), formats.PAIR, args, name)
        return tokenize.tokenize_paired(pairs, self.tokenizer_in_use, **args.tokenizing(name))

    def reference_logps(self, model: Any, part: Mapping[str, Any]) -> Tensor:
        return self.loss_fn.sequence_logps(self.token_logps(model, part), part["labels"], part["cu_seqlens"])


class DPOTrainer(_ReferencedPairs, ListTraining):
    """Direct preference optimisation, with the arguments and the 15 loss types of TRL 1.16's `DPOTrainer`.

    It also takes several ranked responses to a prompt, and the loss types of `fastpref.ListDPOLoss`.

    Args:
        model: what to train: a name on the hub, a folder, a causal language model, or a PeftModel. If the folder is an
            adapter's, that adapter goes on training.
        ref_model: the reference: a model or its name. By default it is the policy as it is before training. A PeftModel
            or an adapter's folder counts with its adapters; a model that gets new ones from `peft_config` counts
            without them.
        args: a `DPOConfig`; by default one with an `output_dir` named after the model.
        data_collator: not supported, since fastpref packs the batches; want None.
        train_dataset: pairs in any format of `fastpref.data.formats`, or rankings in one of `fastpref.data.ranked`; a
            `Dataset` or an `IterableDataset`.
        eval_dataset: the same, or several by name.
        processing_class: the tokenizer, by default the model's.
        compute_metrics: not supported, since there are no logits; want None.
        callbacks: as for `transformers.Trainer`.
        optimizers: as for `transformers.Trainer`.
        quantization_config: how to quantise a model that is given by name.
        peft_config: new adapters to train, instead of all weights.

    Raises:
        ValueError: an argument or a field of `args` is not supported, or a record is wrong. The message names it.
        TypeError: an argument is not of a type listed above.
    """

    config_class = DPOConfig

    def __init__(
        self, model: Any, ref_model: Any = None, args: DPOConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, compute_metrics: Any = None,
        callbacks: Any = None, optimizers: Any = (None, None), quantization_config: Any = None, peft_config: Any = None,
    ) -> None:  # fmt: skip
        args = given_args(args, DPOConfig, model, "DPO")
        self.loss_fn = list_loss(args, any_ranked(train_dataset, eval_dataset))
        if self.loss_fn is None:
            self.loss_fn = DPOLoss(
                args.beta, args.loss_type, args.label_smoothing, args.f_divergence_type,
                f_alpha_divergence_coef=args.f_alpha_divergence_coef, loss_weights=args.loss_weights,
                discopop_tau=args.discopop_tau, ld_alpha=args.ld_alpha, use_weighting=args.use_weighting,
            )  # fmt: skip
        else:
            self.train_on_lists()
        collator = ListCollator() if self.on_lists else PairCollator()
        super().__init__(
            model, ref_model, args, collator, train_dataset, eval_dataset, processing_class,
            peft_config=peft_config, data_collator=data_collator, compute_metrics=compute_metrics, callbacks=callbacks,
            optimizers=optimizers, quantization_config=quantization_config,
        )  # fmt: skip
        if not self.on_lists:
            self.refuse_budget(self.loss_fn.objective.losses)

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        prepare = self.prepare_lists if self.on_lists else super().prepare_dataset
        return prepare(dataset, name, args)

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        return self.list_part_loss(part) if self.on_lists else super().part_loss(part, items)

    def nll_tokens(self, part: Mapping[str, Any]) -> int:
        return 0 if self.on_lists else super().nll_tokens(part)

    def reference_settings(self) -> list[Any]:
        return [] if self.on_lists else ["ld_alpha", self.loss_fn.ld_alpha]

    def measuring(self) -> bool:
        """Also in evaluations where LD-DPO weighs tokens: their NLL has to see each token."""
        weighted = not self.on_lists and self.loss_fn.ld_alpha is not None and "sft" in self.loss_fn.objective.losses
        return super().measuring() or (weighted and not self.model.training)


class IPOTrainer(_ReferencedPairs):
    """Identity preference optimisation (Azar et al. 2023).

    Arguments and errors as in `DPOTrainer`, with an `IPOConfig`.
    """

    config_class = IPOConfig

    def __init__(
        self, model: Any, ref_model: Any = None, args: IPOConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        args = given_args(args, IPOConfig, model, "IPO")
        self.loss_fn = IPOLoss(args.beta, args.length_normalize)
        super().__init__(
            model, ref_model, args, PairCollator(), train_dataset, eval_dataset, processing_class,
            data_collator=data_collator, **options,
        )  # fmt: skip


class _ReferenceFree(PairTraining):
    router_on_request = True
    half_factors = False  # as in TRL's CPO and ORPO
    signature_columns = (*IDS, *MASKS, *SKIPS)

    def __init__(
        self, model: Any = None, args: Any = None, data_collator: Any = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, model_init: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        if model_init is not None:
            if model is not None:
                raise ValueError("model_init: got one beside a model, want one of them")
            model = model_init()
        args = given_args(args, self.config_class, model, type(self).__name__.removesuffix("Trainer"))
        self.loss_fn = self.loss_of(args)
        collator = PairCollator(score_prompts=self.scores_prompts(args))
        super().__init__(
            model, args, collator, train_dataset, eval_dataset, processing_class, data_collator=data_collator, **options
        )  # fmt: skip

    def loss_of(self, args: Any) -> PairedLoss:
        """The loss that a configuration describes."""
        raise NotImplementedError

    def scores_prompts(self, args: Any) -> bool:
        """Whether the chosen prompts are scored, too."""
        return False

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        pairs = self.pictured(formats.paired(dataset), formats.PAIR, args, name)
        return tokenize.tokenize_reference_free(pairs, self.tokenizer_in_use, **args.tokenizing(name))


class CPOTrainer(_ReferenceFree):
    """CPO, SimPO and AlphaPO, as in TRL 1.16's experimental `CPOTrainer`.

    Arguments and errors as in `DPOTrainer`, with a `CPOConfig`. There is no `ref_model`. `model_init` may make the
    model, in place of `model`.
    """

    config_class = CPOConfig

    def loss_of(self, args: Any) -> CPOLoss:
        return CPOLoss(
            args.beta, args.cpo_alpha, args.loss_type, label_smoothing=args.label_smoothing, gamma=args.simpo_gamma,
            alphapo_alpha=args.alpha,
        )  # fmt: skip

    def add_method_metrics(self, out: PreferenceOutput, part: Mapping[str, Any], nll_tokens: Tensor | int) -> None:
        self.metrics.add("nll_loss", self.nll_sum(out, part, None), part["cu_seqlens"][part["examples"]])

    def nll_sum(self, out: PreferenceOutput, part: Mapping[str, Any], tokens: TokenStatistics | None) -> Tensor:
        lengths = part["cu_seqlens"].diff()[: part["examples"]]
        return -(out.chosen_logps * lengths if self.loss_fn.objective.average else out.chosen_logps).sum()


class SimPOTrainer(_ReferenceFree):
    """SimPO (Meng et al. 2024) by its own name.

    Arguments and errors as in `DPOTrainer`, with a `SimPOConfig`. There is no `ref_model`. `model_init` may make the
    model, in place of `model`.
    """

    config_class = SimPOConfig

    def loss_of(self, args: Any) -> SimPOLoss:
        return SimPOLoss(args.beta, args.simpo_gamma, args.label_smoothing)


class ORPOTrainer(_ReferenceFree):
    """ORPO (Hong et al. 2024), as in TRL 1.16's experimental `ORPOTrainer`.

    The NLL is over the chosen prompts and responses. With `assistant_only_loss` it is over what the assistant wrote in
    the chosen responses.

    Arguments and errors as in `DPOTrainer`, with an `ORPOConfig`. There is no `ref_model`. `model_init` may make the
    model, in place of `model`.
    """

    config_class = ORPOConfig

    def loss_of(self, args: Any) -> ORPOLoss:
        return ORPOLoss(args.beta)

    def scores_prompts(self, args: Any) -> bool:
        return not args.assistant_only_loss

    def loss_options(self, part: Mapping[str, Any]) -> dict[str, Any]:
        return {"prompt_labels": part["prompt_labels"]} if "prompt_labels" in part else {}

    def add_method_metrics(self, out: PreferenceOutput, part: Mapping[str, Any], nll_tokens: Tensor | int) -> None:
        odds = log_odds(out.chosen_logps, out.rejected_logps)
        self.metrics.add_mean("log_odds_chosen", odds)
        self.metrics.add_mean("log_odds_ratio", F.logsigmoid(odds))
        self.metrics.add("nll_loss", self._nll(out) * nll_tokens, float(part["chosen_rows"]))

    def _nll(self, out: PreferenceOutput) -> Tensor:
        """The loss without its odds-ratio term."""
        odds = log_odds(out.chosen_logps, out.rejected_logps)
        return out.loss.detach() + self.args.beta * F.logsigmoid(odds).mean()

    def nll_sum(self, out: PreferenceOutput, part: Mapping[str, Any], tokens: TokenStatistics | None) -> Tensor:
        return self._nll(out) * part["chosen_rows"]
