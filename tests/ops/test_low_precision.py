"""bf16 and fp16: no worse than exact arithmetic that rounds at the same points.

The truth is fp64 on the same inputs. The ideal is fp64 too, but rounds wherever a design on tensor cores must: the
logits, U, the operands and results of the products. A factor of 1.003 or a truncating store exceeds 1.25 times
the ideal's error; rounding in another place, or once more, does too.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from support import DEVICE, from_hidden, paired_batch, random_labels, relative_error
from torch import Tensor

import fastpref
from fastpref import DPOLoss, linear_token_logprobs, reference, token_logprobs, token_statistics

HALVES = (torch.bfloat16, torch.float16)
# Triton's interpreter truncates to bf16: the kernels meet bf16 on a GPU only
CASES = [(b, d) for b in ("portable", "triton") for d in HALVES if DEVICE != "cpu" or (b, d) != ("triton", HALVES[0])]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}".replace("torch.", ""))
def half(request) -> torch.dtype:
    name, dtype = request.param
    fastpref.set_backend(name)
    yield dtype
    fastpref.set_backend("auto")


def assert_as_good_as(got: Tensor, ideal: Tensor, truth: Tensor, name: str) -> None:
    got, ideal = got.detach().double(), ideal.detach().double()
    ours, theirs = relative_error(got, truth), relative_error(ideal, truth)
    assert theirs > 0, f"{name}: the ideal is exact, and judges nothing"
    assert ours <= 1.25 * theirs, f"{name}: relative error {ours:.2e}, {ours / theirs:.2f} times the ideal's"
    ours, theirs = (got - truth).abs().max(), (ideal - truth).abs().max()
    assert ours <= 2 * theirs, f"{name}: largest error {ours:.2e}, {ours / theirs:.2f} times the ideal's"


class Problem(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor


def problem(dtype, *, rows=48, vocab=521, width=64) -> Problem:
    """Logits of standard deviation 3, labels drawn from the model's own distribution as text is."""
    hidden = torch.randn(rows, width, dtype=torch.float64) * 3 / width**0.5
    hidden, weight = hidden.to(dtype).double(), torch.randn(vocab, width).to(dtype).double()
    labels = torch.multinomial((hidden @ weight.t()).softmax(1), 1)[:, 0]
    leaves = (hidden.to(DEVICE, dtype).requires_grad_(), weight.to(DEVICE, dtype).requires_grad_())
    return Problem(*leaves, labels.to(DEVICE), torch.randn(rows).to(DEVICE))


class Result(NamedTuple):
    logps: Tensor
    hidden: Tensor
    weight: Tensor | None


def truth_of(p: Problem) -> Result:
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    logps = reference.linear_token_logprobs(hidden, weight, p.labels)
    logps.backward(p.upstream.double())
    return Result(logps.detach(), hidden.grad, weight.grad)


def ideal_of(p: Problem, plan: str) -> Result:
    """fp64 between the rounding points."""
    dtype = p.hidden.dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).double()

    hidden, weight, c = p.hidden.detach().double(), p.weight.detach().double(), p.upstream.double()[:, None]
    onehot = torch.nn.functional.one_hot(p.labels, len(weight)).bool()
    exact = hidden @ weight.t()
    z = torch.where(onehot, exact, rounded(exact))  # the label's logit is computed apart, in fp32
    logps = z.log_softmax(1)
    u = rounded(torch.where(onehot, 1 - logps.exp(), -logps.exp()))
    product = u @ weight
    if plan == "frozen" or p.hidden.device.type == "cpu":  # kept in half precision; no mixed-output product on a CPU
        product = rounded(product)
    return Result(logps[onehot], rounded(c * product), rounded(u.t() @ rounded(c * hidden)))


@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_linear_token_logprobs(half, plan):
    p = problem(half)
    p.weight.requires_grad_(plan != "frozen")
    got = linear_token_logprobs(p.hidden, p.weight, p.labels, plan=plan)
    assert got.dtype == torch.float32
    got.backward(p.upstream)
    ideal, truth = ideal_of(p, plan), truth_of(p)
    assert_as_good_as(got, ideal.logps, truth.logps, "log-probs")
    assert_as_good_as(p.hidden.grad, ideal.hidden, truth.hidden, "gradient of hidden")
    if plan != "frozen":
        assert_as_good_as(p.weight.grad, ideal.weight, truth.weight, "gradient of weight")


@pytest.mark.parametrize(
    ("label", "times"),
    [
        ("the likeliest token", 5),  # only the target's logit matters, and it is fp32 here
        ("drawn from the model", 1),  # where another token is likelier, its half-precision logit matters
    ],
)
def test_more_accurate_than_the_usual_path(half, label, times):
    """Half-precision logits, then log_softmax in fp32, as models are trained everywhere. Rows are peaked, as a trained
    model's are: logits of standard deviation 2.5, and one token 8 to 20 above 0. SmolLM2's vocabulary: the smaller,
    the less the rounding of the other logits averages out of the sum."""
    rows, vocab, width = 64, 49152, 64
    weight = torch.randn(vocab, width) * 2.5 / width**0.5
    top, height = torch.randint(vocab, (rows,)), 8 + 12 * torch.rand(rows, 1)
    hidden = torch.randn(rows, width) + height * weight[top] / weight[top].square().sum(1, keepdim=True)
    hidden, weight = hidden.to(DEVICE, half), weight.to(DEVICE, half)
    logits = hidden.double() @ weight.double().t()
    labels = logits.argmax(1) if times > 1 else torch.multinomial(logits.softmax(1), 1)[:, 0]
    truth = reference.token_logprobs(logits, labels)
    usual = torch.nn.functional.linear(hidden, weight).float().log_softmax(1).gather(1, labels[:, None])[:, 0]
    ours = linear_token_logprobs(hidden, weight, labels)
    rms = [float((x.double() - truth).square().mean().sqrt()) for x in (ours, usual)]
    assert rms[0] * times < rms[1], f"rms error {rms[0]:.1e} against {rms[1]:.1e}"


def test_token_logprobs(half):
    """Values are fp32 computations on given logits; the gradient is rounded once."""
    rows, vocab = 64, 521
    logits = (torch.randn(rows, vocab) * 3).to(DEVICE, half).requires_grad_()
    labels, upstream = random_labels((rows,), vocab), torch.randn(rows, device=DEVICE)
    exact = logits.detach().double().requires_grad_()
    truth = reference.token_logprobs(exact, labels)
    truth.backward(upstream.double())
    got = token_logprobs(logits, labels)
    got.backward(upstream)
    assert got.dtype == torch.float32 and logits.grad.dtype == half
    assert relative_error(got, truth) <= 1e-5
    assert_as_good_as(logits.grad, exact.grad.to(half), exact.grad, "gradient")


def test_statistics_are_fp32(half):
    logits, labels = (torch.randn(32, 521) * 3).to(DEVICE, half), random_labels((32,), 521)
    got, truth = token_statistics(logits, labels), reference.token_statistics(logits.double(), labels)
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq"):
        assert getattr(got, name).dtype == torch.float32
        assert relative_error(getattr(got, name), getattr(truth, name)) <= 1e-5, name
    assert torch.equal(got.is_top1, truth.is_top1)


@pytest.mark.parametrize("plan", ["frozen", "store", "pair", "recompute"])
def test_a_loss_from_hidden_states(half, plan):
    """Against the ideal's log-probs and gradients, with the loss's own coefficients as the upstream gradient."""
    batch = paired_batch((9, 12, 12, 8), dtype=half, vocab=521, width=64, frozen=plan == "frozen", scale=3 / 8)
    out = from_hidden(DPOLoss(), batch, plan=plan)
    out.loss.backward()
    exact = batch.double()
    logps = reference.linear_token_logprobs(exact.hidden, exact.weight, batch.labels).detach().requires_grad_()
    sums = reference.sequence_logprobs(logps, batch.labels)
    objective, lengths = DPOLoss().objective, torch.ones(2, device=DEVICE, dtype=torch.float64)
    loss = reference.paired_loss(*sums.chunk(2), *exact.ref_logps.detach().chunk(2), lengths, lengths, objective)
    (upstream,) = torch.autograd.grad(loss, logps)

    scored = batch.labels != -100
    p = Problem(batch.hidden.detach()[scored], batch.weight.detach(), batch.labels[scored], upstream[scored].float())
    ideal, truth = ideal_of(p, plan), truth_of(p)
    # The coefficients come from half-precision log-probs: their relative error, beta |error of the margin|, is the
    # only one that the ideal for given coefficients does not have.
    error = 0.1 * float((out.margins.double() / 0.1 - reference_margins(exact)).abs().max())
    assert (
        relative_error(batch.hidden.grad[scored], truth.hidden)
        <= 1.25 * relative_error(ideal.hidden, truth.hidden) + error
    )
    assert (batch.hidden.grad[~scored] == 0).all()
    if plan != "frozen":
        limit = 1.25 * relative_error(ideal.weight, truth.weight) + error
        assert relative_error(batch.weight.grad, truth.weight) <= limit


def reference_margins(exact) -> Tensor:
    with torch.no_grad():
        logps = reference.linear_token_logprobs(exact.hidden, exact.weight, exact.labels)
        a, b = (reference.sequence_logprobs(logps, exact.labels) - exact.ref_logps).chunk(2)
        return a - b


def test_half_precision_repeats_bitwise(half):
    batch = paired_batch(dtype=half, vocab=257)
    runs = []
    for _ in range(3):
        loss = from_hidden(DPOLoss(), batch, plan="pair").loss
        runs.append([loss, *torch.autograd.grad(loss, [batch.hidden, batch.weight])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_padded_vocabulary_in_half_precision(half):
    """The logits buffer is wider than V where rows are aligned: its padding must not enter the sum."""
    p = problem(half, rows=8, vocab=131)
    got = linear_token_logprobs(p.hidden, p.weight, p.labels, plan="store")
    got.backward(p.upstream)
    ideal, truth = ideal_of(p, "store"), truth_of(p)
    assert relative_error(got, truth.logps) <= 1.25 * relative_error(ideal.logps, truth.logps)
    assert relative_error(p.weight.grad, truth.weight) <= 1.25 * relative_error(ideal.weight, truth.weight)
