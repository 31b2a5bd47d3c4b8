"""Suite: token log-probs from logits that already exist. It shows what the row kernels do with their bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from benchmarks import measure, peers
from benchmarks.objectives import IGNORE
from benchmarks.shapes import HEADS
from benchmarks.suite import Results, Suite, Task
from fastpref import reference


class Case(NamedTuple):
    name: str
    rows: int
    vocab: int
    dtype: torch.dtype
    backward: bool
    scored: int  # rows with a label; nothing is compacted here, the logits exist

    @property
    def label(self) -> str:
        return f"{self.name}, {'forward + backward' if self.backward else 'forward'}"


LogProbs = Callable[[Tensor, Tensor], Tensor]  # (logits [N, V], labels [N]) -> [N]


def _eager(logits: Tensor, labels: Tensor) -> Tensor:
    logps = logits.log_softmax(-1, dtype=torch.float32)
    return logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == IGNORE, 0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORE)


def _trl() -> LogProbs:
    function = peers.imported("trl.trainer.utils").selective_log_softmax

    def logps(logits: Tensor, labels: Tensor) -> Tensor:
        # it has no ignored labels: its trainers mask afterwards
        return function(logits, labels.clamp(min=0)).float().masked_fill(labels == IGNORE, 0)

    return logps


def _call(logps: LogProbs, logits: Tensor, labels: Tensor, upstream: Tensor, backward: bool) -> Callable[[], Results]:
    def forward() -> Results:
        with torch.no_grad():
            return {"logps": logps(logits, labels)}

    def both() -> Results:
        logits.grad = None
        found = logps(logits, labels)
        found.backward(upstream)
        assert logits.grad is not None
        return {"logps": found.detach(), "d_logits": logits.grad}

    return both if backward else forward


def build(case: Case, device: torch.device) -> Task:
    torch.manual_seed(0)
    logits = (2 * torch.randn(case.rows, case.vocab, device=device)).to(case.dtype).requires_grad_(case.backward)
    labels = torch.randint(case.vocab, (case.rows,), device=device)
    labels[case.scored :] = IGNORE
    upstream = torch.randn(case.rows, device=device)
    call = functools.partial(_call, logits=logits, labels=labels, upstream=upstream, backward=case.backward)

    def truth() -> Results:
        wide = logits.detach().double().requires_grad_(case.backward)
        found = reference.token_logprobs(wide, labels)
        if not case.backward:
            return {"logps": found}
        return {"logps": found.detach(), "d_logits": torch.autograd.grad(found, wide, upstream.double())[0]}

    passes = 3 if case.backward else 1  # the logits; and again, with their gradient written
    size = measure.row_bytes(case.rows, case.vocab, case.dtype.itemsize, 1)
    makers = {
        "fastpref": lambda: call(fastpref.token_logprobs),
        "eager": lambda: call(_eager),
        "eager_compiled": lambda: call(torch.compile(_eager)),
        "torch_cross_entropy": lambda: call(_cross_entropy),
        "trl": lambda: call(_trl()),
    }
    return Task(case.label, case.dtype, makers, truth, bytes=passes * size,
                peaks={"fastpref": size if case.backward else 0})  # fmt: skip


def _cases(heads: tuple[str, ...], rows: int, dtype: torch.dtype) -> list[Case]:
    return [Case(name, rows, HEADS[name].vocab, dtype, backward, rows) for name in heads for backward in (False, True)]


CPU, GPU = ("smollm2-135m", "llama-3-8b"), ("smollm2-135m", "llama-3-8b", "qwen2.5-7b", "gemma-3-1b")
CASES = {
    "small": [Case("small", 8, 512, torch.float32, True, 8)],
    "quick": _cases(CPU[:1], 256, torch.float32),
    "cpu": [
        *_cases(CPU, 512, torch.float32),
        Case("odd vocabulary (gpt2), half masked", 512, 50257, torch.float32, True, 256),
    ],
    "cuda": [
        *_cases(GPU, 8192, torch.bfloat16),
        Case("odd vocabulary (gpt2)", 8192, 50257, torch.bfloat16, True, 8192),
        Case("llama-3-8b half masked", 8192, 128256, torch.bfloat16, True, 4096),
    ],
}
SUITE = Suite("logits", "Token log-probs from logits", build, CASES)
