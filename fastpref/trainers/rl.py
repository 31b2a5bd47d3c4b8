"""What RLOO and GRPO share: rounds of samples and their rewards, buffered for several updates, saved and resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref import __version__, models
from fastpref.data import formats
from fastpref.objectives.advantages import Advantages, weighted
from fastpref.objectives.kl import AdaptiveKLController, FixedKLController
from fastpref.objectives.normalize import RewardNormalizer
from fastpref.objectives.surrogates import BatchSize
from fastpref.trainers import rl_metrics, rl_sampler
from fastpref.trainers.base import Items
from fastpref.trainers.config import unsupported
from fastpref.trainers.loading import given_args
from fastpref.trainers.reward_functions import RewardFunctions
from fastpref.trainers.rl_config import OnlineConfig
from fastpref.trainers.rl_loss import SampleLosses
from fastpref.trainers.rollouts import (
    EVALUATION,
    ModelSampler,
    RepeatSampler,
    RolloutCollator,
    Sample,
    Sampled,
    sampling_of,
    shuffled_groups,
    with_prompt_ids,
)

STATE_FILE = "rollouts-{rank}.pt"  # in a checkpoint


class OnlineTrainer(SampleLosses):
    """Samples responses, rewards them, and learns from the comparison of a prompt's samples.

    A subclass says how rewards become advantages.
    """

    config_class: type[OnlineConfig]
    data_collator: RolloutCollator
    _buffer: list[list[Sample]]
    _to_evaluate: int = EVALUATION  # prompts of the evaluation that runs

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any, train_dataset: Any, eval_dataset: Any, processing_class: Any,
        reward_processing_classes: Any, sampler: Any, heldout_funcs: Any, ref_model: Any, **options: Any,
    ) -> None:  # fmt: skip
        args = given_args(args, self.config_class, model, self.config_class.method.upper())
        if reward_funcs is None or (isinstance(reward_funcs, list | tuple) and not reward_funcs):
            raise ValueError("reward_funcs: got none, want a function (prompts, completions, ...) -> rewards, or more")
        self.rewards = RewardFunctions(reward_funcs, reward_processing_classes, args, "reward_funcs")
        self.heldout = RewardFunctions(heldout_funcs or [], None, args, "heldout_funcs")
        weights = [1.0] * len(self.rewards) if args.reward_weights is None else list(args.reward_weights)
        if len(weights) != len(self.rewards):
            raise ValueError(f"reward_weights: got {len(weights)}, want one for each of {len(self.rewards)} functions")
        self.reward_weights = torch.tensor(weights, dtype=torch.float32)
        self.controller = (
            FixedKLController(args.beta)
            if args.kl_target is None
            else AdaptiveKLController(args.beta, args.kl_target, args.kl_horizon)
        )
        self.normalizer = None
        if args.reward_normalizer is not None:
            self.normalizer = RewardNormalizer(args.reward_normalizer, args.reward_clip)
        self.sampler = sampler
        self._completions = rl_metrics.CompletionLog(
            args.output_dir, args.num_completions_to_print, args.log_unique_prompts
        )
        self._reset()
        super().__init__(
            model, ref_model, args, RolloutCollator(), train_dataset, eval_dataset, processing_class, **options
        )
        if self.is_fsdp_enabled or getattr(self.accelerator.state, "deepspeed_plugin", None) is not None:
            raise unsupported("fsdp, deepspeed", "one of them", "want DDP: samples are made with whole weights")
        for functions in (self.rewards, self.heldout):
            functions.to(self.args.device)

    # data

    def prepare_dataset(self, dataset: Any, name: str, args: Any) -> Any:
        if not hasattr(dataset, "select"):
            raise unsupported(f"{name}_dataset", "a stream", "want a Dataset: prompts are repeated and shuffled")
        if "prompt" not in dataset.column_names:
            dataset = formats.prompts(dataset)
        given = {"tokenizer": self.tokenizer_in_use, "template": args.chat_template_kwargs or {}, "name": name}
        return dataset.map(
            with_prompt_ids, with_indices=True, num_proc=args.dataset_num_proc, desc=f"tokenizing the {name} data",
            fn_kwargs=given | {"version": __version__},  # datasets finds a cached result by the function's name
        )  # fmt: skip

    def get_train_dataloader(self) -> Any:
        """Batches of records, each as large as what a rank samples at once."""
        return self._get_dataloader(
            dataset=self.train_dataset, description="Training", sampler_fn=self._get_train_sampler, is_training=True,
            batch_size=self._train_batch_size * self.args.steps_per_generation,
        )  # fmt: skip

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        args, number = self.args, len(self.train_dataset)
        block = args.generation_batch_size // args.num_generations
        if number < block:
            raise ValueError(f"train_dataset: got {number} prompts, want at least {block}, those of a generation batch")
        seed = args.seed if args.shuffle_dataset else None
        return RepeatSampler(number, args.num_generations, block, self.generate_every, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> RepeatSampler:
        return RepeatSampler(len(eval_dataset), self.args.eval_generations)

    # one update

    @property
    def generate_every(self) -> int:
        """Batches that are learnt from between two rounds of sampling."""
        return self.args.steps_per_generation * self.args.num_iterations

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Items]:  # type: ignore[override]
        """The batches of one update: samples that are there already, and new ones where it is their turn."""
        self._began = time.perf_counter()
        self.model.train()
        taken: list[list[Sample]] = []
        for _ in range(num_batches):
            try:
                records = next(epoch_iterator)
            except StopIteration:
                break
            if self._batches % self.generate_every == 0 or not self._buffer:
                self._buffer = self.sample(records)
            taken.append(self._buffer[self._batches % self.args.steps_per_generation])
            self._batches += 1
        share = len(taken) / self.args.steps_per_generation
        return [self.batch_of(s, len(taken), max(1.0, self._scored) * share) for s in taken], Items(1, 0)

    def batch_of(self, samples: Sequence[Sample], batches: int, scored: float) -> dict[str, Any]:
        """A batch of samples as the base class takes it."""
        size = BatchSize(
            len(samples), sum(s.tokens for s in samples), scored / self.args.world_size,
            self.args.max_completion_length, batches,
        )  # fmt: skip
        return self._sized(samples, size)

    def _sized(self, samples: Sequence[Sample], size: BatchSize) -> dict[str, Any]:
        parts = [part | {"batch": size} for part in self.data_collator.samples(samples)]
        return {"index": torch.arange(len(samples)), "parts": parts}

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.add_values({"step_time": torch.tensor(time.perf_counter() - self._began)})
        return loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None):
        real, world = self._real(len(inputs), self.args.eval_generations), self.args.world_size
        own = self._own(real, len(inputs))
        (samples,) = self.sample(inputs)
        size = BatchSize(real / world, self._scored / world, max(1.0, self._scored) / world,
                         self.args.max_completion_length)  # fmt: skip
        batch = self._sized(samples, size) | {"real": own > 0}
        return super().prediction_step(model, batch, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        self._evaluated, self._to_evaluate = 0, len(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _real(self, size: int, repeats: int) -> int:
        """How many of a round's responses, of all ranks, are not there because Accelerate repeats records to make the
        ranks come out even. They come first."""
        number = size * self.args.world_size
        return number if self.model.training else min(number, (self._to_evaluate - self._evaluated) * repeats)

    def _own(self, real: int, size: int) -> int:
        """How many of them are this rank's."""
        return min(size, max(0, real - self.args.process_index * size))

    # samples

    def sample(self, records: Sequence[Mapping[str, Any]]) -> list[list[Sample]]:
        """Samples a response to each of this rank's records, rewards them all, and splits them into batches."""
        training = self.model.training
        repeats = self.args.num_generations if training else self.args.eval_generations
        real = self._real(len(records), repeats)
        own = self._own(real, len(records))
        first, begin = self._first, self.args.process_index * len(records)
        numbers = [(first + slot // repeats, slot % repeats) for slot in range(begin, begin + len(records))]
        responses = self._responses(records, numbers)
        self._advance(len(records) * self.args.world_size // repeats)
        samples = [
            Sample(
                group, list(record["prompt_ids"]), list(response.ids),
                response.finished or not self.args.mask_truncated_completions, sampler_logps=_tensor(response.logps),
            )
            for (group, _), record, response in zip(numbers, records, responses, strict=True)
        ]  # fmt: skip
        completions = self._texts(records, responses)
        rewards, heldout = (
            self._everywhere(self._rewards(functions, records, completions, responses, own))[:real]
            for functions in (self.rewards, self.heldout)
        )
        if not own:  # what is repeated counts for nothing, but every rank has to run the same collectives
            samples[0].learn = False
        samples = samples[: max(1, own)]
        steps = self.args.steps_per_generation if training else 1
        batches = shuffled_groups(samples, steps, self.args.seed + first)
        with models.evaluating(self.model):
            measured = self.measure(batches, training)
        advantages = self._judge(samples, rewards, repeats, len(records))
        self._add_metrics(records, responses, rewards, heldout, advantages, measured)
        if self.args.log_completions:
            self._log_completions(records, completions, own, rewards, advantages)
        self.rewards.extras.clear()
        return batches

    @property
    def _first(self) -> int:
        """The number of the next round's first prompt."""
        return self._prompts if self.model.training else EVALUATION + self._evaluated

    def _advance(self, prompts: int) -> None:
        if self.model.training:
            self._prompts += prompts
        else:
            self._evaluated += prompts

    def _responses(self, records: Sequence[Mapping[str, Any]], numbers: Sequence[tuple[int, int]]) -> Sequence[Sampled]:
        how, prompts = sampling_of(self.args), [record["prompt_ids"] for record in records]
        if self.sampler is not None:
            if hasattr(self.sampler, "update"):
                self.sampler.update(self.accelerator.unwrap_model(self.model), self.state.global_step)
            found = list(self.sampler(prompts, how, numbers))
            return rl_sampler.checked_responses(found, len(records), self.inner.get_input_embeddings())
        with models.evaluating(self.model), torch.no_grad(), self.accelerator.autocast():
            return ModelSampler(self.inner, self.tokenizer_in_use, len(records))(prompts, how, numbers)

    def _texts(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sampled]) -> list[Any]:
        texts = self.tokenizer_in_use.batch_decode([r.ids for r in responses], skip_special_tokens=True)
        if isinstance(records[0]["prompt"], str):
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _everywhere(self, values: Tensor) -> Tensor:
        """The rows of all ranks, rank after rank."""
        return self.accelerator.gather(values.to(self.args.device)) if self.args.world_size > 1 else values

    # rewards

    def _rewards(
        self, functions: RewardFunctions, records: Sequence[Mapping[str, Any]], completions: Sequence[Any],
        responses: Sequence[Sampled], own: int,
    ) -> Tensor:  # fmt: skip
        """`[n, F]`: of the first `own` responses, and NaN for what is repeated after them."""
        found = torch.full((len(records), len(functions)), torch.nan)
        if own:
            found[:own] = functions(records[:own], completions[:own], [r.ids for r in responses[:own]], self.state)
        return found

    def _judge(self, samples: Sequence[Sample], rewards: Tensor, repeats: int, size: int) -> Advantages:
        """Gives every sample its advantage. `rewards` `[G, F]` are those of all ranks, each with `size` or fewer."""
        total = self.combined(rewards)
        if self.beta and self.args.kl_placement == "reward":
            kl = torch.zeros(size)
            kl[: len(samples)] = torch.stack([s.penalty(self.args.kl_estimator) for s in samples])
            total = total - self.beta * self._everywhere(kl)[: len(total)].to(total.device)
        advantages = self.advantages(total, rewards, repeats)
        begin = self.args.process_index * size
        for i, sample in enumerate(samples[: self._own(len(total), size)], begin):
            sample.advantage, sample.slope = float(advantages.values[i]), float(advantages.slope[i])
        return advantages

    def combined(self, rewards: Tensor) -> Tensor:
        """The weighted sum of rewards `[G, F]`, normalised where that is asked for: `[G]`."""
        total = weighted(rewards, self.reward_weights.to(rewards.device))
        known = ~total.isnan()
        if self.normalizer is not None and known.any():
            self.normalizer.train(self.model.training)
            total[known] = self.normalizer(total[known].cpu()).to(total)
        return total

    def advantages(self, total: Tensor, rewards: Tensor, repeats: int) -> Advantages:
        """Advantages from the rewards of all samples: `total` `[G]`, of each function `[G, F]`."""
        raise NotImplementedError

    # metrics

    def add_values(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Adds numbers that are the same on all ranks, or that are averaged over them."""
        for name, value in values.items():
            known = weight * (~value.isnan()).float()
            total = known * value.nan_to_num(nan=0.0)
            total, known = (x.to(self.args.device, non_blocking=True) for x in (total, known))
            self.metrics.add(name, total, known)

    def _add_metrics(
        self, records: Any, responses: Any, rewards: Tensor, heldout: Tensor, advantages: Advantages,
        measured: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Adds a round's. It weighs as much as it has responses: the last one of an evaluation may have fewer."""
        real = len(rewards)
        lengths = self._everywhere(torch.tensor([[len(r.ids), r.finished] for r in responses]))[:real]
        learnt = self._everywhere(torch.tensor([r.finished or not self.args.mask_truncated_completions
                                                for r in responses]))[:real]  # fmt: skip
        self._scored = float((lengths[:, 0] * learnt).sum())
        weights = self.reward_weights.to(rewards.device)
        for values in (
            rl_metrics.length_metrics(lengths[:, 0], lengths[:, 1].bool()),
            rl_metrics.reward_metrics(rewards, self.rewards.names, weights, advantages),
            rl_metrics.function_metrics(heldout, self.heldout.names, "heldout"), measured,
        ):  # fmt: skip
            self.add_values(values, real)
        if self.model.training:
            tokens = sum(len(r["prompt_ids"]) + len(s.ids) for r, s in zip(records, responses, strict=True))
            self.metrics.add_total("num_tokens", torch.full((), float(tokens), device=self.args.device))
            if "kl/exact" in measured and self.args.kl_target is not None:
                self.add_values({"beta": torch.tensor(self.beta)})
                if not measured["kl/exact"].isnan():  # of a round in which no response is learnt from
                    self.controller.update(float(measured["kl/exact"]), real)
        for functions in (self.rewards, self.heldout):
            for name, (total, count) in rl_metrics.logged_numbers(functions.numbers, self.args.world_size).items():
                self.metrics.add(name, torch.tensor(total), float(count))
            functions.numbers.clear()

    def _log_completions(
        self, records: Any, completions: Any, own: int, rewards: Tensor, advantages: Advantages
    ) -> None:  # fmt: skip
        begin = self.args.process_index * len(records)
        extras = {n: v for n, v in self.rewards.extras.items() if len(v) == own}
        self._completions.write(
            [
                {
                    "step": self.state.global_step, "prompt": record["prompt"], "completion": completion,
                    "rewards": dict(zip(self.rewards.names, rewards[begin + i].tolist(), strict=True)),
                    "advantage": float(advantages.values[begin + i]), **{n: v[i] for n, v in extras.items()},
                }
                for i, (record, completion) in enumerate(zip(records[:own], completions[:own], strict=True))
            ]
        )  # fmt: skip

    # checkpoints

    def _reset(self) -> None:
        self._batches = self._prompts = self._evaluated = 0
        self._scored = 0.0  # tokens of a round, over all ranks
        self._buffer = []
        for functions in (self.rewards, self.heldout):  # what an interrupted round logged
            functions.extras.clear()
            functions.numbers.clear()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._reset()
        if self.is_world_process_zero():
            rl_sampler.say_what_it_samples_from(self.sampler, self.corrects)
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves the round of samples that is being learnt from, too; a checkpoint without its end counts as none."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._batches % self.generate_every
        state = {
            "batches": self._batches, "prompts": self._prompts, "scored": self._scored, "world": self.args.world_size,
            "buffer": [[s.state() for s in some] for some in self._buffer] if unfinished else [],
            "controller": self.controller.state_dict(),
            "normalizer": None if self.normalizer is None else self.normalizer.state_dict(),
            "completions": self._completions.size,
        }  # fmt: skip
        torch.save(state, folder / STATE_FILE.format(rank=self.args.process_index))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE_FILE.format(rank=self.args.process_index)
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint: got {resume_from_checkpoint} without {path.name}, want one of "
                             "this trainer, saved with as many ranks")  # fmt: skip
        state = torch.load(path, weights_only=True)
        if state["world"] != self.args.world_size:
            raise ValueError(f"resume_from_checkpoint: got one of {state['world']} ranks, want {self.args.world_size}")
        if self.is_world_process_zero():
            rl_sampler.say_it_does_not_repeat(self.sampler)
            if path.parents[1].resolve() == self._completions.path.parent.resolve():  # not those of another run
                self._completions.cut(state.get("completions", self._completions.size))
        self._batches, self._prompts, self._scored = state["batches"], state["prompts"], state["scored"]
        self._buffer = [[Sample(**sample) for sample in some] for some in state["buffer"]]
        self.controller.load_state_dict(state["controller"])
        if self.normalizer is not None:
            with contextlib.suppress(TypeError):
                self.normalizer.load_state_dict(state["normalizer"])


def _tensor(logps: Sequence[float | None] | None) -> Tensor | None:
    return None if logps is None else torch.tensor([torch.nan if x is None else x for x in logps])
