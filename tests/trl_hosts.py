"""TRL's own trainers on a tiny model: what they train on, and a record of what they did."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import os
import shutil
import tempfile
import warnings
from typing import Any, NamedTuple

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from fastpref import models
from fastpref.objectives.paired import DPO_LOSS_TYPES
from tests.support import relative_error

QUESTIONS = ["Name a colour.", "Two and two?", "And two more?", "Say hello to the world."]
# two or three tokens each: the last bit of a longer completion's log-prob is 1e-6 of a loss
GOOD = ["Blue", "Four", "Six", "Hello world"]
BAD = ["Blue or red", "Five", "I know", "Bye"]
TEXTS = QUESTIONS + GOOD + BAD
WIDTH = 64  # of models.tiny
CHECKPOINTS = "TRL_HOSTS_CHECKPOINTS"  # of seeds 0 and 1, for ranks: only the first of them would save its own
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}


def loss_types() -> list[str]:
    """Those of ours that TRL's `DPOTrainer` has too."""
    from trl.trainer import dpo_trainer

    found = [name for name in DPO_LOSS_TYPES if f'"{name}"' in inspect.getsource(dpo_trainer)]
    assert len(found) >= 15
    return found


def dataset(method: str) -> Dataset:
    if method == "sft":
        return Dataset.from_dict({"prompt": QUESTIONS, "completion": GOOD})
    if method in ("grpo", "rloo", "online_dpo"):
        return Dataset.from_dict({"prompt": QUESTIONS})
    if method == "prm":
        steps = [[good, bad] for good, bad in zip(GOOD, BAD, strict=True)]
        return Dataset.from_dict({"prompt": QUESTIONS, "completions": steps, "labels": [[True, False]] * 4})
    if method == "kto":
        answers, labels = GOOD[:2] + BAD[2:], [True, True, False, False]
        return Dataset.from_dict({"prompt": QUESTIONS, "completion": answers, "label": labels})
    return Dataset.from_dict({"prompt": QUESTIONS, "chosen": GOOD, "rejected": BAD})


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [len(text) % 7 + text.count("e") for text in completions]


def trainer_class(method: str) -> tuple[Any, Any]:
    import trl

    if method == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOTrainer, CPOConfig
    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    if method == "online_dpo":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        return OnlineDPOTrainer, OnlineDPOConfig
    name = "Reward" if method == "reward" else method.upper()
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


GENERATION = {"max_completion_length": 6, "num_generations": 2, "beta": 0.05}
DEFAULTS = {
    "grpo": GENERATION,
    "rloo": GENERATION,
    "online_dpo": {"max_new_tokens": 6},
    "cpo": {"max_length": 64},
    "orpo": {"max_length": 64},
}


@functools.cache
def checkpoint(seed: int = 0) -> str:
    """A folder with `models.tiny`: trainers load their references from where the model came from."""
    if CHECKPOINTS in os.environ:
        return os.environ[CHECKPOINTS].split(os.pathsep)[seed]
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for part in models.tiny(TEXTS, seed):
        part.save_pretrained(folder)
    return folder


class Record(NamedTuple):
    losses: list[float]
    gradients: list[dict[str, Tensor]]  # of every update
    parameters: dict[str, Tensor]
    logs: list[dict[str, float]]


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def build(method: str, folder: Any, *, model: Any = None, peft: Any = None, **options: Any) -> Any:
    """A trainer of TRL as a user builds it: fp32, SGD, two examples a step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer, config = trainer_class(method)
    model = AutoModelForCausalLM.from_pretrained(checkpoint()) if model is None else model
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 2, "optim": "sgd",
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    extra = {"reward_funcs": reward} if method in ("grpo", "rloo", "online_dpo") else {}
    if peft is not None:
        extra["peft_config"] = peft
    elif method in ("dpo", "kto", "online_dpo"):
        extra["ref_model"] = AutoModelForCausalLM.from_pretrained(checkpoint(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = config(**{**settings, **DEFAULTS.get(method, {}), **options})
    return trainer(model=model, args=args, train_dataset=dataset(method), processing_class=tokenizer, **extra)


def train(method: str, folder: Any, patch: Any = contextlib.nullcontext, **options: Any) -> Record:
    """Trained under `patch()`, from the same weights and seed every time."""
    with patch():
        torch.manual_seed(0)
        trainer = build(method, folder, **options)
        recorder, losses, step = Recorder(), [], trainer.training_step
        trainer.add_callback(recorder)

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            loss = step(*args, **kwargs)
            losses.append(float(loss))
            return loss

        trainer.training_step = recorded
        trainer.train()
        parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        return Record(losses, recorder.gradients, parameters, trainer.state.log_history[:-1])


def operations(function: Any) -> int:
    """Floating-point operations of the two-dimensional matrix products that really run: a Linear's, and a head's."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        function()
    total = 0
    for event in trace.events():
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            (n, k), (_, m) = event.input_shapes[first : first + 2]
            total += 2 * n * k * m
    return total


def head_rows(model: Any, ids: Tensor, mask: Tensor, step: Any) -> float:
    """How many rows of hidden states met the head in products of a step: beyond what the backbone alone costs."""
    backbone = operations(lambda: models.hidden_states(model, ids, mask).sum().backward())
    return (operations(step) - backbone) / (2 * WIDTH * models.inner_model(model).config.vocab_size)


def assert_same(got: Record, want: Record) -> None:
    """Losses within 1e-6, gradients within 1e-5, of their sizes."""
    for a, b in zip(got.losses, want.losses, strict=True):
        assert abs(a - b) <= max(1e-6 * abs(b), 1e-6)
    for step, (found, expected) in enumerate(zip(got.gradients, want.gradients, strict=True)):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= 1e-5, f"gradient of {name} in step {step}"
    for name, value in want.parameters.items():
        assert relative_error(got.parameters[name], value) <= 1e-6, name
    for found, expected in zip(got.logs, want.logs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, float) and "runtime" not in name and "time" not in name:
                assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name
