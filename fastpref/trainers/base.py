"""What all trainers share, on `transformers.Trainer`: preparing data, splitting batches, metrics, checkpoints."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from fastpref.common.memory import keep_freed_memory
from fastpref.data.batches import pad_id
from fastpref.data.collators import PackedCollator
from fastpref.data.images import PREPARED, tokenizer_of
from fastpref.data.remarks import say_remarks
from fastpref.models import compile_backbone, inner_model, keep_arithmetic, limits, run_inside
from fastpref.trainers import card
from fastpref.trainers.config import PreferenceConfig, unsupported
from fastpref.trainers.fillers import POSITION, NumberedStream, real_examples
from fastpref.trainers.grouping import PromptSampler, prompts_of, seed_of
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.loading import (
    check_datasets,
    check_limits,
    check_parallel,
    disable_dropout,
    hand_out_whole,
    refuse_frozen,
    refuse_options,
    said_of,
)  # fmt: skip
from fastpref.trainers.metrics import MetricSums
from fastpref.trainers.streams import StreamRemarks
from fastpref.trainers.vision import pictured, ready_vision, refuse_mixed, unopened

NLL_TERM = "loss/nll"  # of an evaluation's loss: a mean over tokens, where the rest is one over examples


class Items(NamedTuple):
    """What the batches of one update hold, on this rank or averaged over ranks. They weight a part's loss."""

    examples: float | Tensor
    tokens: float | Tensor  # scored in chosen responses: the denominator of an NLL term

    def tokens_tensor(self, examples: int, device: torch.device) -> Tensor:
        """The average number of tokens of that many examples, 0-d. A part's loss is weighted by its share of the
        examples. A sum divided by this number is then weighted by its share of the tokens."""
        tokens = self.tokens * (examples / self.examples)
        return tokens if isinstance(tokens, Tensor) else torch.full((), tokens, device=device)


class PreferenceTrainer(Trainer):
    """The base class of all trainers. A batch is `{"index": [B], "parts": [packed batch, ...]}`.

    A subclass says how data is tokenised (`prepare_dataset`), which collator packs it, and what a part's loss is
    (`part_loss`). The loss of an update is the mean over its examples. How they are split into batches and parts does
    not matter.
    """

    args: Any  # an instance of config_class
    model: Any
    _signature_columns: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    config_class: type[PreferenceConfig] = PreferenceConfig
    loss_is_scaled_for_ga = True  # by the number of examples in an update
    gives_scores = False  # rows of `scores` in an evaluation, for `compute_metrics`
    reads_images = False
    signature_columns: tuple[str, ...] = ()

    def __init__(
        self, model: Any, args: PreferenceConfig, collator: PackedCollator, train_dataset: Any, eval_dataset: Any,
        processing_class: Any, **options: Any,
    ) -> None:  # fmt: skip
        refuse_options(options, self.gives_scores)
        check_datasets(train_dataset, eval_dataset, args.group_by_prompt)
        refuse_frozen(model)
        keep_arithmetic(model, for_good=True)
        self.router_aux_loss_coef = self.router_coefficient(model, args)
        self.aux_loss_enabled = self.router_aux_loss_coef != 0.0
        collator.count_copies = self.aux_loss_enabled
        if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
            raise unsupported("device_map", "several devices", "want the whole model on one, or FSDP")
        if args.disable_dropout:
            disable_dropout(model)
        hand_out_whole(args)
        tokenizer = self.tokenizer_in_use = tokenizer_of(processing_class)
        self._vision = collator.vision = ready_vision(model, processing_class, args)
        options = {name: value for name, value in options.items() if value is not None}
        super().__init__(
            model=model, args=args, data_collator=collator,
            train_dataset=self._prepared(train_dataset, args, "train"),
            eval_dataset=self._prepared(eval_dataset, args, "eval"), processing_class=processing_class, **options,
        )  # fmt: skip
        refuse_mixed(self._vision, self)
        self.model_accepts_loss_kwargs = True  # transformers < 5.19 reads this in place of loss_is_scaled_for_ga
        if args.keep_freed_memory and args.device.type == "cpu":
            keep_freed_memory()
        check_parallel(args, deepspeed=self.is_deepspeed_enabled, fsdp=self.is_fsdp_enabled)
        collator.token_budget = args.token_budget
        collator.keep_examples = args.world_size > 1
        collator.limits = limits(self.inner)
        collator.pad_token_id = pad_id(tokenizer, self.inner)
        check_limits(collator, len(tokenizer), self.train_dataset, self.eval_dataset)
        collator.layout, collator.ours = choose_layout(self.model, args.layout, collator.pictures())
        if args.torch_compile:
            compile_backbone(self.inner, self.accelerator, args)
        self.add_callback(StreamRemarks(self.train_dataset, self.eval_dataset))
        self._said_nan = False
        self._sums = {"train": MetricSums(), "eval": MetricSums()}
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(card.tags_of(self.method))

    def router_coefficient(self, model: Any, args: Any) -> float:
        """The weight of a mixture of experts' load-balancing loss: 0 unless a subclass has one."""
        if args.router_aux_loss_coef:
            raise unsupported("router_aux_loss_coef", args.router_aux_loss_coef, "want None: as in TRL, there is none")
        return 0.0

    # data

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["length", POSITION, *PREPARED, *self.signature_columns]

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        """The data set tokenised, with the columns `signature_columns`."""
        raise NotImplementedError

    def _prepared(self, dataset: Any, args: PreferenceConfig, name: str, argument: str | None = None) -> Any:
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, Mapping):
            return {key: self._prepared(value, args, key, f"{name}_dataset[{key!r}]") for key, value in dataset.items()}
        with args.main_process_first(desc=f"preparing the {name} data"), said_of(argument or f"{name}_dataset"):
            return self.prepare_dataset(unopened(dataset.with_format(None), self.reads_images), name, args)

    def pictured(self, dataset: Any, sides: Sequence[str], args: Any, name: str, whole: bool = False) -> Any:
        """The records with images as token ids, with them; others as they are."""
        return pictured(dataset, self._vision, sides, args, name, whole, late=hasattr(self, "train_dataset"))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"):
        """As `Trainer.evaluate`. A data set given here is prepared like those given to the constructor."""
        if isinstance(eval_dataset, Mapping) and not self._is_prepared(eval_dataset):
            found: dict[str, float] = {}
            for name, dataset in eval_dataset.items():
                found |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return found
        if eval_dataset is not None and not isinstance(eval_dataset, str) and not self._is_prepared(eval_dataset):
            eval_dataset = self.ready_for_evaluation(self._prepared(eval_dataset, self.args, metric_key_prefix))
        found = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        say_remarks(eval_dataset)  # of a stream that was given here
        return found

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test"):
        """As `Trainer.predict`, but with metrics only: there are no logits to return."""
        dataset = self.ready_for_evaluation(self._prepared(test_dataset, self.args, metric_key_prefix))
        found = super().predict(dataset, ignore_keys, metric_key_prefix)
        say_remarks(dataset)
        return found

    def _is_prepared(self, dataset: Any) -> bool:
        own = [self.eval_dataset, self.train_dataset]
        own += list(self.eval_dataset.values()) if isinstance(self.eval_dataset, Mapping) else []
        return any(dataset is known for known in own)

    def ready_for_evaluation(self, dataset: Any) -> Any:
        """Called with a prepared data set before it is evaluated; a subclass may add columns."""
        return dataset

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1 and isinstance(dataset, torch.utils.data.IterableDataset):
            dataset = NumberedStream(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> Any:
        if not self.args.group_by_prompt:
            return super()._get_train_sampler(*args)
        prompts, size = prompts_of(self.train_dataset), self._train_batch_size
        return PromptSampler(prompts, size, seed_of(self.args), lambda: int(self.state.epoch or 0))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`. What an interrupted run summed up for its next log counts for nothing here."""
        self._sums["train"] = MetricSums()
        return super().train(*args, **kwargs)

    # one update: batches, and parts of them

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """The batches of one update, and what they hold over all ranks."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        samples = [self._without_fillers(batch, last=batch is samples[-1]) for batch in samples]
        return samples, self._over_ranks(self._items(samples))

    def _without_fillers(self, batch: Any, last: bool = True) -> Any:
        """The batch without examples that Accelerate repeats to make the ranks come out even. If all are repeated, one
        is kept and counts for nothing: every rank has to run the same collectives. `last` as in `real_examples`."""
        kept = batch.pop("kept", None)
        if kept is None:
            return batch
        filled = self.args.accelerator_config.even_batches and not self.args.dataloader_drop_last
        real = real_examples(kept.examples, self.accelerator, filled, last)
        if real == len(kept.examples):
            return batch
        found = self.data_collator(kept.examples[: max(1, real)])
        found.pop("kept")
        for part in found["parts"]:
            part["real"] = real > 0
        return found | {"real": real > 0}

    def _over_ranks(self, items: Items) -> Items:
        """The mean of the items over all ranks, without a host sync. DDP averages gradients over ranks, and a rank's
        batch may hold more or less than another's."""
        if self.args.world_size == 1 or not self.args.average_tokens_across_devices:
            return items
        numbers = [torch.full((), float(n), device=self.args.device) for n in items]  # a kernel each, and no copy
        return Items(*self.accelerator.reduce(torch.stack(numbers), "mean").unbind())

    def _items(self, batches: Sequence[Mapping[str, Any]]) -> Items:
        parts = [part for batch in batches if batch.get("real", True) for part in batch["parts"]]
        return Items(sum(p["examples"] for p in parts), sum(self.nll_tokens(p) for p in parts))

    def nll_tokens(self, part: Mapping[str, Any]) -> int:
        """How many tokens a part's NLL term is a mean over. 0 where the method has no such term."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of every part, one after the other; gradients are reduced with the last."""
        model.train()  # after an evaluation it is not yet: what comes before the parts belongs to training, too
        inputs = self._prepare_inputs(inputs)
        items: Any = num_items_in_batch or self._items([inputs])
        total, parts = torch.zeros((), device=self.args.device), inputs["parts"]
        with self.metrics.batch(inputs.get("real", True)):
            self.before_parts(model, inputs)
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with contextlib.nullcontext() if last else self.accelerator.no_sync(model), self._offloading():
                    total = total + super().training_step(model, part, items)
        return total

    def _offloading(self) -> contextlib.AbstractContextManager:
        if not self.args.activation_offloading:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.args.device.type != "cpu")

    def before_parts(self, model: Any, inputs: dict[str, Any]) -> None:
        """A hook, called before the parts of a batch are run: for what depends on the whole batch."""

    def before_part(self, model: Any, part: dict[str, Any]) -> None:
        """A hook, called before a part's forward: for what its loss needs from outside of that forward."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a part or of a whole batch, weighted by its share of the update's examples.

        Raises:
            ValueError: `return_outputs` is True. There are no logits to return.
        """
        if return_outputs:
            raise unsupported("return_outputs", True, "there are no logits")
        if "parts" not in inputs:
            own = self._items([{"parts": [inputs]}])
            items = (num_items_in_batch or own) if inputs.get("real", True) else own
            self.before_part(model, inputs)
            share = inputs["examples"] / items.examples if inputs.get("real", True) else 0.0
            return self.inside(model, lambda: self.part_loss(inputs, items)) * share
        self.before_parts(model, inputs)
        items = num_items_in_batch or self._items([inputs])
        losses = [self.compute_loss(model, part, num_items_in_batch=items) for part in inputs["parts"]]
        return torch.stack(losses).sum()

    def inside(self, model: Any, function: Callable[[], Any]) -> Any:
        """Runs `function()` as if it were the forward of `model`, which may be wrapped (DDP, FSDP, DeepSpeed)."""
        return run_inside(model, self.accelerator, lambda bare: function())

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        """The mean loss of a part's examples, 0-d. Adds to `self.metrics`. Runs inside the model's forward."""
        raise NotImplementedError

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None):
        """Adds a batch to the sums from which `evaluation_loop` makes the loss. Returns (None, None, None): no single
        batch's loss is read."""
        inputs = self._prepare_inputs(self._without_fillers(inputs))
        real = inputs.get("real", True)
        with torch.no_grad(), self.compute_loss_context_manager(), self.metrics.batch(real):
            self.before_parts(model, inputs)
            for part in inputs["parts"]:
                self.compute_loss(model, part)
        return None, None, None

    def add_loss(self, total: Tensor, count: Tensor | float, name: str = "loss") -> None:
        """In an evaluation, adds a term of the loss: a sum, and the `count` that it is divided by."""
        if not self.model.training:
            self.metrics.add(name, total, count)

    def whole_loss(self, found: dict[str, Any], rows: Mapping[str, Tensor]) -> dict[str, float]:
        """An evaluation's metrics with its `loss`, as if all its data were one batch. Terms that are means over pairs
        and terms that are means over tokens each keep their own weights."""
        loss = found.pop("loss", math.nan) + found.pop(NLL_TERM, 0.0)
        return found | {"loss": loss}

    # metrics

    @property
    def metrics(self) -> MetricSums:
        """The sums that the current mode adds to: those of training or those of evaluation."""
        return self._sums["train" if self.model.training else "eval"]

    @property
    def statistics(self) -> str:
        return self.args.statistics

    def measuring(self) -> bool:
        """Whether this step measures entropies and the like."""
        when = self.statistics
        by_epoch = self.args.logging_strategy == "epoch"  # of which no step is known to be the last
        if when != "logging" or by_epoch or not self.model.training:
            return when != "never"
        step = self.state.global_step + 1
        every = max(1, int(self.state.logging_steps or self.args.logging_steps or 1))
        return step % every == 0 or step == self.state.max_steps or (self.args.logging_first_step and step == 1)

    def count_tokens(self, part: Mapping[str, Any]) -> None:
        if self.model.training:
            self.metrics.add_total("num_tokens", torch.full((), float(part["tokens"]), device=self.args.device))

    def derived_metrics(self, found: dict[str, float]) -> dict[str, float]:
        """The metrics with those added that follow from others, such as margins."""
        return found

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs or "train_loss" in logs:  # at the end, of the steps since the last log
            found = self.derived_metrics(self._sums["train"].flush(self.accelerator))
            self.state.num_input_tokens_seen += int(found.pop("num_tokens", 0))
            logs |= found | {"num_tokens": self.state.num_input_tokens_seen}
        super().log(logs, *args, **kwargs)
        if math.isnan(logs.get("loss", 0.0)) and not self._said_nan:
            self._said_nan = True
            warnings.warn(
                f"loss: NaN in the steps up to {self.state.global_step}; the model's weights are likely NaN from there "
                "on (a learning rate too high, fp16 out of range?)",
                stacklevel=2,
            )

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: Any = None, ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        sums = self._sums["eval"] = MetricSums()  # not with what an interrupted evaluation left
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        rows = sums.rows(self.accelerator)
        found = self.whole_loss(self.derived_metrics(sums.flush(self.accelerator, whole=True)), rows)
        if "scores" in rows:
            scores = rows["scores"].numpy()
            output = output._replace(predictions=scores, label_ids=np.zeros(len(scores), int))
            if self.compute_metrics is not None:
                found |= self.compute_metrics(EvalPrediction(scores, np.zeros(len(scores), int)))
        assert output.metrics is not None
        prefix = f"{metric_key_prefix}_"
        output.metrics.update({prefix + name.removeprefix(prefix): value for name, value in found.items()})
        return output

    # checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """First counts the tokens since the last log, and writes the model's card."""
        tokens = self._sums["train"].take_total("num_tokens")
        if tokens is not None:
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))
        self.create_model_card(Path(self.args.hub_model_id or self.args.output_dir).name)
        super()._save_checkpoint(model, trial)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None, **unused: Any
    ) -> None:
        """Writes `README.md` into `output_dir`. The arguments are TRL's; `push_to_hub` may give more."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            card.write_card(
                folder / "README.md", self.method, model_name=model_name or folder.name, dataset=dataset_name,
                base=card.base_model(self.model), tags=[tags] if isinstance(tags, str) else tags or [],
            )  # fmt: skip

    @property
    def method(self) -> card.Method:
        return card.METHODS[self.config_class.__name__.removesuffix("Config")]

    @property
    def inner(self) -> Any:
        """The transformers model, without wrappers and adapters around it."""
        return inner_model(self.accelerator.unwrap_model(self.model))
