"""In half precision, losses and gradients as near to fp64 of the same model as the host's own: TRL's trainers under the
patch, our trainers beside TRL's, over draws of the weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)

import transformers
import trl_hosts
from support import DEVICE, relative_error
from torch import Tensor
from trl_hosts import checkpoint, dataset

from fastpref import trainers
from fastpref.integrations import trl as fast_trl

DRAWS = 12  # of one draw, the ratio of the two errors is anything from 0.5 to 2
LIMIT = 1.1
FP32 = 1e-6  # the rounding of a loss that is a difference of terms of size 1, as GRPO's is
SCALE = 1024.0  # of the loss, as a GradScaler has it in fp16
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16, "weights": torch.bfloat16}
TRL = ("dpo", "kto", "sft", "grpo", "rloo", "cpo", "orpo", "online_dpo")
OURS = ("DPO", "KTO", "CPO", "ORPO", "Reward")
ALL = os.environ.get("FASTPREF_MATRIX") == "all"  # `make matrix`
# bf16 is everybody's default
CASES = [(m, p) for m in TRL for p in HALVES if ALL or p == "bf16" or m in ("dpo", "grpo")]
OUR_CASES = [(n, p) for n in OURS for p in HALVES if ALL or (p == "bf16" and n in ("DPO", "CPO", "Reward"))]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def _left_as_it_was():
    yield
    fast_trl.unpatch()


class Side:
    """A trainer and a batch of it: the loss and its gradients, with given weights, in a precision."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = next(iter(trainer.get_train_dataloader()))
        if type(trainer).__name__ == "OnlineDPOTrainer":  # whose own step samples: sequences as it samples them
            ids = torch.randint(3, 300, (4, 14), device=DEVICE)
            self.inputs = tuple(x for part in ids.split([6, 8], 1) for x in (part, torch.ones_like(part)))
        else:
            self.inputs = trainer._prepare_inputs(batch)

    def loss(self) -> Tensor:
        if isinstance(self.inputs, tuple):
            chosen, rejected = self.trainer._forward(self.trainer.model, *self.inputs).sum(1).chunk(2)
            return -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        return self.trainer.compute_loss(self.trainer.model, self.inputs)

    def models(self) -> list[torch.nn.Module]:
        own = getattr(self.trainer, "ref_model", None)
        own = getattr(getattr(self.trainer, "reference", None), "own", None) if own is None else own
        return [model for model in (self.trainer.model, own) if model is not None]

    def run(self, weights: list[dict[str, Tensor]], precision: str) -> tuple[float, Tensor]:
        dtype = {"fp64": torch.float64, "weights": torch.bfloat16}.get(precision, torch.float32)
        for model, values in zip(self.models(), weights, strict=True):
            model.to(dtype).load_state_dict(values)
            model.zero_grad()
        half = torch.autocast(DEVICE, HALVES[precision]) if precision in ("bf16", "fp16") else contextlib.nullcontext()
        native, self.trainer.accelerator.native_amp = self.trainer.accelerator.native_amp, False
        scale = SCALE if precision == "fp16" else 1.0
        with half:
            loss = self.loss()
        (loss * scale).backward()
        self.trainer.accelerator.native_amp = native
        gradients = torch.cat(
            [p.grad.double().flatten() for p in self.trainer.model.parameters() if p.grad is not None]
        )
        return float(loss), gradients / scale


def draws(side: Side, precision: str):
    """Of the weights, as the precision holds them."""
    first = [{name: value.clone() for name, value in model.state_dict().items()} for model in side.models()]
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        yield [{name: drawn(value, precision) for name, value in model.items()} for model in first]


def drawn(value: Tensor, precision: str) -> Tensor:
    if value.numel() > 1:
        value = value + 0.1 * value.std() * torch.randn_like(value)
    return value.to(torch.bfloat16).float() if precision == "weights" else value


def errors(wanted: tuple[float, Tensor], found: tuple[float, Tensor]) -> tuple[float, float]:
    return abs(found[0] - wanted[0]), relative_error(found[1], wanted[1])


def compared(side: Side, fast: Callable, precision: str) -> None:
    squares = torch.zeros(2, 2, dtype=torch.float64)  # of (own, ours) x (loss, gradients)
    for weights in draws(side, precision):
        wanted = side.run(weights, "fp64")
        for i, run in enumerate((side.run, fast)):
            squares[i] += torch.tensor(errors(wanted, run(weights, precision))).square()
    own, ours = (squares / DRAWS).sqrt().tolist()
    print(f"{precision}: loss {own[0]:.1e} {ours[0]:.1e} gradients {own[1]:.1e} {ours[1]:.1e}, "
          f"ratios {ours[0] / own[0]:.2f} {ours[1] / own[1]:.2f}")  # fmt: skip
    assert all(map(math.isfinite, (*own, *ours))) and own[1] > 1e-5
    assert ours[0] <= max(LIMIT * own[0], FP32) and ours[1] <= LIMIT * own[1]


def model_for(name: str) -> Any:
    kind, options = transformers.AutoModelForCausalLM, {}
    if name.lower() == "reward":
        kind, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    return kind.from_pretrained(checkpoint(), **options)


def built(method: str, folder: Any) -> Any:
    options = {"max_steps": -1, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    return trl_hosts.build(method, folder, model=model_for(method), **options)


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_trl_under_the_patch(method, precision, tmp_path) -> None:
    with fast_trl.patched():
        side = Side(built(method, tmp_path))
    packing = getattr(side.trainer, "packing", None)

    def fast(*args: Any) -> tuple[float, Tensor]:
        with fast_trl.patched():
            side.trainer.packing = packing
            try:
                return side.run(*args)
            finally:
                side.trainer.packing = None

    side.trainer.packing = None  # without, the loss is TRL's
    compared(side, fast, precision)


@pytest.mark.parametrize(("name", "precision"), OUR_CASES)
def test_our_trainers(name, precision, tmp_path) -> None:
    side = Side(built(name.lower(), tmp_path / "trl"))
    referenced = name in ("DPO", "KTO")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = getattr(trainers, f"{name}Config")(
            str(tmp_path / "ours"), use_cpu=DEVICE == "cpu", bf16=False, per_device_train_batch_size=4,
            train_sampling_strategy="sequential", **({"precompute_ref_log_probs": False} if referenced else {}),
        )  # fmt: skip
    ours = getattr(trainers, f"{name}Trainer")(
        model_for(name), args=args, train_dataset=dataset(name.lower()),
        processing_class=transformers.AutoTokenizer.from_pretrained(checkpoint()),
        **({"ref_model": transformers.AutoModelForCausalLM.from_pretrained(checkpoint(1))} if referenced else {}),
    )  # fmt: skip
    compared(side, Side(ours).run, precision)
