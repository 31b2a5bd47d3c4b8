"""The fused DPO loss beside eager PyTorch on one batch: gradients first, then time and peak memory.

`python -m fastpref.commands.demo.comparison BATCH.pt WAY` is one of the fresh processes that `compare` measures in.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.common.memory import resident_bytes
from fastpref.objectives.paired import DPOLoss

REPEATS = 2  # beyond the first
_CLEAR_REFS = Path("/proc/self/clear_refs")


class HeadBatch(NamedTuple):
    """What reaches a loss: hidden states `[2B, T, d]`, head, shifted labels, reference log-probs `[2B]`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ref_logps: Tensor
    beta: float

    def to(self, device: torch.device, dtype: torch.dtype) -> HeadBatch:
        hidden, weight = (x.detach().to(device, dtype, copy=True) for x in (self.hidden, self.weight))
        return HeadBatch(hidden, weight, self.labels.to(device), self.ref_logps.to(device), self.beta)


class Measurement(NamedTuple):
    seconds: float  # forward and backward, best of 1 + REPEATS
    peak_bytes: int | None  # beyond the inputs; None where the system does not tell


def fused(batch: HeadBatch) -> Tensor:
    return DPOLoss(batch.beta).from_hidden(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps).loss


def eager(batch: HeadBatch) -> Tensor:
    """As plain PyTorch writes it: all logits, their log-softmax, the labels' entries."""
    logits = F.linear(batch.hidden, batch.weight)
    scored = batch.labels != -100
    logps = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    picked = logps.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = ((picked * scored).sum(1) - batch.ref_logps).chunk(2)
    return -F.logsigmoid(batch.beta * (chosen - rejected)).mean()


WAYS: dict[str, Callable[[HeadBatch], Tensor]] = {"eager": eager, "fused": fused}


def step(way: Callable[[HeadBatch], Tensor], batch: HeadBatch) -> tuple[Any, Any]:
    """(dH, dW) of one forward and backward."""
    batch.hidden.grad = batch.weight.grad = None
    way(batch).backward()
    return batch.hidden.grad, batch.weight.grad


def _requiring(batch: HeadBatch, trainable: bool = True) -> HeadBatch:
    batch.hidden.requires_grad_()
    batch.weight.requires_grad_(trainable)
    return batch


class GradientErrors(NamedTuple):
    """Relative L2 errors against fp64."""

    hidden: float
    weight: float


def gradient_limit(batch: HeadBatch) -> float:
    """1e-5 for the arithmetic in fp32; and a sum of n log-probs that is rounded after each of them is off by some
    sqrt(n) roundings of its size, which moves the margin and so every gradient by beta times that."""
    rounding = torch.finfo(torch.float32).eps / 2
    off = (batch.labels != -100).sum(1).sqrt() * batch.ref_logps.abs() * rounding
    return 1e-5 + batch.beta * float(off.max())


def true_gradients(batch: HeadBatch) -> tuple[Tensor, Tensor]:
    """(dH, dW) in fp64 by autograd, one pair at a time: fp64 logits of the whole batch would be large."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (batch.hidden, batch.weight))
    pairs = len(hidden) // 2
    for pair in range(pairs):
        rows = [pair, pairs + pair]
        one = HeadBatch(hidden[rows], weight, batch.labels[rows], batch.ref_logps[rows].double(), batch.beta)
        (eager(one) / pairs).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def gradient_errors(batch: HeadBatch, device: torch.device) -> dict[str, GradientErrors]:
    batch = batch.to(device, torch.float32)
    truth = true_gradients(batch)
    _requiring(batch)
    found = {}
    for name, way in WAYS.items():
        hidden, weight = (float((g - t).norm() / t.norm()) for g, t in zip(step(way, batch), truth, strict=True))
        found[name] = GradientErrors(hidden, weight)
    return found


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measure(way: Callable[[HeadBatch], Tensor], batch: HeadBatch, trainable: bool) -> Measurement:
    """In a fresh process: memory that an earlier call left with the allocator would hide what this one takes.

    The peak is that of the calls after the first, against what was there before the first: what is kept from one
    call to the next counts. The code is loaded by then.
    """
    device = batch.hidden.device
    small = HeadBatch(torch.randn(2, 2, 4), torch.randn(8, 4), torch.ones(2, 2).long(), torch.zeros(2), batch.beta)
    step(way, _requiring(small.to(device, batch.hidden.dtype), trainable))
    _requiring(batch, trainable)
    gc.collect()
    before = _memory_in_use(device)
    seconds = [_seconds(lambda: step(way, batch), device)]
    _restart_peak(device)
    seconds += [_seconds(lambda: step(way, batch), device) for _ in range(REPEATS)]
    peak = _peak_memory(device)
    return Measurement(min(seconds), None if before is None or peak is None else peak - before)


def _memory_in_use(device: torch.device) -> int | None:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes("VmRSS")


def _peak_memory(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def _restart_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def compare(batch: HeadBatch, device: torch.device) -> dict[tuple[str, bool], Measurement]:
    """(way, is the head trainable) -> its measurement, each in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.pt"
        torch.save(tuple(batch.to(torch.device("cpu"), torch.float32)), path)
        for trainable in (True, False):
            for way in WAYS:
                command = [
                    sys.executable,
                    "-m",
                    "fastpref.commands.demo.comparison",
                    str(path),
                    way,
                    str(device),
                    str(trainable),
                ]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[way, trainable] = Measurement(*json.loads(answer))
    return found


def main(path: str, way: str, device: str, trainable: str) -> None:
    batch = HeadBatch(*torch.load(path, mmap=True))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    print(json.dumps(measure(WAYS[way], batch.to(torch.device(device), dtype), trainable == "True")))


if __name__ == "__main__":
    main(*sys.argv[1:])
