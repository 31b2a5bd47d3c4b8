"""Exact KL divergences from logits and hidden states, and the contract of all KL operators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import IGNORE, assert_exact_or_rounded, relative_error
from torch.autograd import gradcheck
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import reference
from fastpref.reference import DIVERGENCES

pytestmark = pytest.mark.usefixtures("backend")

TRANSFORMS = ({}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 3.0})
DTYPES = (torch.float64, torch.float32)
BETA = 0.3  # of "jsd"
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def normal(*shape, device, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=torch.float64, device=device).to(dtype).requires_grad_(grad)


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def grads(outputs, inputs, upstream):
    return torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for o, u in zip(outputs, upstream, strict=True)])


# Exact, from logits


@pytest.mark.parametrize("vocab", [1, 7, 300, 4099])
@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_kl_is_the_reference(device, vocab, direction, dtype):
    for transform in TRANSFORMS:
        z, y = (normal(3, vocab, device=device, dtype=dtype) * 2 for _ in range(2))
        z.requires_grad_()
        kl = fastpref.token_kl(z, y, direction, beta=BETA, **transform)
        z64, y64 = double(z, y)
        truth = reference.token_kl(z64, y64, direction, beta=BETA, **transform)
        g = normal(3, device=device)
        (got,), (want,) = grads([kl], [z], [g]), grads([truth], [z64], [g])
        if vocab == 1:
            assert (kl == 0).all() and (got == 0).all()
            continue
        assert_exact_or_rounded(kl, truth.detach(), "kl")
        assert got.dtype == dtype
        assert relative_error(got, want) <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_token_kl_by_hand(device):
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2)."""
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    z = torch.tensor([[math.log(x) + 3 for x in p]], dtype=torch.float64, device=device, requires_grad=True)
    y = torch.tensor([[math.log(x) - 5 for x in q]], dtype=torch.float64, device=device)
    reverse = 0.5 * math.log(2) + 0 - 0.25 * math.log(2)
    kl = fastpref.token_kl(z, y)
    assert kl.item() == pytest.approx(reverse, abs=1e-14)
    kl.sum().backward()
    want = [0.5 * (math.log(2) - reverse), 0.25 * (0 - reverse), 0.25 * (-math.log(2) - reverse)]
    assert z.grad[0].tolist() == pytest.approx(want, abs=1e-14)
    z.grad = None
    kl = fastpref.token_kl(z, y, "forward")
    assert kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2), abs=1e-14)
    kl.sum().backward()
    assert z.grad[0].tolist() == pytest.approx([0.25, 0.0, -0.25], abs=1e-14)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_token_kl_gradcheck(device, direction):
    mask = torch.tensor([True, False, True], device=device)
    for transform in TRANSFORMS:
        z, y = normal(3, 5, device=device, grad=True), normal(3, 5, device=device)
        call = lambda z, y=y, t=transform: fastpref.token_kl(z, y, direction, beta=BETA, mask=mask, **t)  # noqa: E731
        assert gradcheck(call, z, rtol=1e-6, atol=1e-8, nondet_tol=0.0)


def test_the_jsd_by_hand_and_at_its_ends(device):
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): m = (7/16, 1/4, 5/16) for beta = 1/4."""
    p, q, m = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [7 / 16, 0.25, 5 / 16]
    z, y = (torch.tensor([[math.log(x) for x in row]], dtype=torch.float64, device=device) for row in (p, q))
    own, other = (sum(a * math.log(a / b) for a, b in zip(x, m, strict=True)) for x in (p, q))
    z.requires_grad_()
    jsd = fastpref.token_kl(z, y, "jsd", beta=0.25)
    assert jsd.item() == pytest.approx(0.25 * other + 0.75 * own, abs=1e-14)
    jsd.sum().backward()
    want = [0.75 * a * (math.log(a / b) - own) for a, b in zip(p, m, strict=True)]
    assert z.grad[0].tolist() == pytest.approx(want, abs=1e-14)
    for beta, scale, end in ((1e-7, 1e-7, "forward"), (1 - 1e-7, 1e-7, "reverse")):
        near = fastpref.token_kl(z, y, "jsd", beta=beta) / scale
        assert near.item() == pytest.approx(fastpref.token_kl(z, y, end).item(), rel=1e-5)


def test_strided_views_are_read_in_place(device):
    z = normal(2, 5, 12, device=device, grad=True)
    y = normal(3, 5, 16, device=device)
    views = z[:, :-1, :9], y[1:, 1:, 2:11]
    kl = fastpref.token_kl(*views)
    truth = reference.token_kl(*views)
    assert_exact_or_rounded(kl.detach(), truth.detach())
    g = normal(2, 4, device=device)
    assert relative_error(*grads([kl], [z], [g]), *grads([truth], [z], [g])) <= 1e-10
    assert fastpref.token_kl(z[0, 0], z[0, 1]).shape == ()
    assert fastpref.token_kl(z[:, :0], z[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_masked_rows_are_exactly_zero_whatever_they_hold(device, direction):
    z, y = normal(2, 3, 7, device=device), normal(2, 3, 7, device=device)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    bad_z, bad_y = (t.masked_fill(~mask[..., None], float("nan")).requires_grad_() for t in (z, y))
    kl = fastpref.token_kl(bad_z, bad_y, direction, beta=BETA, mask=mask)
    assert (kl[~mask] == 0).all()
    assert_exact_or_rounded(kl[mask].detach(), reference.token_kl(z, y, direction, beta=BETA)[mask])
    kl.backward(torch.ones_like(kl).masked_fill(~mask, float("nan")))
    assert (bad_z.grad[~mask] == 0).all() and bad_z.grad[mask].isfinite().all()
    assert bad_y.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIVERGENCES)
def test_identical_distributions(device, dtype, direction):
    z = (normal(4, 300, device=device, dtype=dtype) * 5).requires_grad_()
    kl = fastpref.token_kl(z, z.detach().clone(), direction)
    kl.sum().backward()
    assert (kl == 0).all() and (z.grad == 0).all()


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_masked_vocabulary(device, direction):
    inf = float("inf")
    z, y = normal(4, 2100, device=device), normal(4, 2100, device=device)
    z[0, :2060] = y[0, :2060] = -inf  # both, over more than the first block of 2048
    z[1, 5], z[1, 2099] = -inf, -inf  # the policy alone
    y[2, 7] = -inf  # the reference alone
    z[3, ::2] = y[3, ::2] = -inf
    z.requires_grad_()
    kl = fastpref.token_kl(z, y, direction, beta=BETA)
    truth = reference.token_kl(z, y, direction, beta=BETA)
    infinite = {"reverse": 2, "forward": 1, "jsd": None}[direction]
    assert kl.isinf().tolist() == [row == infinite for row in range(4)]
    assert_exact_or_rounded(kl.detach(), truth.detach())
    finite = kl.isfinite()
    (got,) = torch.autograd.grad(kl[finite].sum(), z)
    (want,) = torch.autograd.grad(truth[finite].sum(), z)
    assert got[finite].isfinite().all() and (got[finite][z[finite] == -inf] == 0).all()
    assert relative_error(got[finite], want[finite]) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIVERGENCES)
def test_extreme_logits(device, dtype, direction):
    """A common shift of 1e4 costs nothing: the inputs here are exact in fp32, and so is the divergence's scale."""
    steps = torch.arange(2100, device=device, dtype=torch.float64)
    z = ((steps % 17) * 0.25 + 1e4).to(dtype)[None].requires_grad_()
    y = ((steps % 13) * 0.25 - 1e4).to(dtype)[None]
    truth = reference.token_kl(*double(z, y), direction, beta=BETA).detach()
    assert_exact_or_rounded(fastpref.token_kl(z, y, direction, beta=BETA).detach(), truth)
    peaked = torch.full((1, 2100), -1e4, dtype=dtype, device=device)
    peaked[0, 2099] = 1e4  # p -> 1, met in the last block
    peaked.requires_grad_()
    flat = torch.zeros(1, 2100, dtype=dtype, device=device)
    kl = fastpref.token_kl(peaked, flat, direction, beta=BETA)
    want = {"reverse": math.log(2100), "forward": 2e4 * 2099 / 2100 - math.log(2100)}
    if direction == "jsd":  # m is 0.3 / 2100 nearly everywhere, and 0.7 + that at the policy's token
        top = 0.7 + 0.3 / 2100
        want["jsd"] = -0.7 * math.log(top) - 0.3 / 2100 * (math.log(2100 * top) + 2099 * math.log(0.3))
    assert kl.item() == pytest.approx(want[direction], rel=1e-6)
    kl.sum().backward()
    assert peaked.grad.isfinite().all()


@pytest.mark.parametrize("direction", DIVERGENCES)
def test_never_negative_beyond_rounding(device, direction):
    z = normal(64, 300, device=device, dtype=torch.float32) * 3
    near = z + 1e-4 * torch.randn_like(z)
    kl = fastpref.token_kl(z, near, direction, beta=BETA)
    assert kl.min() >= -1e-6 and kl.max() < 1e-5


def test_mixed_and_half_dtypes(device):
    z, y = normal(3, 40, device=device, dtype=torch.float16, grad=True), normal(3, 40, device=device)
    kl = fastpref.token_kl(z, y)
    truth = reference.token_kl(*double(z, y))
    assert kl.dtype == torch.float64
    assert_exact_or_rounded(kl.detach(), truth.detach())
    kl = fastpref.token_kl(z, y.half())
    assert kl.dtype == torch.float32
    z64, y64 = double(z, y.half())
    truth = reference.token_kl(z64, y64)
    assert_exact_or_rounded(kl.detach(), truth.detach())
    (got,), (want,) = (
        grads([kl], [z], [torch.ones(3, device=device)]),
        grads([truth], [z64], [torch.ones(3, device=device)]),
    )
    ideal = relative_error(want.half(), want)
    assert got.dtype == torch.float16 and relative_error(got, want) <= 1.25 * ideal


# Exact, from hidden states


def linear_inputs(device, dtype=torch.float64, *, trainable=True, n=6, d=5, vocab=11):
    hidden = normal(n, d, device=device, dtype=dtype, grad=True)
    weight, bias = (normal(*s, device=device, dtype=dtype, grad=trainable) for s in ((vocab, d), (vocab,)))
    ref_hidden, ref_weight = normal(n, 3, device=device, dtype=dtype), normal(vocab, 3, device=device, dtype=dtype)
    ref_bias = normal(vocab, device=device, dtype=dtype)
    labels = torch.tensor([1, IGNORE, 0, vocab - 1, IGNORE, 4], device=device)[:n]
    return hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias


@pytest.mark.parametrize("plan", ["auto", "frozen", "store", "recompute"])
@pytest.mark.parametrize("direction", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_token_kl_is_the_reference(device, plan, direction, dtype):
    inputs = linear_inputs(device, dtype, trainable=plan != "frozen")
    hidden, weight, *_, labels, bias, ref_bias = inputs
    hidden64, weight64, ref_hidden64, ref_weight64, bias64, ref_bias64 = double(*inputs[:4], bias, ref_bias)
    g = normal(6, device=device)
    g[1] = float("nan")  # an ignored row's upstream gradient may be anything
    mask = labels != IGNORE
    for transform in TRANSFORMS:
        out = fastpref.linear_token_kl(
            *inputs, direction=direction, beta=BETA, plan=plan, workspace_bytes=300, **transform
        )
        truth = reference.linear_token_kl(
            hidden64, weight64, ref_hidden64, ref_weight64, bias64, ref_bias64, direction=direction, beta=BETA,
            mask=mask, **transform,
        )  # fmt: skip
        assert_exact_or_rounded(out.kl.detach(), truth.detach(), "kl")
        logps = reference.linear_token_logprobs(hidden64, weight64, labels, bias64, **transform).detach()
        ref_logps = reference.linear_token_logprobs(ref_hidden64, ref_weight64, labels, ref_bias64, **transform)
        assert_exact_or_rounded(out.logps, logps, "logps")
        assert_exact_or_rounded(out.ref_logps, ref_logps, "ref_logps")
        assert not out.logps.requires_grad and not out.ref_logps.requires_grad
        wrt = [(a, b) for a, b in ((hidden, hidden64), (weight, weight64), (bias, bias64)) if a.requires_grad]
        got = grads([out.kl], [a for a, _ in wrt], [g])
        want = grads([truth], [b for _, b in wrt], [g.nan_to_num()])
        for x, y in zip(got, want, strict=True):
            assert x.dtype == dtype
            assert relative_error(x, y) <= (1e-10 if dtype == torch.float64 else 1e-5)
        assert (got[0][~mask] == 0).all()


def test_ignored_rows_never_enter_a_product(device):
    inputs = list(linear_inputs(device, trainable=True))
    clean = fastpref.linear_token_kl(*inputs)
    want = torch.autograd.grad(clean.kl.sum(), (inputs[0], inputs[1], inputs[5]))
    ignored = inputs[4] == IGNORE
    inputs[0] = inputs[0].detach().masked_fill(ignored[:, None], float("nan")).requires_grad_()
    inputs[2] = inputs[2].masked_fill(ignored[:, None], float("inf"))
    out = fastpref.linear_token_kl(*inputs)
    for a, b in zip(out, clean, strict=True):
        assert torch.equal(a, b) and (a[ignored] == 0).all()
    got = torch.autograd.grad(out.kl.sum(), (inputs[0], inputs[1], inputs[5]))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_without_labels_every_row_counts(device):
    hidden, weight, ref_hidden, ref_weight, _, bias, ref_bias = linear_inputs(device)
    shaped = hidden.view(2, 3, -1), weight, ref_hidden.view(2, 3, -1), ref_weight
    out = fastpref.linear_token_kl(*shaped, bias=bias, ref_bias=ref_bias, ignore_index=0)
    assert out.logps is None and out.ref_logps is None
    truth = reference.linear_token_kl(*shaped, bias, ref_bias)
    assert_exact_or_rounded(out.kl.detach(), truth.detach())


@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_nothing_scored_is_a_differentiable_zero(device, plan):
    inputs = list(linear_inputs(device, trainable=plan != "frozen"))
    inputs[4] = torch.full_like(inputs[4], IGNORE)
    out = fastpref.linear_token_kl(*inputs, plan=plan)
    out.kl.sum().backward()
    assert (out.kl == 0).all() and (inputs[0].grad == 0).all()
    assert plan == "frozen" or ((inputs[1].grad == 0).all() and (inputs[5].grad == 0).all())


@pytest.mark.parametrize(
    "plan, direction",
    [("frozen", "reverse"), ("store", "reverse"), ("recompute", "reverse"), ("frozen", "jsd"), ("recompute", "jsd")],
)
def test_linear_token_kl_gradcheck(device, plan, direction):
    hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias = linear_inputs(
        device, trainable=plan != "frozen", n=3, d=2, vocab=4
    )
    labels = labels.clamp(max=3)

    def call(hidden, weight, bias):
        return fastpref.linear_token_kl(
            hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias, direction=direction, beta=BETA, plan=plan,
            softcap=3.0,
        ).kl  # fmt: skip

    assert gradcheck(call, (hidden, weight, bias), rtol=1e-6, atol=1e-8, nondet_tol=0.0)


@pytest.mark.parametrize(
    "case, products",
    [("no grad", 2), ("frozen", 3), ("store", 4), ("recompute", 6)],
)
def test_products_by_the_profiler(device, case, products):
    n, d, vocab = 24, 16, 128
    hidden = normal(n, d, device=device, dtype=torch.float32, grad=case != "no grad")
    weight = normal(vocab, d, device=device, dtype=torch.float32, grad=case in ("store", "recompute"))
    ref_hidden, ref_weight = (normal(*s, device=device, dtype=torch.float32) for s in ((n, d), (vocab, d)))
    labels = torch.arange(n, device=device)
    labels[::2] = IGNORE
    plan = case if case == "recompute" else "auto"
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as run:
        out = fastpref.linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels, plan=plan)
        if case != "no grad":
            out.kl.sum().backward()
    flops = sum(e.flops for e in run.events() if e.name in ("aten::mm", "aten::addmm"))
    assert flops == products * 2 * (n // 2) * d * vocab


def test_half_precision_logps_are_those_of_the_logprob_op(device):
    inputs = linear_inputs(device, torch.float16, trainable=False)
    hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias = inputs
    out = fastpref.linear_token_kl(*inputs)
    for got, h, w, b in ((out.logps, hidden, weight, bias), (out.ref_logps, ref_hidden, ref_weight, ref_bias)):
        same = fastpref.linear_token_logprobs(h, w, labels, b)
        torch.testing.assert_close(got, same.detach(), rtol=0, atol=1e-6)
    truth = reference.linear_token_kl(*double(hidden, weight, ref_hidden, ref_weight, bias, ref_bias))
    mask = labels != IGNORE
    torch.testing.assert_close(out.kl[mask].double(), truth[mask], rtol=1e-2, atol=1e-3, check_dtype=True)


# Operators


def operator_calls(device):
    ops = torch.ops.fastpref
    z, y = normal(3, 5, device=device, grad=True), normal(3, 5, device=device)
    mask = torch.tensor([True, False, True], device=device)
    hidden, weight, ref_hidden, ref_weight, labels, bias, ref_bias = linear_inputs(device)
    scores, logps = normal(3, device=device, grad=True), normal(3, 6, device=device, grad=True)
    ref, scored = normal(3, 6, device=device), torch.rand(3, 6, device=device) > 0.5
    beta = torch.tensor(0.3, dtype=torch.float64, device=device)
    flat, flat_ref = logps.detach().view(-1).requires_grad_(), ref.view(-1)
    yield ops.kl_estimate, (flat, flat_ref, "k3")
    yield ops.kl_penalized_rewards, (scores, logps, ref, scored, beta, "k2")
    yield ops.token_kl, (z, y, mask, "reverse", 1.0, 1.0, None)
    yield ops.token_kl, (z, y, None, "forward", 0.7, 1.3, 3.0)
    yield ops.token_kl, (z, y, mask, "jsd", 0.7, 1.0, None, BETA)
    heads = hidden, weight, ref_hidden, ref_weight
    for plan in ("store", "recompute"):
        yield ops.linear_token_kl, (*heads, labels, bias, ref_bias, "reverse", IGNORE, 1.0, 1.0, None, plan, None)
    jsd = "jsd", IGNORE, 1.0, 1.0, None, "recompute", None, None, None, BETA
    yield ops.linear_token_kl, (*heads, labels, bias, ref_bias, *jsd)
    frozen = hidden, weight.detach(), ref_hidden, ref_weight
    yield ops.linear_token_kl, (*frozen, None, None, None, "forward", IGNORE, 1.0, 1.0, None, "frozen", None)


def test_operators_are_well_formed(device):
    for op, args in operator_calls(device):
        torch.library.opcheck(op, args, test_utils=OPCHECKS)


def test_double_backward_raises(device):
    for op, args in operator_calls(device):
        inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        out = op(*args)
        first = torch.autograd.grad(out[0].sum(), inputs[-1], create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first[0].sum(), inputs[-1])


def test_a_second_backward_gives_the_same(device):
    for op, args in operator_calls(device):
        inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
        loss = op(*args)[0].sum()
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        twice = torch.autograd.grad(loss, inputs)
        assert all(torch.equal(a, b) for a, b in itertools.zip_longest(once, twice))


def test_compiles_without_graph_breaks(device):
    hidden, weight, ref_hidden, ref_weight, labels, *_ = linear_inputs(device)
    z, y = normal(6, 5, device=device, grad=True), normal(6, 5, device=device)
    mask = labels[None] != IGNORE

    def loss(z, hidden, weight):
        exact = fastpref.token_kl(z, y)
        kl, logps, ref_logps = fastpref.linear_token_kl(hidden, weight, ref_hidden, ref_weight, labels)
        estimate = fastpref.kl_estimate(exact, kl, "k3")
        rewards = fastpref.kl_penalized_rewards(kl[:1], exact[None], ref_logps[None], mask, 0.1)
        return (exact + kl + estimate).sum() + rewards.sum() + logps.sum()

    inputs = z, hidden, weight
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    eager = loss(*inputs)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
