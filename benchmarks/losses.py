"""Suite: the losses alone, on sequence log-probs `[2B]`. Ours launch one kernel forward and one backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastpref
from benchmarks.suite import Results, Suite, Task
from fastpref import reference

LOSSES: dict[str, Callable[[], Any]] = {
    "dpo": fastpref.DPOLoss,
    "ipo": fastpref.IPOLoss,
    "simpo": fastpref.SimPOLoss,
    "orpo": fastpref.ORPOLoss,
    "kto": fastpref.KTOLoss,
}


class Case(NamedTuple):
    loss: str
    pairs: int

    @property
    def label(self) -> str:
        return f"{self.loss}, {self.pairs} pairs"


class _Inputs(NamedTuple):
    """The inputs, each `[2B]` except `z0`."""

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    desirable: Tensor
    z0: Tensor


def _inputs(case: Case, device: torch.device) -> _Inputs:
    torch.manual_seed(0)
    sequences = 2 * case.pairs
    lengths = torch.randint(50, 500, (sequences,), device=device)
    logps = -2.0 * lengths
    refs = logps + torch.randn(sequences, device=device)
    z0 = torch.full((), 0.2, device=device)
    return _Inputs(logps, refs, lengths, torch.arange(sequences, device=device) < case.pairs, z0)


def _eager(name: str, logps: Tensor, x: _Inputs) -> Tensor:
    """The formulas of the specification, with the metrics that every trainer logs."""
    loss = LOSSES[name]()
    refs = x.ref_logps.to(logps.dtype)
    if name == "kto":
        reference.unpaired_metrics(logps.detach(), refs, loss.objective)
        return reference.unpaired_loss(logps, refs, x.desirable, x.z0.to(logps.dtype), loss.objective)
    chosen, rejected = logps.chunk(2)
    ref_chosen, ref_rejected = refs.chunk(2) if loss.with_reference else (None, None)
    rest = (ref_chosen, ref_rejected, *x.lengths.to(logps.dtype).chunk(2), loss.objective)
    reference.paired_metrics(chosen.detach(), rejected.detach(), *rest)
    return reference.paired_loss(chosen, rejected, *rest)


def _fused(name: str, logps: Tensor, x: _Inputs) -> Tensor:
    loss = LOSSES[name]()
    if name == "kto":
        return loss(logps, x.desirable, x.ref_logps, x.z0).loss
    halves = x.ref_logps.chunk(2) if loss.with_reference else (None, None)
    return loss(*logps.chunk(2), *halves, *x.lengths.chunk(2)).loss


def build(case: Case, device: torch.device) -> Task:
    x = _inputs(case, device)

    def step(loss: Callable[..., Tensor], logps: Tensor) -> Results:
        logps = logps.detach().requires_grad_()
        value = loss(logps=logps, x=x)
        value.backward()
        assert logps.grad is not None
        return {"loss": value.detach(), "d_logps": logps.grad}

    def call(loss: Callable[..., Tensor]) -> Callable[[], Results]:
        return functools.partial(step, loss, x.logps)

    fused, eager = functools.partial(_fused, case.loss), functools.partial(_eager, case.loss)
    makers = {
        "fastpref": lambda: call(fused),
        "eager": lambda: call(eager),
        "eager_compiled": lambda: call(torch.compile(eager)),
    }
    # log-probs, the reference's and lengths read, gradients written
    size = 2 * case.pairs * (4 + 4 + 8 + 4)
    return Task(case.label, torch.float32, makers, lambda: step(eager, x.logps.double()), bytes=size)


CASES = {
    "small": [Case("dpo", 2)],
    "quick": [Case(name, 32) for name in ("dpo", "kto")],
    "cpu": [Case(name, 64) for name in LOSSES],
    "cuda": [Case(name, pairs) for name in LOSSES for pairs in (8, 256)],
}
SUITE = Suite("losses", "The losses on sequence log-probs, forward + backward", build, CASES, memory=False)
