"""Bytes of logits that the row kernels move, counted in Triton's interpreter, against the formulas of the benchmarks.

Logits are bf16 and nothing else is, so an access of a bf16 is one of logits or of their gradient.
"""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, IGNORE

import fastpref
from benchmarks import logits as logits_suite
from benchmarks import measure
from fastpref.backends import backend_for
from fastpref.reference import LogitTransform

ROWS, VOCAB = 3, 5003  # more than one block, and odd
SLACK = 2 * ROWS * 4  # the label's logit is read again, of up to two distributions and in two passes

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")


@pytest.fixture
def traffic(monkeypatch) -> dict[str, int]:
    """Bytes of bf16 that kernels read and wrote since the counts were cleared."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, moved = interpreter.InterpreterBuilder, {"read": 0, "written": 0}

    def counted(what: str, access):
        def wrapped(self, pointers, *rest):
            mask = rest[0] if what == "read" else rest[1]
            if str(pointers.get_element_ty()) == "bf16":
                moved[what] += 2 * int(mask.data.sum())
            return access(self, pointers, *rest)

        return wrapped

    for name, what in (("create_masked_load", "read"), ("create_masked_store", "written")):
        monkeypatch.setattr(builder, name, counted(what, getattr(builder, name)))
    fastpref.set_backend("triton")
    yield moved
    fastpref.set_backend("auto")


def random_logits() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB).to(torch.bfloat16).requires_grad_()
    return logits, torch.randint(VOCAB, (ROWS,))


def passes(bytes: int) -> float:
    size = measure.row_bytes(ROWS, VOCAB, 2, 1)
    whole = round(bytes / size)
    assert abs(bytes - whole * size) <= SLACK, f"{bytes} bytes are {bytes / size:.3f} passes over the logits"
    return whole


def test_log_probs_read_once_and_their_gradient_reads_and_writes_once(traffic):
    logits, labels = random_logits()
    logps = fastpref.token_logprobs(logits, labels)
    assert (passes(traffic["read"]), traffic["written"]) == (1, 0)
    logps.sum().backward()
    assert (passes(traffic["read"]), passes(traffic["written"])) == (2, 1)
    case = logits_suite.Case("", ROWS, VOCAB, torch.bfloat16, True, ROWS)
    by_formula = logits_suite.build(case, torch.device("cpu")).bytes
    assert abs(traffic["read"] + traffic["written"] - by_formula) <= SLACK


def test_ignored_rows_are_not_read_by_the_forward(traffic):
    logits, labels = random_logits()
    labels[:2] = IGNORE
    fastpref.token_logprobs(logits.detach(), labels)
    size = measure.row_bytes(1, VOCAB, 2, 1)
    assert abs(traffic["read"] - size) <= SLACK


def test_u_in_place_reads_twice_and_writes_once(traffic):
    logits, labels = random_logits()
    logits = logits.detach()
    options = {"transform": LogitTransform(), "ignore_index": IGNORE, "write_u": True}
    backend_for(logits).row_logprob(logits, labels, **options)
    assert (passes(traffic["read"]), passes(traffic["written"])) == (2, 1)


def test_exact_kl_reads_both_once_and_its_gradient_reads_both_and_writes_once(traffic):
    policy, _ = random_logits()
    ref = torch.randn(ROWS, VOCAB).to(torch.bfloat16)
    kl = fastpref.token_kl(policy, ref)
    assert (passes(traffic["read"]), traffic["written"]) == (2, 0)
    kl.sum().backward()
    assert (passes(traffic["read"]), passes(traffic["written"])) == (4, 1)
