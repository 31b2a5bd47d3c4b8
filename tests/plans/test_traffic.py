"""Launches and bytes of a training step beside the kernels: what the head's precision costs, counted."""

from __future__ import annotations

import pytest
import torch
from counting import Watch
from support import relative_error

import fastpref
from fastpref import DPOLoss
from fastpref.common import memory
from fastpref.plans import plans
from fastpref.plans.head import Head, Needs
from fastpref.plans.products import ParameterGradients
from fastpref.reference import LogitTransform

PAIRS, LENGTH, VOCAB, WIDTH = 4, 6, 512, 16
SIZE = VOCAB * WIDTH
HALF = (torch.bfloat16, torch.float16)


def inputs(dtype: torch.dtype, **weight):
    torch.manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, WIDTH, dtype=dtype).requires_grad_()
    head = (torch.randn(VOCAB, WIDTH) / 4).to(weight.get("dtype", dtype)).requires_grad_()
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH))
    return hidden, head, labels, torch.randn(2 * PAIRS)


def step(hidden, weight, labels, ref_logps, autocast=None, **options):
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        out = DPOLoss().from_hidden(hidden, weight, labels, None, ref_logps, **options)
    out.loss.backward()
    return out


# launches of forward and backward, the kernels and products among them; every row is scored, and the host knows it
@pytest.mark.parametrize(
    ("plan", "rows", "most"), [("store", None, 13), ("frozen", None, 12), ("pair", None, 19), ("pair", 12, 78)]
)
def test_launches(plan, rows, most, monkeypatch):
    fastpref.set_backend("triton")
    hidden, weight, labels, ref_logps = inputs(torch.float32)
    weight.requires_grad_(plan != "frozen")
    workspace = None if rows is None else rows * VOCAB * 4  # each of the four pairs alone
    with Watch(monkeypatch) as operators:
        step(hidden, weight, labels, ref_logps, plan=plan, workspace_bytes=workspace, scored_rows=[LENGTH] * 2 * PAIRS)
    fastpref.set_backend("auto")
    assert sum(operators.launches.values()) <= most


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plan", ["store", "pair", "recompute"])
def test_autocast_casts_the_head_once_and_its_gradient_is_fp32_at_once(plan, dtype, monkeypatch):
    values = inputs(torch.float32)
    with Watch(monkeypatch) as operators:
        step(*values, autocast=dtype, plan=plan)
    hidden, weight, *_ = values
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    casts = [x.by for x in operators.touched if x.shape == (VOCAB, WIDTH) and x.dtype == dtype and x.by == "_to_copy"]
    assert len(casts) == 2  # written by the one cast, and read for the copy of the product on a CPU
    copied_for_products = 6  # on a CPU, where they are of fp32; on CUDA they only write it
    upstream = {"pair": 8}.get(plan, 0)  # the loss's own upstream gradient: one read, one write
    peak = {torch.float16: 4}.get(dtype, 0)  # see ParameterGradients
    assert operators.moved(VOCAB, WIDTH) == SIZE * (6 + copied_for_products + upstream + peak)


def test_scaling_a_ready_gradient_makes_no_fp32_copy_of_the_head(monkeypatch):
    values = inputs(torch.bfloat16)
    with Watch(monkeypatch) as operators:
        step(*values, plan="pair")
    scaled = [x for x in operators.touched if x.by == "mul" and x.bytes >= SIZE * x.dtype.itemsize]
    assert sorted(str(x.dtype) for x in scaled) == ["torch.bfloat16", "torch.float32"]  # read once, written once
    assert values[1].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("plan", ["store", "pair", "recompute"])
def test_autocast_gives_the_gradients_of_the_cast_head(plan, dtype, backend):
    """As if the head had been cast beforehand, but for one rounding less of dW and one of the cast."""
    hidden, weight, labels, ref_logps = inputs(torch.float32)
    step(hidden, weight, labels, ref_logps, autocast=dtype, plan=plan)
    cast = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
    step(*cast, labels, ref_logps, plan=plan)
    for value, other in zip((hidden, weight), cast, strict=True):
        assert relative_error(value.grad, other.grad) <= torch.finfo(dtype).eps
    assert torch.equal(hidden.grad, cast[0].grad.float())
    exact = [x.detach().double().requires_grad_() for x in cast]
    step(*exact, labels, ref_logps.double())
    assert relative_error(weight.grad, exact[1].grad) <= 1.001 * relative_error(cast[1].grad, exact[1].grad)


def test_a_bias_of_another_precision_keeps_it():
    hidden, weight, labels, ref_logps = inputs(torch.float32)
    for plan in ("store", "pair", "recompute"):
        bias = torch.randn(VOCAB, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = DPOLoss().from_hidden(hidden, weight, labels, bias, ref_logps, plan=plan)
        out.loss.backward()
        assert bias.grad.dtype == torch.float32 and bias.grad.abs().max() > 0


class Driver:
    """Of a GPU with 80 GB, of which others may take some."""

    def __init__(self, monkeypatch) -> None:
        self.free, self.allocated, self.reserved, self.asked = 80 << 30, 0, 0, 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", self.stats)
        monkeypatch.setattr(memory, "_capacities", {})

    def mem_get_info(self, device):
        self.asked += 1
        return self.free - self.reserved, 80 << 30

    def stats(self, device):
        return {
            f"{name}_bytes": {"all": {"current": getattr(self, name)}} for name in ("allocated", "reserved")
        }  # fmt: skip


def test_the_driver_is_asked_seldom_for_memory_that_pytorch_knows(monkeypatch):
    driver, device = Driver(monkeypatch), torch.device("cuda")
    for reserved, allocated in ((0, 0), (8 << 30, 6 << 30), (70 << 30, 70 << 30), (70 << 30, 1 << 30)):
        driver.reserved, driver.allocated = reserved, allocated
        assert memory.available_bytes(device) == driver.free - allocated
    assert driver.asked == 1
    driver.free = 40 << 30  # another process took half of it
    for _ in range(memory.READINGS):
        memory.available_bytes(device)
    assert memory.available_bytes(device) == (40 << 30) - driver.allocated and driver.asked == 2


def test_an_operator_is_told_the_workspace_that_was_found():
    assert memory.Workspace(5, 5).told(None) == 5
    assert memory.Workspace(3, 5).told(None) is None and memory.Workspace(7, 7).told(7) == 7


@pytest.mark.parametrize("slices", [1, 4])
def test_hidden_gradients_are_ready_before_the_last_product_of_the_weight(slices):
    """So that ranks that share a vocabulary add them up while that product runs."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(5, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (5,))
    head, order = Head(weight, None, LogitTransform(), -100), []

    class Noting(ParameterGradients):
        def add(self, *args):
            order.append("weight")
            super().add(*args)

    workspace = 5 * (VOCAB // slices) * 4
    done = plans.forward(hidden, head, labels, "no_grad", workspace)
    needs = Needs(True, True, False)
    d_hidden = plans.backward_recompute(
        hidden, head, labels, done.logps, done.lse, plans.Upstream(torch.randn(5)), needs,
        Noting(head, needs, torch.float32), workspace, on_hidden=lambda found: order.append(found.clone()),
    )  # fmt: skip
    assert [x for x in order if isinstance(x, str)] == ["weight"] * slices
    assert torch.equal(order[-2], d_hidden) and order[-1] == "weight"
