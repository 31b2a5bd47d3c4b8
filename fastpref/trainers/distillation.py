"""On-policy distillation: a student learns a teacher's distribution on its own samples, or on given completions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import linear_token_kl, models
from fastpref.data import formats
from fastpref.data.completions import CompletionCollator, has_completions, tokenize_completions
from fastpref.data.hidden_cache import HiddenCache
from fastpref.data.images import has_images
from fastpref.models import inner_model, is_peft
from fastpref.trainers import teacher as teachers
from fastpref.trainers.base import Items
from fastpref.trainers.config import unsupported
from fastpref.trainers.distillation_config import DistillationConfig
from fastpref.trainers.forward import (
    at_head_rows,
    by_sequence,
    head_hidden,
    head_labels,
    scored_hidden,
    to_device,
)
from fastpref.trainers.loading import given_args
from fastpref.trainers.policy import PolicyTrainer
from fastpref.trainers.reference import Progress, Reference, fill_cache, fingerprint, ready_reference
from fastpref.trainers.rollouts import EVALUATION, ModelSampler, Sampled, sampling_of


class DistillationTrainer(PolicyTrainer):
    """Distillation on the student's own samples, with the arguments of TRL 1.16's `DistillationTrainer`.

    The loss is the mean over completion tokens of a divergence between the student's and the teacher's distribution
    over the whole vocabulary (Agarwal et al. 2024, arXiv 2306.13649). It is computed from both models' hidden states:
    no logits of either model are in memory, and the gradient is exact.

    Args:
        model: the student: a model or a name. With adapters its head is frozen, which saves a product.
        teacher_model: a model, a name, an adapter's folder, or None: `args.teacher_model_name_or_path`, else the
            student with its adapters off. Its hidden size may be another. Its tokenizer must be the student's; where
            the vocabularies are padded to different sizes, the tokens of both count.
        args: a `DistillationConfig`.
        train_dataset, eval_dataset: records with a `prompt`, and for `lmbda` below 1 a completion: `prompt,
            completion`, `messages` whose last one is the assistant's, pairs (of which the chosen response counts), or
            token ids.
        processing_class: the student's tokenizer.
        options: as in `DPOTrainer`: `callbacks`, `optimizers`, `peft_config`, `quantization_config`.

    Raises:
        ValueError, TypeError: an argument or a field is not possible. The message names it.
    """

    config_class = DistillationConfig
    signature_columns = ("prompt_ids", "completion_ids", "completion_mask", "teacher_cache", "teacher_row")

    def __init__(
        self, model: Any, teacher_model: Any = None, args: DistillationConfig | None = None, train_dataset: Any = None,
        eval_dataset: Any = None, processing_class: Any = None, peft_config: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        args = given_args(args, DistillationConfig, model, "Distillation")
        self.loss_fn = None  # the divergence is an operator
        self.vocabulary: int | None = None
        self._batches: int | None = None  # of the current update so far; None in an evaluation
        self._evaluated = 0
        super().__init__(
            model, args, CompletionCollator(), train_dataset, eval_dataset, processing_class, peft_config=peft_config,
            **options,
        )  # fmt: skip
        self.data_collator.keep_examples = True
        if args.lmbda > 0 and (self.is_fsdp_enabled or models.is_sharded(self.model)):
            raise unsupported("lmbda", args.lmbda, "a sharded student does not sample; want 0.0, or DDP")
        self._set_teacher(teacher_model, peft_config is not None)
        if args.cache_teacher:
            self.train_dataset = self.with_teacher(self.train_dataset, "train")
            self.eval_dataset = self.with_teacher(self.eval_dataset, "eval")
            self._free_teacher()

    # data

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        if has_images(dataset):
            raise ValueError(f"{name}_dataset: got images, want texts: distillation reads none")
        found = formats.completions(dataset, args.dataset_num_proc)
        if name == "train" and args.lmbda < 1 and not has_completions(found):
            raise ValueError(
                f"lmbda: got {args.lmbda} with prompts alone, want 1.0, or completions in the data: a share of "
                f"{1 - args.lmbda:g} of the batches is to be trained on them"
            )
        return tokenize_completions(
            found, self.tokenizer_in_use, max_length=args.max_length, num_proc=args.dataset_num_proc, name=name,
            responses_as_written=args.responses_as_written, assistant_only_loss=args.assistant_only_loss,
        )  # fmt: skip

    # the teacher

    def _set_teacher(self, given: Any, fresh_adapters: bool) -> None:
        student = self.accelerator.unwrap_model(self.model)
        model, source = teachers.load_teacher(given, self.args)
        if model is None and not is_peft(student):
            raise ValueError(f"teacher_model: got None, want {teachers.WANT}")
        if model is not None and inner_model(model) is inner_model(student):
            raise ValueError("teacher_model: got the student itself, want another model")
        if model is None and models.read_head(inner_model(student)).weight.requires_grad:
            raise ValueError("teacher_model: got None with a head that trains, want a teacher of its own")
        if model is not None:
            ready_reference(model.to(self.args.device), self.data_collator, disable=True)
        self.teacher = Reference.of(student, model, fresh_adapters=fresh_adapters, keep_copy=True)
        own, head = super().head(), models.read_head(inner_model(model if model is not None else student))
        teachers.check_transform(own, head)
        self.vocabulary = teachers.common_vocabulary(
            own, head, self.tokenizer_in_use, source, self.args.trust_remote_code
        )
        if model is not None:
            self.teacher.own = self.place_frozen(model, in_steps=self._runs_teacher())
        self._teacher_head: models.Head | None = None

    def _runs_teacher(self) -> bool:
        """Whether the teacher runs in training, for samples or for all completions."""
        return not self.args.cache_teacher or self.args.lmbda > 0

    @property
    def teacher_model(self) -> Any:
        """The teacher, or None where it is the student without adapters, or was freed when its states were cached."""
        return self.teacher.own

    def head(self) -> models.Head:
        """The student's head, with the tokens that the teacher has too."""
        head = super().head()
        return head if self.vocabulary is None else teachers.cut(head, self.vocabulary)

    def teacher_head(self) -> models.Head:
        """The teacher's head, with the tokens that the student has too."""
        if self._teacher_head is not None:
            return self._teacher_head
        own = self.teacher.own
        model = self.inner if own is None else inner_model(self.accelerator.unwrap_model(own))
        assert self.vocabulary is not None
        return teachers.cut(models.read_head(model), self.vocabulary)

    def before_part(self, model: Any, part: dict[str, Any]) -> None:
        """Adds the teacher's hidden states of the `head_rows`: cached ones, or those of its forward."""
        if "teacher_hidden" in part:
            part["teacher_hidden"] = at_head_rows(part["teacher_hidden"], part)
            return
        if self._teacher_head is not None:
            raise ValueError(
                "eval_dataset: got prompts alone, or one that came after the teacher was freed; want completions, in "
                "the constructor's data, or cache_teacher=False"
            )
        with self.teacher.model() as teacher:
            wrapped = model if self.teacher.own is None else teacher
            part["teacher_hidden"] = self.inside(wrapped, lambda: head_hidden(teacher, part))

    # its cache

    def with_teacher(self, dataset: Any, name: str) -> Any:
        """The data set with the places of the teacher's hidden states in a cache, which is filled where it is not.

        Prompts alone have none: they are answered anew in every evaluation.
        """
        if isinstance(dataset, Mapping):
            return {key: self.with_teacher(value, key) for key, value in dataset.items()}
        if dataset is None:
            return None
        if not hasattr(dataset, "select"):
            raise ValueError("cache_teacher: got True with an IterableDataset, want a Dataset, or False")
        sizes = [self.data_collator.scored_rows(example) for example in dataset]
        if not any(sizes):
            return dataset
        cache = self._cache(dataset, sizes)
        if cache.folder.name not in self.data_collator.caches:
            cache.check_space()
            self._say_size(cache, name, sum(sizes))
            self._fill(cache, dataset, name)
            self.data_collator.caches[cache.folder.name] = cache
        dataset = dataset.add_column("teacher_row", list(range(len(dataset))))
        return dataset.add_column("teacher_cache", [cache.folder.name] * len(dataset))

    def _cache(self, dataset: Any, sizes: list[int]) -> HiddenCache:
        head = self.teacher_head()
        dtype = teachers.stored_dtype(self.args.teacher_cache_dtype, self._autocast_dtype(), head.weight)
        columns = [c for c in ("prompt_ids", "completion_ids", "completion_mask") if c in dataset.column_names]
        settings = ["hidden", self.accelerator.mixed_precision, dtype]
        key = fingerprint(self.teacher, dataset, columns, settings)
        folder = self.args.teacher_cache or models.cache_folder() / "teacher"
        return HiddenCache(Path(folder), key, sizes, head.weight.shape[1], dtype)

    def _autocast_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)

    def _say_size(self, cache: HiddenCache, name: str, rows: int) -> None:
        if self.is_world_process_zero():
            print(
                f"The teacher's hidden states of the {name} data: {rows:,} tokens x {cache._columns:,} in "
                f"{str(cache.dtype).removeprefix('torch.')}, {cache.nbytes / 2**20:,.1f} MiB in {cache.folder}",
                flush=True,
            )

    def _fill(self, cache: HiddenCache, dataset: Any, name: str) -> None:
        title = f"hidden states of the {name} data"
        with Progress(title, len(dataset), self.args.disable_tqdm) as advance, self.teacher.model() as model:
            model.to(self.args.device)
            fill_cache(
                cache, dataset, lambda examples: self._hidden_of(model, examples, cache.dtype),
                tokens=self.args.teacher_tokens, rank=self.args.process_index, world=self.args.world_size,
                progress=advance, joined=torch.cat,
            )  # fmt: skip
        self.accelerator.wait_for_everyone()
        cache.check_complete()

    def _hidden_of(self, model: Any, examples: list[dict[str, Any]], dtype: torch.dtype) -> list[Tensor]:
        part = to_device(self.data_collator.part(examples), self.args.device)
        with self.accelerator.autocast():
            hidden = scored_hidden(model, part)
        return list(hidden.to(dtype).cpu().split(part["sizes"]))

    def _free_teacher(self) -> None:
        """Keeps the head alone of a teacher that runs no more."""
        if self.teacher.own is not None and not self._runs_teacher():
            self._teacher_head = teachers.kept_head(self.teacher_head())
            self.teacher.own = None

    def ready_for_evaluation(self, dataset: Any) -> Any:
        return self.with_teacher(dataset, "evaluation") if self.args.cache_teacher and self._runs_teacher() else dataset

    # samples

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """The batches of one update. The student answers the prompts of a share `lmbda` of them."""
        self._batches = 0
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._batches = None

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self._evaluated = 0  # every evaluation has the same random numbers
        return super().evaluation_loop(*args, **kwargs)

    def _without_fillers(self, batch: Any, last: bool = True) -> Any:
        kept = batch["kept"].examples
        batch = super()._without_fillers(batch, last)
        examples = kept[: sum(part["examples"] for part in batch["parts"])]
        training = self._batches is not None
        if self._batches is not None:
            number, self._batches = self._numbered(self._batches), self._batches + 1
            on_policy = random.Random(f"{self.args.seed} {number}").random() < self.args.lmbda
        else:
            number, self._evaluated = EVALUATION + self._evaluated, self._evaluated + 1
            on_policy = not any(example["completion_ids"] for example in examples)
        if not on_policy:
            return batch
        answered, responses = self._answered(examples, number, training)
        self._count_completions(responses, training, batch.get("real", True))
        found = self.data_collator(answered)
        found.pop("kept")
        if "real" in batch:
            found["real"] = batch["real"]
            for part in found["parts"]:
                part["real"] = batch["real"]
        return found

    def _numbered(self, batch: int) -> int:
        """A batch's number in the run, the same on every rank: it decides whether and how the batch is answered."""
        return self.state.global_step * self.args.gradient_accumulation_steps + batch

    def _answered(
        self, examples: list[dict[str, Any]], number: int, training: bool
    ) -> tuple[list[dict[str, Any]], list[Sampled]]:
        """The examples with the student's completions in place of their own, and these as they were sampled."""
        args, k = self.args, self.args.num_generations if training else 1
        first = (number * args.world_size + args.process_index) * args.train_batch_size
        items = [(first + i, response) for i in range(len(examples)) for response in range(k)]
        prompts = [list(example["prompt_ids"]) for example in examples for _ in range(k)]
        sampler = ModelSampler(self.inner, self.tokenizer_in_use, len(items))
        with models.evaluating(self.model), self.accelerator.autocast():
            responses = sampler(prompts, sampling_of(args), items)
        return [self._example(*both) for both in zip(prompts, responses, strict=True)], responses

    def _example(self, prompt: list[int], response: Sampled) -> dict[str, Any]:
        ids = response.ids
        if self.args.max_length is not None:
            ids = ids[: max(0, self.args.max_length - len(prompt))]
        return {"prompt_ids": prompt, "completion_ids": ids, "length": len(prompt) + len(ids)}

    def _count_completions(self, responses: list[Sampled], training: bool, real: bool) -> None:
        responses = responses if real else []
        sums, number = self._sums["train" if training else "eval"], float(len(responses))
        ended = [float(len(r.ids)) for r in responses if r.finished]
        totals = {
            "completions/mean_length": (sum(len(r.ids) for r in responses), number),
            "completions/clipped_ratio": (number - len(ended), number),
            "completions/mean_terminated_length": (sum(ended), float(len(ended))),
        }
        for name, (total, count) in totals.items():
            sums.add(name, torch.full((), float(total), device=self.args.device), count)

    # the loss

    def nll_tokens(self, part: Mapping[str, Any]) -> int:
        return sum(part["sizes"])

    def part_loss(self, part: Mapping[str, Any], items: Items) -> Tensor:
        """The divergence summed over the part's tokens, over the number of tokens in its share of the update."""
        (hidden, _), head = self.scored(part), self.head()
        cast = torch.is_autocast_enabled(hidden.device.type)
        ref_hidden, ref_weight, ref_bias = teachers.matched(part["teacher_hidden"], self.teacher_head(), head, cast)
        labels, scored = head_labels(part)
        direction, beta = self.args.divergence
        found = linear_token_kl(
            hidden, head.weight, ref_hidden, ref_weight, labels, head.bias, ref_bias, direction=direction, beta=beta,
            temperature=self.args.temperature, scored_rows=scored, **head.options(),
        )  # fmt: skip
        total, tokens = by_sequence(found.kl, part).sum(), float(sum(part["sizes"]))
        assert found.logps is not None and found.ref_logps is not None
        self.metrics.add("logps/student", by_sequence(found.logps, part).sum(), tokens)
        self.metrics.add("logps/teacher", by_sequence(found.ref_logps, part).sum(), tokens)
        self.add_loss(total, tokens)
        self._add_statistics(hidden, head, part, tokens)
        self.count_tokens(part)
        return total / items.tokens_tensor(part["examples"], total.device).clamp(min=1e-6)

    def _add_statistics(self, hidden: Tensor, head: models.Head, part: Mapping[str, Any], tokens: float) -> None:
        found = self.measured(hidden, head, part, differentiable=False) if self.measuring() else None
        if found is not None and found.entropy is not None and found.is_top1 is not None:
            self.metrics.add("entropy", found.entropy.sum(), tokens)
            self.metrics.add("mean_token_accuracy", found.is_top1.sum(), tokens)
