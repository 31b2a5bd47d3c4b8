"""PPO, GRPO, DAPO and Dr. GRPO token losses. Worked values are computed here on floats."""

from __future__ import annotations

import math

import pytest
import torch
from support import IGNORE, TRANSFORMS, assert_exact_or_rounded, random_labels, random_leaf
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import reference

LOGPS, OLD, REF = (-1.0, -2.0, -0.3, -4.0), (-1.5, -2.1, -0.2, -3.0), (-1.2, -1.5, -0.4, -4.5)
ADVANTAGES = (2.0, -1.0, 0.5, -0.7)
LENGTHS = (1, 3)  # of the two sequences those tokens belong to


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def token_losses(low=0.2, high=0.2, beta=0.0) -> list[float]:
    """PPO's clipped surrogate and k3, token by token."""
    losses = []
    for logp, old, ref, advantage in zip(LOGPS, OLD, REF, ADVANTAGES, strict=True):
        ratio = math.exp(logp - old)
        surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        losses.append(-surrogate + beta * (math.exp(ref - logp) - (ref - logp) - 1))
    return losses


@pytest.mark.parametrize(
    ("loss_type", "normalizer", "weights"),
    [
        ("grpo", None, [1 / 2, 1 / 6, 1 / 6, 1 / 6]),
        ("bnpo", None, [1 / 4] * 4),
        ("dapo", 10.0, [1 / 10] * 4),
        ("dr_grpo", 2 * 8, [1 / 16] * 4),
    ],
)
def test_worked(backend, loss_type, normalizer, weights):
    loss_fn = fastpref.PolicyGradientLoss(0.2, 0.28, beta=0.04, loss_type=loss_type)
    out = loss_fn(
        tensor(LOGPS), torch.zeros(4, dtype=torch.long), tensor(ADVANTAGES), tensor(OLD), tensor(REF),
        cu_seqlens=torch.tensor([0, 1, 4]), normalizer=normalizer,
    )  # fmt: skip
    want = sum(w * x for w, x in zip(weights, token_losses(0.2, 0.28, 0.04), strict=True))
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    assert out.clip_fraction.item() == 0.5  # ratios 1.65 with a positive and 0.37 with a negative advantage


def batch(dtype=torch.float64, rows=(3, 6), vocab=37, width=5, frozen=False):
    labels = random_labels(rows, vocab, ignored=0.4)
    hidden, weight = random_leaf(*rows, width, dtype=dtype), random_leaf(vocab, width, dtype=dtype)
    if frozen:
        weight.requires_grad_(False)
    advantages = torch.randn(rows[0], dtype=dtype)
    logps = reference.linear_token_logprobs(hidden, weight, labels).detach()
    old, ref = (logps + torch.randn_like(logps) * 0.3 for _ in range(2))
    return hidden, weight, labels, advantages, old, ref


def specification(loss_fn, hidden, weight, labels, advantages, old, ref, transform=None, reduction="token"):
    logits = torch.nn.functional.linear(hidden, weight)
    tokens = reference.token_statistics(logits, labels, **(transform or {}))
    o = loss_fn.objective
    losses, _ = reference.policy_token_losses(
        tokens.logps.reshape(-1), old.reshape(-1), ref.reshape(-1) if o.beta else None,
        advantages[:, None].expand(labels.shape).reshape(-1), tokens.entropy.reshape(-1), o,
    )  # fmt: skip
    weights = reference.policy_token_weights(labels, None, reduction, IGNORE, None, torch.float64)
    return (losses * weights).sum()


OBJECTIVES = {
    "ppo": {},
    "kl": {"beta": 0.1},
    "entropy": {"entropy_coef": 0.02},
    "everything": {"epsilon_low": 0.1, "epsilon_high": 0.3, "beta": 0.1, "entropy_coef": 0.02},
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_entry_point_equals_specification(backend, name, transform):
    loss_fn, options = fastpref.PolicyGradientLoss(**OBJECTIVES[name]), TRANSFORMS[transform]
    hidden, weight, labels, advantages, old, ref = batch()
    truth = specification(loss_fn, hidden, weight, labels, advantages, old, ref, options)
    wanted = torch.autograd.grad(truth, (hidden, weight))
    logits = torch.nn.functional.linear(hidden, weight)
    tiles = {"workspace_bytes": 4 * 37 * 8}  # four rows at a time
    for out in (
        loss_fn.from_hidden(hidden, weight, labels, advantages, old, ref, **options, **tiles),
        loss_fn.from_logits(logits, labels, advantages, old, ref, **options),
    ):
        assert_exact_or_rounded(out.loss, truth.detach())
        for got, want in zip(torch.autograd.grad(out.loss, (hidden, weight)), wanted, strict=True):
            assert_exact_or_rounded(got, want)


def test_sequence_reduction_padded_equals_packed(backend):
    loss_fn = fastpref.PolicyGradientLoss(loss_type="grpo")
    hidden, weight, labels, advantages, old, ref = batch()
    padded = loss_fn.from_hidden(hidden, weight, labels, advantages, old, ref)
    edges = torch.arange(0, 19, 6, dtype=torch.int32)
    packed = loss_fn.from_hidden(
        hidden.reshape(-1, 5),
        weight,
        labels.reshape(-1),
        advantages,
        old.reshape(-1),
        ref.reshape(-1),
        cu_seqlens=edges,
    )
    assert torch.equal(padded.loss, packed.loss)
    truth = specification(loss_fn, hidden, weight, labels, advantages, old, ref, reduction="sequence")
    assert_exact_or_rounded(packed.loss, truth.detach())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(backend, name):
    loss_fn = fastpref.PolicyGradientLoss(**OBJECTIVES[name])
    hidden, weight, labels, advantages, old, ref = batch(rows=(2, 3), vocab=7, width=3)

    def loss(hidden, weight):
        return loss_fn.from_hidden(hidden, weight, labels, advantages, old, ref).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight), rtol=1e-6, atol=1e-8, nondet_tol=0.0)


@pytest.mark.parametrize(("frozen", "grad", "products"), [(False, True, 3), (True, True, 2), (False, False, 1)])
def test_products(backend, frozen, grad, products):
    hidden, weight, labels, advantages, old, ref = batch(frozen=frozen)
    loss_fn = fastpref.PolicyGradientLoss(beta=0.1, entropy_coef=0.1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace, torch.set_grad_enabled(grad):
        out = loss_fn.from_hidden(hidden, weight, labels, advantages, old, ref)
        if grad:
            out.loss.backward()
    done = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            done += 2 * a[0] * a[1] * b[1]
    assert done == products * 2 * int((labels != IGNORE).sum()) * 37 * 5


def test_on_policy_gradient_is_reinforce(backend):
    hidden, weight, labels, advantages, _, _ = batch()
    loss = fastpref.PolicyGradientLoss(loss_type="bnpo").from_hidden(hidden, weight, labels, advantages).loss
    logps = reference.linear_token_logprobs(hidden, weight, labels)
    reinforce = -(logps * advantages[:, None]).sum() / (labels != IGNORE).sum()
    for got, want in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, reinforce)), strict=True):
        assert_exact_or_rounded(got, want)


def test_small_coefficients_survive_fp16(device):
    """Mixing coefficients of 1e-6 into an fp16 tile flushed most of the gradient to zero."""
    hidden, weight, labels, advantages, old, ref = batch(torch.float32, rows=(2, 64), vocab=512, width=16)
    loss_fn = fastpref.PolicyGradientLoss(entropy_coef=1e-3, loss_type="dr_grpo")
    truth = loss_fn.from_hidden(hidden, weight, labels, advantages, old, ref, normalizer=1e6).loss
    halves = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    out = loss_fn.from_hidden(*halves, labels, advantages, old, ref, normalizer=1e6)
    wanted = torch.autograd.grad(truth * 2**16, (hidden, weight))
    for got, want in zip(torch.autograd.grad(out.loss * 2**16, halves), wanted, strict=True):
        assert (got.float() - want).norm() <= 5e-3 * want.norm()


def test_k3_of_a_token_that_the_policy_gave_up_is_inf_not_nan(backend):
    """expm1 was inf / inf where e^x overflows."""
    logps = torch.tensor([[-1e3, -2.0]], requires_grad=True)
    out = fastpref.PolicyGradientLoss(beta=0.1)(
        logps, torch.zeros(1, 2, dtype=torch.long), torch.ones(1), ref_logps=torch.tensor([[-1.0, -1.5]])
    )
    out.loss.backward()
    assert out.loss == float("inf") and not logps.grad.isnan().any()


def test_nothing_scored_is_a_differentiable_zero(backend):
    hidden, weight, labels, advantages, old, ref = batch()
    out = fastpref.PolicyGradientLoss(entropy_coef=0.1).from_hidden(
        hidden, weight, torch.full_like(labels, IGNORE), advantages, old, ref
    )
    out.loss.backward()
    assert out.loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss"])
def test_opcheck(backend, name):
    hidden, weight, labels, advantages, old, ref = batch(torch.float32)
    per_token = advantages[:, None].expand(labels.shape).reshape(-1).contiguous()
    weights = torch.full((18,), 0.1)
    old, ref, objective = old.reshape(-1), ref.reshape(-1), (0.2, 0.2, 0.1, 0.1)
    if name == "policy_loss":
        logps = torch.randn(18, requires_grad=True)
        arguments = (logps, logps.detach().clone().requires_grad_(), old, ref, per_token, weights, *objective)
    else:
        flat = (hidden.detach().reshape(-1, 5).requires_grad_(), weight, labels.reshape(-1), None)
        arguments = (*flat, old, ref, per_token, weights, IGNORE, 1.0, 1.0, None, *objective, None, True, True, False)
    torch.library.opcheck(getattr(torch.ops.fastpref, name).default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastpref.PolicyGradientLoss(loss_type="ppo"),
         "loss_type: got 'ppo', want one of grpo, bnpo, dapo, dr_grpo"),
        (lambda: fastpref.PolicyGradientLoss(epsilon_low=1.2), "epsilon_low: got 1.2, want a number in [0.0, 1.0]"),
        (lambda: fastpref.PolicyGradientLoss(beta=0.1)(torch.zeros(2, 3), torch.zeros(2, 3, dtype=int), torch.zeros(2)),
         "ref_logps: got None, want the reference's [2, 3] (beta > 0)"),
        (lambda: fastpref.PolicyGradientLoss()(torch.zeros(2, 3), torch.zeros(2, 3, dtype=int), torch.zeros(3)),
         "advantages: got shape (3,), want (2, 3) (one per token, or [2], one per sequence)"),
        (lambda: fastpref.PolicyGradientLoss(loss_type="dr_grpo")(
            torch.zeros(2, 3), torch.zeros(2, 3, dtype=int), torch.zeros(2)),
         "normalizer: got None, want sequences * maximal completion length for loss_type 'dr_grpo'"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
