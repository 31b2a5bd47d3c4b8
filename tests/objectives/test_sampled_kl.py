"""KL penalties from sampled tokens: estimates, penalised rewards, controllers of beta; and the argument errors of all
KL functions."""

from __future__ import annotations

import math
import re

import pytest
import torch
from support import assert_exact_or_rounded, relative_error
from torch.autograd import gradcheck

import fastpref
from fastpref import reference
from fastpref.reference import KL_ESTIMATORS

pytestmark = pytest.mark.usefixtures("backend")

DTYPES = (torch.float64, torch.float32)


def normal(*shape, device, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=torch.float64, device=device).to(dtype).requires_grad_(grad)


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for o, u in zip(outputs, upstream, strict=True)])


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_estimate_is_the_reference(device, estimator, dtype):
    logps = normal(3, 700, device=device, dtype=dtype, grad=True)
    ref = normal(3, 700, device=device, dtype=dtype).requires_grad_()
    kl = fastpref.kl_estimate(logps, ref, estimator)
    logps64, ref64 = double(logps, ref)
    truth = reference.kl_estimate(logps64, ref64, estimator)
    assert_exact_or_rounded(kl.detach(), truth.detach())
    g = normal(3, 700, device=device)
    (got,), (want,) = grads([kl], [logps], [g]), grads([truth], [logps64], [g])
    assert relative_error(got, want) <= (1e-10 if dtype == torch.float64 else 1e-5)
    fastpref.kl_estimate(logps, ref, estimator).sum().backward()
    assert ref.grad is None
    if estimator != "abs":  # which has a corner at 0
        assert gradcheck(
            lambda x: fastpref.kl_estimate(x, ref64, estimator)[:, :4], logps64, rtol=1e-6, atol=1e-8, fast_mode=True
        )


def test_estimates_by_hand(device):
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, device=device)
    ref = torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64, device=device)
    want = {
        "k1": [0.5, -1.0, 0.0],
        "k2": [0.125, 0.5, 0.0],
        "k3": [math.exp(-0.5) - 0.5, math.e - 2.0, 0.0],
        "abs": [0.5, 1.0, 0.0],
    }
    for estimator, values in want.items():
        assert fastpref.kl_estimate(logps, ref, estimator).tolist() == pytest.approx(values, abs=1e-15)


def test_k3_far_from_and_close_to_zero(device):
    x = torch.tensor([1e-4, -1e-4, 0.0, 50.0, -50.0, -1e4, 1e4], device=device, dtype=torch.float32, requires_grad=True)
    kl = fastpref.kl_estimate(x, torch.zeros_like(x), "k3")
    kl.sum().backward()
    want = [math.expm1(-v) + v if v > -700 else math.inf for v in x.tolist()]
    assert kl[3:].tolist() == pytest.approx(want[3:], rel=50 * 2**-23)  # the rounding of 50 log2(e), exponentiated
    assert kl[:3].tolist() == pytest.approx(want[:3], abs=2e-11)  # half a unit in the last place of x, not of 1
    assert x.grad[:5].tolist() == pytest.approx([-math.expm1(-v) for v in x.tolist()[:5]], rel=50 * 2**-23)


def test_estimators_in_expectation(device):
    """Over the whole vocabulary with the policy's own weights: what the docstring says of values and gradients."""
    z, y = normal(9, device=device, grad=True), normal(9, device=device)
    log_p, log_q = z.log_softmax(0), y.log_softmax(0)
    p = log_p.detach().exp()
    reverse, forward = fastpref.token_kl(z, y), fastpref.token_kl(z, y, "forward")
    d_reverse, d_forward = (torch.autograd.grad(x, z)[0] for x in (reverse, forward))
    for estimator, value, gradient in (
        ("k1", reverse, torch.zeros_like(z)), ("k2", None, d_reverse), ("k3", reverse, d_forward),
    ):  # fmt: skip
        mean = (p * fastpref.kl_estimate(log_p, log_q, estimator)).sum()
        (got,) = torch.autograd.grad(mean, z, retain_graph=True)
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)
        if value is not None:
            torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-12)
    assert (p * fastpref.kl_estimate(log_p, log_q, "abs")).sum() >= reverse


def test_samples_approach_the_exact_kl(device):
    """20,000 draws: within 5 standard errors, about 4 % of the divergence here."""
    z, y = normal(1, 50, device=device), normal(1, 50, device=device)
    exact = fastpref.token_kl(z, y).item()
    tokens = torch.multinomial(z.softmax(-1)[0], 20_000, replacement=True)
    logps, ref = (fastpref.token_logprobs(t.expand(50, -1), torch.arange(50, device=device))[tokens] for t in (z, y))
    for estimator in ("k1", "k3"):
        samples = fastpref.kl_estimate(logps, ref, estimator)
        error = 5 * samples.std().item() / math.sqrt(len(tokens))
        assert error < 0.1 * exact
        assert abs(samples.mean().item() - exact) < error


def reward_inputs(device, dtype=torch.float64, sequences=4, length=70):
    scores = normal(sequences, device=device, dtype=dtype, grad=True)
    logps = normal(sequences, length, device=device, dtype=dtype, grad=True)
    ref = normal(sequences, length, device=device, dtype=dtype)
    mask = torch.rand(sequences, length, device=device) > 0.4
    mask[1] = False
    mask[2, 5:] = False  # the score lies in the first of two blocks
    return scores, logps, ref, mask


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 70, 2100])
def test_penalized_rewards_are_the_reference(device, estimator, dtype, length):
    scores, logps, ref, mask = reward_inputs(device, dtype, length=length)
    mask[0, -1] = True
    scores64, logps64, ref64 = double(scores, logps, ref)
    out = fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.3, estimator, return_sums=True)
    truth = reference.kl_penalized_rewards(scores64, logps64, ref64, mask, 0.3, estimator)
    upstream = [normal(4, length, device=device), normal(4, device=device)]
    for got, want in zip(out, truth, strict=True):
        assert_exact_or_rounded(got.detach(), want.detach())
    for outputs in ([0], [1], [0, 1]):
        g = [upstream[i] for i in outputs]
        got = torch.autograd.grad(
            [out[i] for i in outputs], (scores, logps), [u.to(dtype) for u in g], retain_graph=True
        )
        want = torch.autograd.grad([truth[i] for i in outputs], (scores64, logps64), g, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_penalized_rewards_by_hand(device):
    logps = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]], device=device)
    ref = torch.tensor([[-2.0, -2.5, -1.0, -9.0], [-2.0, -2.0, -2.0, -2.0]], device=device)
    mask = torch.tensor([[True, False, True, False], [False, False, False, False]], device=device)
    scores = torch.tensor([10.0, 7.0], device=device)
    out = fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.5, return_sums=True)
    assert out.rewards.tolist() == [[-0.5, 0.0, 11.0, 0.0], [0.0] * 4]
    assert out.sums.tolist() == [10.5, 7.0]  # without a scored token, the score is in the sum alone
    assert torch.equal(fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.5), out.rewards)


def test_unscored_values_are_never_used(device):
    scores, logps, ref, mask = reward_inputs(device)
    want = fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.3, "k3")
    nan = float("nan")
    logps = logps.detach().masked_fill(~mask, nan).requires_grad_()
    rewards = fastpref.kl_penalized_rewards(scores, logps, ref.masked_fill(~mask, nan), mask, 0.3, "k3")
    assert torch.equal(rewards, want)
    rewards.backward(torch.ones_like(rewards).masked_fill(~mask, nan))
    assert (logps.grad[~mask] == 0).all() and logps.grad.isfinite().all()
    assert scores.grad.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_penalized_rewards_gradcheck_and_empty(device):
    scores, logps, ref, mask = reward_inputs(device, length=6)

    def call(scores, logps):
        return fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.3, "k3", return_sums=True)

    assert gradcheck(call, (scores, logps), rtol=1e-6, atol=1e-8, nondet_tol=0.0)
    out = fastpref.kl_penalized_rewards(scores, logps[:, :0], ref[:, :0], mask[:, :0], 0.3, return_sums=True)
    assert out.rewards.shape == (4, 0) and torch.equal(out.sums, scores)
    assert fastpref.kl_penalized_rewards(scores[:0], logps[:0], ref[:0], mask[:0], 0.3).shape == (0, 6)


# Controllers


def test_adaptive_controller_by_hand():
    controller = fastpref.AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    assert controller.update(60.0, 500) == pytest.approx(0.2 * (1 + 0.2 * 500 / 10_000), rel=1e-15)
    assert controller.update(6.6, 500) == pytest.approx(0.202 * (1 + 0.1 * 0.05), rel=1e-12)
    assert controller.update(torch.tensor(0.0), 1000) == pytest.approx(0.202 * 1.005 * 0.98, rel=1e-12)
    other = fastpref.AdaptiveKLController(1.0, target=1.0, horizon=1.0)
    other.load_state_dict(controller.state_dict())
    assert other.state_dict() == controller.state_dict()
    assert other.update(3.0, 7) == controller.update(3.0, 7)
    fixed = fastpref.FixedKLController(0.05)
    assert fixed.update(100.0, 64) == fixed.beta == 0.05
    fixed.load_state_dict({"beta": 0.1})
    assert fixed.state_dict() == {"beta": 0.1}


CONTROLLER_ERRORS = [
    (lambda: fastpref.FixedKLController(-0.1), "beta: got -0.1, want a number in [0, inf)"),
    (lambda: fastpref.AdaptiveKLController(0.0, 6, 10), "init_beta: got 0.0, want a finite number greater than 0"),
    (lambda: fastpref.AdaptiveKLController(0.1, -6, 10), "target: got -6, want a finite number greater than 0"),
    (lambda: fastpref.AdaptiveKLController(0.1, 6, 0), "horizon: got 0, want a finite number greater than 0"),
    (lambda: fastpref.AdaptiveKLController(0.1, 6, 10).update(math.nan, 1), "kl: got nan, want a finite number"),
    (
        lambda: fastpref.AdaptiveKLController(0.1, 6, 10).update(1, 0),
        "n_steps: got 0, want a finite number greater than 0",
    ),
    (
        lambda: fastpref.AdaptiveKLController(0.1, 6, 10).update(1, 50),
        "n_steps: got 50, want less than 5 * horizon = 50: beta would vanish",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, message", CONTROLLER_ERRORS)
def test_controller_errors(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# Errors


L, S = torch.zeros(2, 3), torch.zeros(2)
MASK = torch.ones(2, 3, dtype=torch.bool)
H, W = torch.zeros(2, 4), torch.zeros(5, 4)
Y = torch.zeros(2, dtype=torch.long)
ERRORS = [
    (lambda: fastpref.kl_estimate(L, S), ValueError, "ref_logps: got shape (2,), want (2, 3) (the shape of logps)"),
    (lambda: fastpref.kl_estimate(L, L, "k4"), ValueError, "estimator: got 'k4', want one of k1, k2, k3, abs"),
    (lambda: fastpref.kl_estimate([1.0], L), TypeError, "logps: got list, want a torch.Tensor"),
    (
        lambda: fastpref.kl_penalized_rewards(S[:1], L, L, MASK, 0.1),
        ValueError,
        "scores: got shape (1,), want (2,) (one per sequence)",
    ),
    (lambda: fastpref.kl_penalized_rewards(S, L, L, L + 0.5, 0.1), ValueError, "mask: got 0.5, want 0 or 1 (or bool)"),
    (
        lambda: fastpref.kl_penalized_rewards(S, L, L, MASK[:, :2], 0.1),
        ValueError,
        "mask: got shape (2, 2), want (2, 3) (the shape of logps)",
    ),
    (
        lambda: fastpref.kl_penalized_rewards(S, L, L, MASK, -0.1),
        ValueError,
        "beta: got -0.1, want a number in [0, inf)",
    ),
    (
        lambda: fastpref.token_kl(L, L[:, :2]),
        ValueError,
        "ref_logits: got shape (2, 2), want (2, 3) (the shape of policy_logits)",
    ),
    (
        lambda: fastpref.token_kl(L[:, :0], L[:, :0]),
        ValueError,
        "policy_logits: got shape (2, 0), want [..., V] with V >= 1",
    ),
    (lambda: fastpref.token_kl(L, L, "jsd", beta=1.0), ValueError, "beta: got 1.0, want a number in [0, 1)"),
    (lambda: fastpref.token_kl(L, L, "both"), ValueError, "direction: got 'both', want one of reverse, forward, jsd"),
    (
        lambda: fastpref.token_kl(L, L, mask=MASK),
        ValueError,
        "mask: got shape (2, 3), want (2,) (one per row of logits)",
    ),
    (
        lambda: fastpref.token_kl(L, L, temperature=0.0),
        ValueError,
        "temperature: got 0.0, want a finite number greater than 0",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H, W[:3]),
        ValueError,
        "ref_weight: got shape (3, 4), want (5, 4) (the vocabulary of weight)",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H[:1], W),
        ValueError,
        "ref_hidden: got shape (1, 4), want (2, 4) (the rows of hidden)",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H.half(), W),
        TypeError,
        "ref_weight: got dtype float32, want float16 (the dtype of ref_hidden); "
        "cast one of them or run under torch.autocast",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H, W, ref_bias=S),
        ValueError,
        "ref_bias: got shape (2,), want (5,) ([V])",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H, W, Y, direction="up"),
        ValueError,
        "direction: got 'up', want one of reverse, forward, jsd",
    ),
    (
        lambda: fastpref.linear_token_kl(H, W, H, W, Y + 5),
        ValueError,
        "labels: got 5 at row 0, want a token in [0, 5) or ignore_index=-100",
    ),
]


@pytest.mark.parametrize("call, kind, message", ERRORS)
def test_errors(call, kind, message):
    fastpref.set_backend("auto")  # the arguments are on the CPU
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_masks_of_zeros_and_ones_in_any_dtype(backend, device, dtype):
    """What most loops have is an integer mask."""
    torch.manual_seed(0)
    scores, logps, ref = (torch.randn(*s, device=device) for s in ((3,), (3, 5), (3, 5)))
    mask = torch.rand(3, 5, device=device) < 0.5
    wanted = fastpref.kl_penalized_rewards(scores, logps, ref, mask, 0.1)
    assert torch.equal(fastpref.kl_penalized_rewards(scores, logps, ref, mask.to(dtype), 0.1), wanted)
    logits = torch.randn(2, 3, 5, 7, device=device)
    assert torch.equal(fastpref.token_kl(*logits, mask=mask.to(dtype)), fastpref.token_kl(*logits, mask=mask))
