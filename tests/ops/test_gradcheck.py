"""Derivatives against finite differences of the same code, in fp64: no specification in between.

At rtol 1e-6 a gradient that is off by a factor of 1.001 fails; PyTorch's default, 1e-3, lets it pass.
"""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, IGNORE, TRANSFORMS, from_hidden, paired_batch, random_leaf
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError

from fastpref import (
    DPOLoss,
    linear_token_logprobs,
    linear_token_statistics,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)
from fastpref.objectives.paired import DPO_LOSS_TYPES

STRICT = {"rtol": 1e-6, "atol": 1e-8, "nondet_tol": 0.0}
LABELS = torch.tensor([2, IGNORE, 6], device=DEVICE)


def check(function, *leaves, **options) -> None:
    assert gradcheck(function, leaves, **STRICT, **options)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logprobs(backend, transform):
    check(lambda z: token_logprobs(z, LABELS, **TRANSFORMS[transform]), random_leaf(3, 7))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_entropy_and_logprobs_together(backend, transform):
    def both(z):
        found = token_statistics(z, LABELS, ("entropy",), **TRANSFORMS[transform])
        return found.logps, found.entropy

    check(both, random_leaf(3, 7))


def test_more_than_one_block(backend):
    """4099 derivatives a row along a random direction."""
    check(lambda z: token_logprobs(z, LABELS), random_leaf(3, 4099), fast_mode=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_linear_token_logprobs(backend, plan, transform):
    hidden, weight, bias = random_leaf(3, 2), random_leaf(7, 2), random_leaf(7)
    options = TRANSFORMS[transform] | {"plan": plan}
    if plan == "frozen":
        weight, bias = weight.detach(), bias.detach()
        check(lambda h: linear_token_logprobs(h, weight, LABELS, bias, **options), hidden)
    else:
        check(lambda h, w, b: linear_token_logprobs(h, w, LABELS, b, **options), hidden, weight, bias)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_linear_entropy_and_logprobs_together(backend, plan, transform):
    """Each with an upstream gradient of its own; the entropy alone, too."""
    leaves, options = [random_leaf(3, 2), random_leaf(7, 2), random_leaf(7)], TRANSFORMS[transform] | {"plan": plan}
    frozen = [leaf.detach() for leaf in leaves[1:]]

    def both(hidden, *head):
        weight, bias = head or frozen
        found = linear_token_statistics(hidden, weight, LABELS, bias, ("mean_logit", "entropy"), **options)
        return found.logps, found.entropy

    leaves = leaves[:1] if plan == "frozen" else leaves
    check(both, *leaves)
    check(lambda *x: both(*x)[1], *leaves)


@pytest.mark.parametrize("plan", ["store", "recompute"])
def test_entropy_over_slices_of_the_vocabulary(backend, plan):
    """257 columns in three slices."""
    hidden, weight = random_leaf(3, 2), random_leaf(257, 2)

    def both(h, w):
        found = linear_token_statistics(h, w, LABELS, None, ("entropy",), plan=plan, workspace_bytes=1)
        return found.logps, found.entropy

    check(both, hidden, weight, fast_mode=True)


def test_recompute_over_slices_of_the_vocabulary(backend):
    """257 columns in three slices."""
    hidden, weight = random_leaf(3, 2), random_leaf(257, 2)
    options = {"plan": "recompute", "workspace_bytes": 1}
    check(lambda h, w: linear_token_logprobs(h, w, LABELS, **options), hidden, weight, fast_mode=True)


@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs(average):
    labels = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, IGNORE]], device=DEVICE)
    check(lambda x: sequence_logprobs(x, labels, average=average), random_leaf(2, 3))


def far_from_kinks() -> tuple[torch.Tensor, ...]:
    """Chosen, rejected, their references: sort keys 0.25 and more apart, and hinge margins on both sides of 1."""
    columns = ([-3.0, -9.0, -6.5], [-8.0, -7.0, -5.0], [-4.0, -8.5, -8.25], [-6.5, -8.0, -7.5])
    return tuple(torch.tensor(x, dtype=torch.float64, device=DEVICE) for x in columns)


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_from_sequence_logprobs(backend, name):
    chosen, rejected, *refs = far_from_kinks()
    lengths = (torch.tensor([3, 5, 2], device=DEVICE), torch.tensor([4, 1, 6], device=DEVICE))
    loss_fn = DPOLoss(beta=0.5, loss_type=name, label_smoothing=0.1)
    check(lambda a, b: loss_fn(a, b, *refs, *lengths).loss, chosen.requires_grad_(), rejected.requires_grad_())


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "exo_pair"])
def test_divergences(backend, name, divergence):
    chosen, rejected, *refs = far_from_kinks()
    lengths = (torch.tensor([3, 5, 2], device=DEVICE), torch.tensor([4, 1, 6], device=DEVICE))
    loss_fn = DPOLoss(0.5, name, 0.1, divergence)
    check(lambda a, b: loss_fn(a, b, *refs, *lengths).loss, chosen.requires_grad_(), rejected.requires_grad_())


def small_batch(seed: int = 0):
    """Two pairs whose log-ratios are far apart, the second rejected completion empty."""
    torch.manual_seed(seed)
    batch = paired_batch((1, 2, 2, 0), vocab=5, width=2, bias=True, scale=0.5)
    batch.ref_logps.copy_(torch.tensor([-1.0, -7.0, -6.0, 0.5]))
    return batch


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_from_logits(backend, name):
    batch, loss_fn = small_batch(), DPOLoss(beta=0.5, loss_type=name, label_smoothing=0.1)
    # the interpreter takes 20 ms a call, and full mode 120 of them
    check(
        lambda z: loss_fn.from_logits(z, batch.labels, batch.ref_logps).loss,
        batch.logits(),
        fast_mode=backend == "triton",
    )


# the other plans hand their log-probs to the operator of `from_logits`: one loss shows that they meet
@pytest.mark.parametrize(
    ("plan", "name"),
    [("pair", name) for name in DPO_LOSS_TYPES] + [(plan, "sigmoid") for plan in ("store", "recompute", "frozen")],
)
def test_from_hidden(backend, name, plan):
    batch, loss_fn = small_batch(), DPOLoss(beta=0.5, loss_type=name, label_smoothing=0.1)
    leaves = [batch.hidden, batch.weight, batch.bias]
    if plan == "frozen":
        frozen = [x.detach() for x in leaves[1:]]

        def loss(h):
            return from_hidden(loss_fn, batch._replace(hidden=h, weight=frozen[0], bias=frozen[1]), plan=plan).loss

        leaves = leaves[:1]
    else:

        def loss(h, w, b):
            return from_hidden(loss_fn, batch._replace(hidden=h, weight=w, bias=b), plan=plan).loss

    check(loss, *leaves, fast_mode=backend == "triton")


def test_pairs_in_groups(backend):
    batch, loss_fn = small_batch(), DPOLoss(beta=0.5, loss_type=["sigmoid", "ipo", "sft"])

    def loss(h, w, b):
        changed = batch._replace(hidden=h, weight=w, bias=b)
        return from_hidden(loss_fn, changed, plan="pair", workspace_bytes=2 * 5 * 8).loss  # one pair fits, one not

    check(loss, batch.hidden, batch.weight, batch.bias, fast_mode=backend == "triton")


@pytest.mark.parametrize("fast_mode", [False, True])
def test_the_net_is_fine_enough(fast_mode):
    """A derivative off by a factor of 1.001 is caught."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad * ctx.saved_tensors[0].cos()

    with pytest.raises(GradcheckError):
        check(Off.apply, random_leaf(5), fast_mode=fast_mode)
