"""What makes Triton's interpreter faster in these tests (tests/interpreter.py) changes no bit of a result."""

from __future__ import annotations

import os

import interpreter
import pytest
import torch

import fastpref

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")


def results() -> list[torch.Tensor]:
    """Of kernels that call device functions, reduce, scan and branch."""
    torch.manual_seed(0)
    logits, other = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70)
    labels, found = torch.tensor([69, -100, 3]), []
    fastpref.set_backend("triton")
    try:
        for dtype in (torch.float32, torch.float16, torch.float64):
            z = logits.to(dtype)
            found += [fastpref.token_logprobs(z, labels), fastpref.token_kl(z, other.to(dtype))]
        pairs = fastpref.DPOLoss(loss_type="aot")(*torch.randn(4, 5).unbind())
    finally:
        fastpref.set_backend("auto")
    gradient = torch.autograd.grad(sum(x.double().sum() for x in found), logits)
    return [x.detach() for x in (*found, pairs.loss, pairs.margins, *gradient)]


def test_no_bit_depends_on_it(monkeypatch):
    runtime = pytest.importorskip("triton.runtime.interpreter")
    if not interpreter.ORIGINALS:
        pytest.skip("this Triton's interpreter runs as it is")
    fast = [*results(), *results()]
    for name, original in interpreter.ORIGINALS.items():
        monkeypatch.setattr(runtime, name, original)
    assert all(torch.equal(a, b) for a, b in zip(fast, 2 * results(), strict=True))


def test_the_language_is_as_it_was_after_a_kernel():
    language = triton.language
    results()  # a process's first kernel leaves `__repr__` on tensors, in Triton's own interpreter too
    before = {owner: dict(vars(owner)) for owner in (language, language.tensor, language.math, language.dtype)}
    results()
    assert before == {owner: dict(vars(owner)) for owner in before}
    assert language.core.is_builtin(language.load)
