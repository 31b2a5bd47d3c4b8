"""What distributed tests share: training arguments, models, and the gradients and updates of a run, whole."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from fastpref import models, trainers
from tests import trl_hosts

EXAMPLES, STEPS, LEARNING_RATE = 4, 2, 0.05
LAYER = "LlamaDecoderLayer"
ZERO = {"zero2": 2, "zero3": 3}


def _shard_on_cpu_too(init: Callable) -> Callable:
    """Accelerate takes an FSDP plugin only on accelerators; all that follows from it runs on a CPU as well."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return __init__


@contextlib.contextmanager
def fresh(wrapper: str):
    """Without what Accelerate remembers of the case before."""
    if wrapper == "one":  # in the tests' own process
        yield
        return
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    init = AcceleratorState.__init__
    AcceleratorState.__init__ = _shard_on_cpu_too(init)
    backend = PartialState._prepare_backend
    if wrapper in ZERO:  # which Accelerate refuses where it is told to use a CPU, and has no backend where it is not
        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    try:
        yield
    finally:
        AcceleratorState.__init__, PartialState._prepare_backend = init, backend
        if wrapper == "fsdp2" and PartialState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()


def tiny(seed: int = 0, tied: bool = True) -> tuple[Any, Any]:
    model, tokenizer = models.tiny(trl_hosts.TEXTS, seed)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    return model, tokenizer


def classifier(seed: int = 3, labels: int = 1) -> Any:
    config = tiny()[0].config
    config.num_labels = labels
    kind = "Sequence" if labels == 1 else "Token"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"AutoModelFor{kind}Classification").from_config(config)


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None})


def options(wrapper: str, batch: int, **more: Any) -> dict[str, Any]:
    """Training arguments: no clipping, so that gradients are the loss's own; SGD, so that they stay alike."""
    found = {
        "per_device_train_batch_size": batch, "max_steps": STEPS, "optim": "sgd", "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": "none", "bf16": False,
        "save_strategy": "no", "disable_tqdm": True, "use_cpu": wrapper not in ZERO, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential", "max_length": 64,
    }  # fmt: skip
    if wrapper == "ddp":
        found["ddp_find_unused_parameters"] = False
    if wrapper == "fsdp2":
        found |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": LAYER}}
    if wrapper in ZERO:
        found["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
            "zero_optimization": {"stage": ZERO[wrapper], "stage3_gather_16bit_weights_on_model_save": True},
        }  # fmt: skip
    return found | more


def trained(trainer: Any, wrapper: str, **how: Any) -> dict[str, Any]:
    recorder = Recorder()
    trainer.add_callback(recorder)
    before = {n: whole(p) for n, p in trainer.model.named_parameters()}
    trainer.train(**how)
    named = list(trainer.model.named_parameters())
    sharded = {n for n, p in named if hasattr(p, "full_tensor") or hasattr(p, "ds_id")}
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if wrapper in ZERO else None
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        # under DeepSpeed an engine has them: there, what SGD made of them
        "gradients": recorder.gradients if state is None else [],
        "update": {n: (whole(p) if state is None else state[n]) - before[n] for n, p in named},
        "sharded": sharded,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def evaluated_twice(trainer: Any, data: Any, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and evaluations of a data set and of a stream of the same data."""
    evaluations = [trainer.evaluate(part) for part in (data, data.to_iterable_dataset())]
    timed = ("_runtime", "_per_second", "_time")
    return found | {"evaluations": [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in evaluations]}


class SameBlocksKTO(trainers.KTOTrainer):
    """Mismatched within pairs of examples, however large the batches are: those of two ranks are one process's."""

    def _tokenized(self, dataset: Any, name: str, args: Any) -> Any:
        size, args.per_device_train_batch_size = args.per_device_train_batch_size, 2
        try:
            return super()._tokenized(dataset, name, args)
        finally:
            args.per_device_train_batch_size = size
