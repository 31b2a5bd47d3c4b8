"""Suite: a reward model's last steps, forward and backward: find sequence ends, the scalar head, Bradley-Terry."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastpref
from benchmarks.shapes import HEADS
from benchmarks.suite import Results, Suite, Task
from fastpref import reference

CENTER = 0.01


class Case(NamedTuple):
    name: str
    d: int
    pairs: int
    seq_len: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return f"{self.name}, {self.pairs} pairs x {self.seq_len}"


def build(case: Case, device: torch.device) -> Task:
    torch.manual_seed(0)
    sequences = 2 * case.pairs
    hidden = torch.randn(sequences, case.seq_len, case.d, device=device).to(case.dtype).requires_grad_()
    weight = (torch.randn(1, case.d, device=device) / case.d**0.5).to(case.dtype).requires_grad_()
    ends = torch.randint(case.seq_len // 2, case.seq_len, (sequences,), device=device)

    def loss_of(rewards: Tensor) -> Tensor:
        chosen, rejected = rewards.float().chunk(2)
        return reference.bradley_terry(chosen, rejected, center_coefficient=CENTER)

    def fused() -> Tensor:
        return fastpref.BradleyTerryLoss(CENTER).from_hidden(hidden, weight, ends).loss

    def eager() -> Tensor:
        rows = hidden[torch.arange(sequences, device=device), ends]
        return loss_of((rows.float() * weight.float()).sum(-1))

    def transformers() -> Tensor:
        """As AutoModelForSequenceClassification does, and TRL's RewardTrainer with it: score all, then pick."""
        scores = torch.nn.functional.linear(hidden, weight)[..., 0]
        return loss_of(scores[torch.arange(sequences, device=device), ends])

    def call(loss: Callable[[], Tensor]) -> Callable[[], Results]:
        def run() -> Results:
            hidden.grad = weight.grad = None
            value = loss()
            value.backward()
            assert hidden.grad is not None and weight.grad is not None
            return {"loss": value.detach(), "d_hidden": hidden.grad, "d_weight": weight.grad}

        return run

    def truth() -> Results:
        h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
        chosen, rejected = reference.row_scores(h, w[0], None, ends, "positions").chunk(2)
        loss = reference.bradley_terry(chosen, rejected, center_coefficient=CENTER)
        d_hidden, d_weight = torch.autograd.grad(loss, (h, w))
        return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    makers = {
        "fastpref": lambda: call(fused),
        "eager": lambda: call(eager),
        "eager_compiled": lambda: call(torch.compile(eager)),
        "transformers": lambda: call(transformers),
    }
    # one row of each sequence is read twice; the gradient of all of them is written
    size = (2 * sequences * case.d + hidden.numel()) * case.dtype.itemsize
    peaks = {"fastpref": hidden.numel() * case.dtype.itemsize}
    return Task(case.label, case.dtype, makers, truth, bytes=size, peaks=peaks)


CASES = {
    "small": [Case("small", 32, 2, 16, torch.float32)],
    "quick": [Case("smollm2-135m", HEADS["smollm2-135m"].d, 8, 512, torch.float32)],
    "cpu": [
        Case("smollm2-135m", HEADS["smollm2-135m"].d, 16, 1024, torch.float32),
        Case("llama-3-8b", HEADS["llama-3-8b"].d, 4, 512, torch.float32),
    ],
    "cuda": [
        Case("smollm2-135m", HEADS["smollm2-135m"].d, 64, 1024, torch.bfloat16),
        Case("llama-3-8b", HEADS["llama-3-8b"].d, 32, 2048, torch.bfloat16),
    ],
}
SUITE = Suite("reward", "Reward model: pooling, head, Bradley-Terry, forward + backward", build, CASES)
