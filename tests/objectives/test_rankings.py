"""Rewards of several responses to a prompt: all pairs, and the Plackett-Luce likelihood."""

from __future__ import annotations

import math

import pytest
import torch
from support import DEVICE
from torch import Tensor

from fastpref import BradleyTerryLoss

pytestmark = pytest.mark.usefixtures("backend")


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def tensor(*values, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def test_worked_values():
    """Two prompts and a lone response: 1 / C(3, 2) = 1/3 a pair of the first, 1 of the second, the mean of two."""
    rewards, ranks, group = [1.0, 0.0, 2.0, -1.0, 0.5, 9.0], [1, 2, 0, 5, 4, 0], [7, 7, 7, -3, -3, 8]
    pairs = (softplus(-(2.0 - 1.0)) + softplus(-(2.0 - 0.0)) + softplus(-(1.0 - 0.0))) / 3
    want = (pairs + softplus(-(0.5 - -1.0))) / 2
    r, g, k = tensor(*rewards), torch.tensor(group, device=DEVICE), torch.tensor(ranks, device=DEVICE)
    out = BradleyTerryLoss().from_rankings(r, k, g)
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    assert sorted(out.margins.tolist()) == [1.0, 1.0, 1.5, 2.0] and out.accuracies.tolist() == [1] * 4
    e = math.exp
    first = math.log(e(2) + e(1) + e(0)) - 2 + math.log(e(1) + e(0)) - 1
    want = (first + softplus(-1.5)) / 2
    assert BradleyTerryLoss().from_rankings(r, k, g, "plackett_luce").loss.item() == pytest.approx(want, rel=1e-12)


def test_tied_pairs_are_not_compared():
    r, k = tensor(1.0, 0.0, 3.0).requires_grad_(), torch.tensor([0, 1, 1], device=DEVICE)
    out = BradleyTerryLoss(0.5).from_rankings(r, k, torch.zeros(3, dtype=torch.long, device=DEVICE))
    want = (softplus(-1.0) + 0.5 * 1 + softplus(2.0) + 0.5 * 16) / 3
    assert out.loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("method", ["pairs", "plackett_luce"])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_pairs_of_two_are_bradley_terry(method, center):
    r_w, r_l = torch.randn(2, 6, device=DEVICE, dtype=torch.float64)
    ranks = torch.arange(2, device=DEVICE).repeat_interleave(6)
    group = torch.randperm(6, device=DEVICE).repeat(2)
    loss_fn = BradleyTerryLoss(center)
    out = loss_fn.from_rankings(torch.cat([r_w, r_l]), ranks, group, method)
    torch.testing.assert_close(out.loss, loss_fn(r_w, r_l).loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["pairs", "plackett_luce"])
def test_order_and_gradcheck(method):
    group = torch.tensor([4, 2, 4, 9, 2, 4, 2, 2], device=DEVICE)
    ranks = torch.tensor([3, 0, 1, 5, 2, 2, 7, 1], device=DEVICE)
    rewards = torch.randn(8, device=DEVICE, dtype=torch.float64, requires_grad=True)
    loss_fn = BradleyTerryLoss(0.1)
    order = torch.randperm(8, device=DEVICE)
    here = loss_fn.from_rankings(rewards, ranks, group, method).loss
    there = loss_fn.from_rankings(rewards[order], ranks[order], group[order], method).loss
    torch.testing.assert_close(here, there, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(
        lambda r: loss_fn.from_rankings(r, ranks, group, method).loss, (rewards,), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("method", ["pairs", "plackett_luce"])
def test_nothing_to_compare_is_a_differentiable_zero(method):
    rewards = torch.randn(3, device=DEVICE, requires_grad=True)
    positions = torch.arange(3, device=DEVICE)
    out = BradleyTerryLoss(0.1).from_rankings(rewards, positions, positions, method)
    out.loss.backward()
    assert out.loss.item() == 0 and rewards.grad.tolist() == [0, 0, 0] and out.margins.shape == (0,)


def _index(*values):
    return torch.tensor(values, device=DEVICE)


TWO = torch.zeros(2, device=DEVICE)
ERRORS = [
    (
        lambda f: f.from_rankings(TWO, _index(0, 1), _index(1)), ValueError,
        "group: got shape (1,), want (2,) (one per response)",
    ),
    (
        lambda f: f.from_rankings(TWO, _index(0, 1), _index(1, 1), "best"), ValueError,
        "method: got 'best', want one of pairs, plackett_luce, rao_kupper, davidson",
    ),
    (
        lambda f: f.from_rankings(TWO[:0], TWO[:0], _index(0)[:0]), ValueError,
        "rewards: got no responses, want at least 1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[message.split(",")[0] for *_, message in ERRORS])
def test_errors(wrong, kind, message):
    with pytest.raises(kind) as error:
        wrong(BradleyTerryLoss())
    assert str(error.value) == message
