"""Base classes of the trainers that train a language model, without a reference model and with one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastpref import linear_token_logprobs, linear_token_statistics, models
from fastpref.data.collators import PackedCollator
from fastpref.data.ids import IGNORE_INDEX
from fastpref.data.reference_cache import ReferenceCache
from fastpref.models import inner_model, sharded_like, whole
from fastpref.reference import TokenStatistics
from fastpref.trainers import experts, loading
from fastpref.trainers.base import PreferenceTrainer
from fastpref.trainers.config import PreferenceConfig, unsupported
from fastpref.trainers.forward import by_sequence, head_hidden, head_labels, head_rows, run_backbone, to_device
from fastpref.trainers.loading import is_zero3, load_tokenizer, wrap_peft
from fastpref.trainers.reference import (
    Progress,
    Reference,
    SyncReference,
    came_with,
    check_moves,
    fill_cache,
    fingerprint,
    ready_reference,
)

REFERENCE_FILE = "reference.safetensors"  # in a checkpoint
ROUTES = "aux_loss/experts"  # what an evaluation sums
MEASURED = ("entropy", "mean_logit", "is_top1")


class PolicyTrainer(PreferenceTrainer):
    """Trains a causal language model. Its logits are never built."""

    loss_fn: Any  # one of fastpref's
    router_on_request = False  # the load-balancing loss, by the model's config
    half_factors = True  # adapters on a quantised model in bf16

    def __init__(
        self, model: Any, args: PreferenceConfig, collator: PackedCollator, train_dataset: Any, eval_dataset: Any,
        processing_class: Any, peft_config: Any = None, quantization_config: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForCausalLM

        given, model = model, loading.load_model(model, args, AutoModelForCausalLM, quantization_config)
        if getattr(model.config, "is_encoder_decoder", False):
            raise unsupported("model", type(model).__name__, "it is an encoder-decoder; want a causal language model")
        processing_class = load_tokenizer(processing_class, model, args, given)
        model = wrap_peft(model, peft_config, args, self.half_factors)
        models.read_head(model)  # refuses an adapter on the head
        super().__init__(model, args, collator, train_dataset, eval_dataset, processing_class, **options)
        models.output_head(self.inner)  # gives the model's own logits, or says that it does not

    def router_coefficient(self, model: Any, args: Any) -> float:
        return experts.router_coefficient(model, args.router_aux_loss_coef, on_request=self.router_on_request)

    def head(self) -> models.Head:
        """The model's output head: weight, bias and what transforms its logits."""
        return models.read_head(self.inner)

    def scored(self, part: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Runs the backbone on a part.

        Returns:
            (hidden states of the `head_rows`, weighted load-balancing loss of a mixture of experts or None).
        """
        if not self.aux_loss_enabled:
            return head_hidden(self.inner, part), None
        output = run_backbone(self.inner, part, output_router_logits=True)
        if not output.get("router_logits"):
            name = type(self.inner).__name__
            raise unsupported("router_aux_loss_coef", self.router_aux_loss_coef, f"{name} returns no router logits")
        sums, tokens = experts.routed(output.router_logits, part["copies"], experts.experts_per_token(self.inner))
        loss = experts.balance_loss(sums / tokens)
        self.metrics.add("aux_loss", loss * part["examples"], part["examples"])
        self.keep_routes(sums, tokens)
        hidden = models.for_head(self.inner, output.last_hidden_state).flatten(0, 1)
        return hidden.index_select(0, head_rows(part)), self.router_aux_loss_coef * loss

    def keep_routes(self, sums: Tensor, tokens: Tensor) -> None:
        """In an evaluation, adds up how tokens were routed: its load-balancing loss is that of all its tokens."""
        if not self.model.training:
            self.metrics.add(ROUTES, sums, tokens)

    def whole_loss(self, found: dict[str, Any], rows: Mapping[str, Tensor]) -> dict[str, float]:
        routes = found.pop(ROUTES, None)
        found = super().whole_loss(found, rows)
        if routes is None:
            return found
        loss = float(experts.balance_loss(torch.tensor(routes).view(2, -1)))
        return found | {"aux_loss": loss, "loss": found["loss"] + self.router_aux_loss_coef * loss}

    def measured(
        self, hidden: Tensor, head: models.Head, part: Mapping[str, Any], differentiable: bool = True
    ) -> TokenStatistics | None:
        """Log-probs of the scored tokens, with statistics on the steps that measure; None where nobody needs them.

        They are needed where sequences share scored tokens, of which each enters the head once. All come from one
        product with the head. A loss can be taken of the log-probs. The product's logits are kept for its backward if
        they fit the memory.
        """
        measuring = self.measuring()
        if not measuring and "head_index" not in part:
            return None
        wanted = (*(MEASURED if measuring else ()), *getattr(self.loss_fn, "statistics", ()))
        labels, scored = head_labels(part)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            found = linear_token_statistics(
                hidden, head.weight, labels, head.bias, wanted, scored_rows=scored, **head.options()
            )
        known = {name: value for name, value in found._asdict().items() if value is not None}
        return TokenStatistics(**{name: by_sequence(value, part) for name, value in known.items()})

    def add_token_metrics(self, tokens: TokenStatistics | None, part: Mapping[str, Any], chosen: Tensor) -> None:
        """Adds the entropy over all scored tokens, the mean logits of chosen and rejected ones, and the accuracy on the
        chosen.

        `chosen` `[M]` marks the rows of desirable responses.
        """
        if tokens is None or tokens.entropy is None:
            return
        scored = part["labels"] != IGNORE_INDEX
        assert tokens.mean_logit is not None and tokens.is_top1 is not None
        self.metrics.add("entropy", (tokens.entropy.detach() * scored).sum(), scored.sum())
        for name, rows in (("chosen", scored & chosen), ("rejected", scored & ~chosen)):
            self.metrics.add(f"logits/{name}", (tokens.mean_logit * rows).sum(), rows.sum())
        rows = scored & chosen
        self.metrics.add("mean_token_accuracy", (tokens.is_top1 & rows).sum(), rows.sum())

    def token_logps(self, model: Any, part: Mapping[str, Any], temperature: float = 1.0) -> Tensor:
        """The log-prob of every scored row `[M]`, by any model. For passes without gradients."""
        hidden, head = head_hidden(model, part), models.read_head(inner_model(model))
        labels, scored = head_labels(part)
        found = linear_token_logprobs(
            hidden, head.weight, labels, head.bias, temperature=temperature, scored_rows=scored, **head.options()
        )
        return by_sequence(found, part)

    def place_frozen(self, model: Any, in_steps: bool) -> Any:
        """Another model on its device. If it runs `in_steps` of training it is sharded like the policy, else whole."""
        if not self.is_fsdp_enabled:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        model.requires_grad_(False)  # or it would be sharded in fp32
        if not in_steps or not self.accelerator.is_fsdp2:
            return model.to(self.args.device)
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(self.accelerator, model)


class ReferencedTrainer(PolicyTrainer):
    """Trains a language model against a reference model.

    The reference's log-probs come from a cache on disk that is filled before training, or from its forward in every
    step.
    """

    reference_columns: tuple[str, ...]  # what a cache holds of each example
    hashed_columns: tuple[str, ...]  # the token ids and masks that it depends on, where they are

    def __init__(
        self, model: Any, ref_model: Any, args: Any, collator: PackedCollator, train_dataset: Any, eval_dataset: Any,
        processing_class: Any, peft_config: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            model, args, collator, train_dataset, eval_dataset, processing_class, peft_config=peft_config, **options
        )
        policy = self.accelerator.unwrap_model(self.model)
        if args.sync_ref_model:
            check_moves(policy, self)
        self.precomputes = self._precomputes()
        if ref_model is not None:
            ref_model = self._loaded_reference(ref_model)
            ready_reference(ref_model, collator, args.disable_dropout)
        self.reference = Reference.of(
            policy, ref_model, fresh_adapters=peft_config is not None, keep_copy=not self.precomputes
        )
        self._refuse_scattered(self.reference.before)
        if self.reference.own is not None:
            self.reference.own = self.place_frozen(self.reference.own, in_steps=not self.precomputes)
        if args.sync_ref_model:
            self.add_callback(SyncReference(self.reference.own, self.accelerator.unwrap_model))
        if self.precomputes:
            self.train_dataset = self.with_reference(self.train_dataset, "train")
            self.eval_dataset = self.with_reference(self.eval_dataset, "eval")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. Parameters set to train after the constructor count as part of the reference, too."""
        if self.reference.before is not None:
            self.reference.before.extend()
        return super().train(*args, **kwargs)

    def _refuse_scattered(self, before: Any) -> None:
        """Refuses a reference that needs earlier values of the policy's parameters where they cannot be put back.

        That is so under FSDP's first version and DeepSpeed's stage 3.
        """
        scattered = (self.is_fsdp_enabled and not self.accelerator.is_fsdp2) or is_zero3(self.accelerator)
        if before and scattered and not self.precomputes:
            reason = "what trained before the run is a part of it; want a ref_model, DDP, FSDP2 or ZeRO-2"
            raise unsupported("ref_model", None, reason)

    @property
    def ref_model(self) -> Any:
        """The reference, where it is a model of its own: given, moving (TR-DPO), or a copy that runs in every step.

        None where it is the policy with earlier values of what trains (adapters), or where its log-probs were
        precomputed from the policy.
        """
        return self.reference.own

    def _loaded_reference(self, ref_model: Any) -> Any:
        if isinstance(ref_model, str):
            from transformers import AutoModelForCausalLM

            return loading.load_model(ref_model, self.args, AutoModelForCausalLM).to(self.args.device)
        if not isinstance(ref_model, torch.nn.Module):
            raise TypeError(f"ref_model: got {type(ref_model).__name__}, want a model, its name, or None")
        return ref_model

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a moving reference too, since a run resumes from it.

        It is written first. A checkpoint counts as whole once the trainer's state is there, and older ones are then
        deleted.
        """
        if self.args.sync_ref_model:
            own = self.accelerator.unwrap_model(self.reference.own)
            models.reshard(own)
            weights = {name: whole(value).detach().cpu() for name, value in own.named_parameters()}  # on every rank
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                save_file(weights, folder / REFERENCE_FILE)
        super()._save_checkpoint(model, trial)

    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.sync_ref_model:
            own = self.accelerator.unwrap_model(self.reference.own)
            models.reshard(own)
            found = load_file(Path(resume_from_checkpoint) / REFERENCE_FILE)
            for name, value in own.named_parameters():
                value.copy_(sharded_like(value, found[name].to(value.device)))

    def _precomputes(self) -> bool:
        wanted, args = self.args.precompute_ref_log_probs, self.args
        datasets = [d for d in (self.train_dataset, *_datasets(self.eval_dataset)) if d is not None]
        given = [came_with(d, self.reference_columns) for d in datasets]
        possible = all(there or hasattr(d, "select") for d, there in zip(datasets, given, strict=True))
        if wanted and not possible:
            raise _no_stream()
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if wanted and self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "precompute_ref_log_probs: got True with cpu_ram_efficient_loading, want one of them: only rank 0 has "
                "the weights before training"
            )
        if wanted is not None:
            return wanted
        if not args.sync_ref_model and (all(given) or (any(given) and possible and not sharded)):
            return True
        if any(given):
            warnings.warn(
                f"{self.reference_columns[0]}: in the data, but not read: the reference runs in every step, since it "
                "moves (sync_ref_model), or another data set lacks it that is a stream or for shards", stacklevel=4,
            )  # fmt: skip
        if not possible or args.sync_ref_model or sharded:
            return False  # of a sharded model, a rank may not hold all
        per_epoch = len(self.train_dataset) / (args.train_batch_size * args.gradient_accumulation_steps)
        return args.max_steps <= 0 or args.max_steps * args.world_size >= per_epoch

    def with_reference(self, dataset: Any, name: str) -> Any:
        """The data set with the reference's log-probs as columns, read from the cache or computed into it."""
        if dataset is None:
            return None
        if isinstance(dataset, Mapping):
            return {key: self.with_reference(value, key) for key, value in dataset.items()}
        if came_with(dataset, self.reference_columns):
            return dataset
        settings = [self.accelerator.mixed_precision, *self.reference_settings()]
        columns = [name for name in (*self.hashed_columns, "pixels") if name in dataset.column_names]
        key = fingerprint(self.reference, dataset, columns, settings)
        folder = self.args.reference_cache or models.cache_folder() / "reference"
        width = self.reference_width(dataset)
        cache = ReferenceCache(folder, key, len(dataset), width)
        with self._progress(name, len(dataset)) as advance, self.reference.model() as model:
            model.to(self.args.device)  # where FSDP would bring it only for training

            def compute(examples: list[dict[str, Any]]) -> Tensor:
                found = self._reference_of(model, examples)
                return torch.nn.functional.pad(found, (0, width - found.shape[1]))

            fill_cache(
                cache, dataset, compute, tokens=self.args.reference_tokens, rank=self.args.process_index,
                world=self.args.world_size, progress=advance,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()
        return self.add_reference(dataset, cache.load())

    def reference_width(self, dataset: Any) -> int:
        """How many log-probs a cache has of each example, at most."""
        return len(self.reference_columns)

    def add_reference(self, dataset: Any, values: Tensor) -> Any:
        """The data set with its `reference_columns`, from a cache's `[examples, width]`."""
        for column, found in zip(self.reference_columns, values.unbind(1), strict=True):
            dataset = dataset.add_column(column, found.numpy())
        return dataset

    def by_example(self, logps: Tensor, examples: list[dict[str, Any]]) -> list[Tensor]:
        """The log-probs of a `reference_part`'s sequences, for each of its examples."""
        return list(logps.view(len(self.reference_columns), -1).unbind(1))

    def reference_settings(self) -> list[Any]:
        """What else the reference's log-probs depend on, for the cache's fingerprint."""
        return []

    def reference_part(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of examples for the reference, whose log-probs fill the `reference_columns`, one after the other."""
        return self.data_collator.part(examples)

    def _reference_of(self, model: Any, examples: list[dict[str, Any]]) -> Tensor:
        """`[examples, most that one has]`. Those that have fewer end in zeros."""
        part = to_device(self.reference_part(examples), self.args.device)
        with self.accelerator.autocast():
            found = self.by_example(self.reference_logps(model, part).float(), examples)
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True).cpu()

    def _progress(self, name: str, total: int) -> Any:
        return Progress(f"reference log-probs of the {name} data", total, disable=self.args.disable_tqdm)

    def reference_logps(self, model: Any, part: Mapping[str, Any]) -> Tensor:
        """The log-probs of a part's sequences by any model, in the form that the loss takes."""
        raise NotImplementedError

    def before_part(self, model: Any, part: dict[str, Any]) -> None:
        """Adds the reference's log-probs to a part, from a forward of the reference, unless they are precomputed.

        Columns that came with the data count as precomputed. They are not read where the reference runs in every step.
        """
        if self.precomputes and "ref_logps" in part:
            return
        if self.precomputes and self.reference.is_lost_by_training:
            raise _reference_is_lost()
        with self.reference.model() as reference:
            wrapped = model if self.reference.own is None else reference
            part["ref_logps"] = self.inside(wrapped, lambda: self.reference_logps(reference, part))

    def ready_for_evaluation(self, dataset: Any) -> Any:
        """Precomputes the reference's log-probs of a data set where that is possible.

        A stream or a sharded model gets them from a forward in every step: on shards, ranks have different numbers of
        batches to fill a cache with.

        Raises:
            ValueError: the reference was the policy itself, and training has changed it.
        """
        if not self.precomputes or came_with(dataset, self.reference_columns):
            return dataset
        if self.state.global_step > 0 and self.reference.is_lost_by_training:
            raise _reference_is_lost()
        if not hasattr(dataset, "select") and self.args.precompute_ref_log_probs:
            raise _no_stream()
        if not hasattr(dataset, "select") or models.is_sharded(self.reference.own or self.reference.policy):
            return dataset
        return self.with_reference(dataset, "evaluation")


def _no_stream() -> ValueError:
    return ValueError(
        "precompute_ref_log_probs: got True, which is not supported with IterableDataset; want False or a Dataset"
    )


def _reference_is_lost() -> ValueError:
    return ValueError(
        "eval_dataset: got one without reference log-probs after training began, want it given to the constructor, or "
        "a ref_model, or precompute_ref_log_probs=False (Cannot compute reference log-probs for a dataset passed to "
        "`evaluate` once the model that was the reference has been trained)"
    )


def _datasets(given: Any) -> list[Any]:
    return list(given.values()) if isinstance(given, Mapping) else [given]
