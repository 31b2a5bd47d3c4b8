"""Runs one case: the truth and the ideal once, then every backend against them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import backends
from fastpref.validate import policy
from fastpref.validate.ideal import Exact, Ideal
from fastpref.validate.inputs import Draw, Inputs
from fastpref.validate.operator import EVERYTHING, Operator, Results
from fastpref.validate.policy import Verdict
from fastpref.validate.rounding import EXACT, Rounding, rounded


class Row(NamedTuple):
    """One result of one case on one backend."""

    op: str
    backend: str
    device: str
    dtype: str
    family: str
    output: str
    verdict: Verdict


class Judged(NamedTuple):
    """What the fused results are judged against."""

    truth: Results
    ideal: Results
    conditioning: policy.Conditioning


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Sets a backend as `fastpref.set_backend` does, for the time of a `with` block."""
    before = backends._forced or "auto"
    backends.set_backend(backend)
    try:
        yield
    finally:
        backends.set_backend(before)


def _leaves(operator: Operator, x: Inputs, dtype: torch.dtype) -> Inputs:
    floats = {
        name: value.detach().to(dtype, copy=True).requires_grad_(name in operator.wrt)
        for name, value in x.floats.items()
    }
    fixed = {
        name: value.to(EXACT) if dtype == EXACT and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in x.fixed.items()
    }
    return Inputs(floats, fixed, x.transform)


def _differentiated(results: Results, upstream: Results, x: Inputs, also: list[Tensor]) -> tuple[Results, list]:
    """(results with gradients "d_<input>", gradients with respect to `also`)."""
    outputs = {name: value for name, value in results.items() if value.requires_grad}
    leaves = {name: value for name, value in x.floats.items() if value.requires_grad}
    found = {name: value.detach() for name, value in results.items()}
    if not outputs or not leaves:
        return found, []
    grads = torch.autograd.grad(
        list(outputs.values()),
        [*leaves.values(), *also],
        [upstream[name].to(value.dtype) for name, value in outputs.items()],
    )
    found |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=False)}
    return found, list(grads[len(leaves) :])


def _read(operator: Operator, spec: Exact, x: Inputs, upstream: Results) -> tuple[Results, list]:
    return _differentiated(operator.formula(spec, x), upstream, x, spec.logps if operator.wrt else [])


def judge_against(operator: Operator, x: Inputs, io: torch.dtype, device: torch.device, upstream: Results) -> Judged:
    """Computes the truth and the ideal, and how sensitive a loss is."""
    exact, ideal = Exact(), Ideal(Rounding.of(io, device))
    wide = _leaves(operator, x, EXACT)
    truth, coefs = _read(operator, exact, wide, upstream)
    best, _ = _read(operator, ideal, wide, upstream)
    count, sensitivity, noise = 0, 0.0, 0.0
    for c, logps, rounded_logps in zip(coefs, exact.logps, ideal.logps, strict=False):
        count += int((c != 0).sum())
        sensitivity += (c * logps).abs().sum().item()
        noise += (c * (rounded_logps - logps)).square().sum().item()
    return Judged(truth, best, policy.Conditioning(max(1, count), sensitivity, noise**0.5))


def _verdict(operator: Operator, family: str, io: torch.dtype, name: str, got: Tensor, judged: Judged) -> Verdict:
    truth = judged.truth[name]
    exact = name in operator.always_exact or (
        family == "integers" and (name in operator.exact or operator.exact == EVERYTHING)
    )
    if exact:
        return policy.judge_exact(got, truth)
    ideal = rounded(judged.ideal[name], got.dtype)
    if name == "loss":
        return policy.judge_loss(got, truth, ideal, judged.conditioning)
    samples = None
    if "loss" in judged.truth:
        samples = min(value.numel() for value in judged.truth.values() if value.ndim)
    return policy.judge(got, truth, ideal, io, samples)


def run_case(
    operator: Operator, family: str, io: torch.dtype, device: torch.device, backends_wanted: list[str]
) -> Iterator[Row]:
    """Yields the rows of one case: each result on each backend."""
    draw = Draw(family, io, device)
    x = operator.make(draw)
    shapes = operator.formula(Exact(), _leaves(operator, x, EXACT))
    upstream = {
        name: torch.ones_like(value, dtype=EXACT) if name == "loss" else draw.upstream(value)
        for name, value in shapes.items()
        if value.is_floating_point()
    }
    judged = judge_against(operator, x, io, device, upstream)
    for backend in backends_wanted:
        labels = (operator.name, backend, device.type, str(io).removeprefix("torch."), family)
        try:
            with using(backend):
                inputs = _leaves(operator, x, io)
                with torch.set_grad_enabled(bool(operator.wrt)):
                    got, _ = _differentiated(operator.fused(inputs), upstream, inputs, [])
        except Exception as error:  # a crash is a result too: the table goes on
            yield Row(*labels, "-", Verdict("-", float("inf"), 0.0, 0.0, False, f"{type(error).__name__}: {error}"))
            continue
        for name in judged.truth:
            if name not in got:
                yield Row(*labels, name, Verdict("-", float("inf"), 0.0, 0.0, False, "no such result"))
                continue
            yield Row(*labels, name, _verdict(operator, family, io, name, got[name], judged))
