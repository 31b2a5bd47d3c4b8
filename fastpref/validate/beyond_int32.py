"""Checks logits of more than 2^31 elements on sampled rows. An offset kept in 32 bits would show here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.validate import policy
from fastpref.validate.ideal import Ideal, Partition
from fastpref.validate.rounding import EXACT, Rounding, rounded
from fastpref.validate.run import Row, using

VOCAB, HIDDEN, SAMPLES = 262144, 128, 64
ROWS = 2**31 // VOCAB + 72
BYTES_NEEDED = 6 * ROWS * VOCAB * 2  # logits, their gradient, what the products and the sampled fp64 rows take


def _sampled(rows: int, device: torch.device) -> Tensor:
    """The first and last rows, and some between. The last ones lie beyond 2^31 elements."""
    return torch.linspace(0, rows - 1, SAMPLES, device=device).round().long().unique()


def check(device: torch.device, backends: list[str], rows: int = ROWS, vocab: int = VOCAB) -> Iterator[Row]:
    """Yields the rows of the check on each backend."""
    io = torch.bfloat16
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=g, device=device).to(io)
    weight = (torch.randn(vocab, HIDDEN, generator=g, device=device) * (2 / HIDDEN**0.5)).to(io)
    labels = torch.randint(vocab, (rows,), generator=g, device=device)
    upstream = torch.randn(rows, generator=g, device=device)
    at = _sampled(rows, device)
    for backend in backends:
        with using(backend):
            yield from _from_logits(hidden, weight, labels, upstream, at, backend)
            yield from _from_hidden(hidden, weight, labels, upstream, at, backend)


def _rows(op: str, backend: str, io: torch.dtype, got: dict, truth: dict, ideal: dict) -> Iterator[Row]:
    for name, value in got.items():
        verdict = policy.judge(value, truth[name], rounded(ideal[name], value.dtype), io)
        yield Row(op, backend, value.device.type, str(io).removeprefix("torch."), "N*V > 2^31", name, verdict)


def _from_logits(hidden, weight, labels, upstream, at, backend: str) -> Iterator[Row]:
    logits = torch.mm(hidden, weight.t()).requires_grad_()
    logps = fastpref.token_logprobs(logits, labels)
    (gradient,) = torch.autograd.grad(logps, logits, upstream)
    got = {"logps": logps.detach()[at], "d_logits": gradient[at]}
    exact = logits.detach()[at].to(EXACT).requires_grad_()
    value = reference.token_logprobs(exact, labels[at])
    truth = {"logps": value.detach(), "d_logits": torch.autograd.grad(value, exact, upstream[at].to(EXACT))[0]}
    yield from _rows("token_logprobs", backend, logits.dtype, got, truth, truth)


def _from_hidden(hidden, weight, labels, upstream, at, backend: str) -> Iterator[Row]:
    leaf = hidden.detach().requires_grad_()
    # plan `store` keeps U of all rows at once: 2^31 elements of its own
    logps = fastpref.linear_token_logprobs(leaf, weight, labels, plan="store")
    (gradient,) = torch.autograd.grad(logps, leaf, upstream)
    got = {"logps": logps.detach()[at], "d_hidden": gradient[at]}

    def differentiated(f) -> dict[str, Tensor]:
        exact = hidden[at].to(EXACT).requires_grad_()
        value = f(exact, weight.to(EXACT), labels[at])
        return {"logps": value.detach(), "d_hidden": torch.autograd.grad(value, exact, upstream[at].to(EXACT))[0]}

    ideal = Ideal(Rounding.of(hidden.dtype, hidden.device))
    yield from _rows(
        "linear_token_logprobs store", backend, hidden.dtype, got,
        differentiated(reference.linear_token_logprobs),
        differentiated(lambda h, w, y: ideal.linear_token_logprobs(h, w, y, None, Partition())),
    )  # fmt: skip
