"""Prompts, rewards and scripted responses for the tests of online training."""

from __future__ import annotations

import random
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

from fastpref.data.pairs import sample_pairs
from fastpref.trainers.rollouts import Sampled

QUIET = {
    "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "gradient_checkpointing": False, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2,
    "learning_rate": 1e-3, "logging_steps": 1, "max_completion_length": 12, "max_grad_norm": 0.0,
}  # fmt: skip


def prompts(number: int = 8) -> Dataset:
    rows = [{"prompt": pair.prompt[-1:], "wish": i % 3} for i, pair in enumerate(sample_pairs()[0][:number])]
    return Dataset.from_list(rows)


def length_reward(completions: Any, wish: Any, **unused: Any) -> list[float]:
    return [0.1 * len(c[0]["content"]) + w for c, w in zip(completions, wish, strict=True)]


def vowel_reward(completion_ids: Any, **unused: Any) -> list[float | None]:
    return [None if len(ids) == 3 else sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]


def scripted(number: tuple[int, int], end: int, longest: int) -> Sampled:
    """A response that depends on its numbers alone."""
    source = random.Random(repr(number))
    ids = [source.randrange(300, 1000) for _ in range(source.randrange(2, longest + 1))]
    finished = len(ids) < longest
    return Sampled([*ids[:-1], end] if finished else ids, finished, [-5.0 - 0.1 * (i % 5) for i in range(len(ids))])


class Script:
    """A sampler that answers by `scripted`."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, prompts: Any, sampling: Any, numbers: Any) -> list[Sampled]:
        return [scripted(n, self.end, sampling.max_new_tokens) for n in numbers]


class Gradients(TrainerCallback):
    """Keeps the gradients of every update."""

    def __init__(self) -> None:
        self.found: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def train(trainer: Any, **options: Any) -> list[dict[str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(**options)
    return [entry for entry in trainer.state.log_history if "loss" in entry]
