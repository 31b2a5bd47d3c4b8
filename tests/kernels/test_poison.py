"""The net under every other test: memory that fastpref allocates and does not write must show."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpref
from fastpref.backends import portable
from fastpref.common import memory


def call_as(module: str, source: str, **names):
    """Evaluate an expression whose caller, as the poisoning sees it, is `module`."""
    return eval(source, {"__name__": module, "torch": torch, **names})


@pytest.mark.parametrize("module", ["fastpref.plans.plans", "fastpref_kernels.row_logprob"])
@pytest.mark.parametrize(
    "source",
    [
        "torch.empty(5, 3)",
        "torch.empty((), dtype=torch.float64)",
        "torch.empty(4, dtype=torch.bfloat16)",
        "torch.empty_like(x)",
        "torch.empty_like(x, dtype=torch.float64)",
        "x.new_empty(7)",
        "x.new_empty((2, 2), dtype=torch.float16)",
    ],
)
def test_unwritten_floats_are_nan(module, source):
    assert call_as(module, source, x=torch.ones(2, 3)).isnan().all()


def test_unwritten_integers_and_booleans_are_implausible():
    assert (call_as("fastpref.ops", "torch.empty(4, dtype=torch.int64)") > 1 << 30).all()
    assert (call_as("fastpref.ops", "torch.empty(4, dtype=torch.int32)") > 1 << 30).all()
    assert call_as("fastpref.ops", "x.new_empty(4, dtype=torch.bool)", x=torch.ones(1)).all()


def test_scratch_is_poisoned_at_every_loan():
    like = torch.ones(1)
    for _ in range(2):  # the second loan is the buffer that the first one wrote
        with memory.borrowed(8, 4, like=like) as scratch:
            assert scratch.isnan().all()
            scratch.zero_()


def test_fakes_meta_and_functional_tensors_are_left_alone():
    with FakeTensorMode():
        assert call_as("fastpref.ops", "torch.empty(3, 2)").shape == (3, 2)
    assert call_as("fastpref.ops", "torch.empty(3, device='meta')").is_meta
    functional = torch.func.functionalize(lambda x: call_as("fastpref.ops", "torch.empty_like(x)", x=x).zero_())
    assert (functional(torch.ones(3)) == 0).all()


def test_only_the_library_is_poisoned(monkeypatch):
    """`fastprefix` is somebody else."""
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *args: pytest.fail("poisoned a tensor of somebody else"))
    call_as("fastprefix.ops", "torch.empty(3)")
    call_as("torch.nn.functional", "x.new_empty(3)", x=torch.ones(1))


def test_a_backend_that_forgets_to_write_gives_nan(monkeypatch):
    monkeypatch.setattr(portable, "_fold_block", lambda *args: None)
    fastpref.set_backend("portable")
    try:
        assert fastpref.token_logprobs(torch.randn(3, 7), torch.tensor([1, 2, 3])).isnan().all()
    finally:
        fastpref.set_backend("auto")
