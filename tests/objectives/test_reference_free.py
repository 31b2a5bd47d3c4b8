"""ORPO, SimPO, CPO, IPO; token and pair weights. Worked values are computed here, from the papers, on floats."""

from __future__ import annotations

import math

import pytest
import torch
from support import IGNORE, assert_exact_or_rounded, paired_batch
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import reference

CHOSEN, REJECTED = (-12.0, -3.5, -20.0), (-14.0, -9.0, -16.0)
REF_CHOSEN, REF_REJECTED = (-13.0, -4.0, -19.0), (-13.5, -8.0, -18.0)
LENGTHS = ((6, 2, 10), (7, 3, 4))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -700 else x


def worked(loss_fn, with_reference=False) -> float:
    as_tensor = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
    refs = (as_tensor(REF_CHOSEN), as_tensor(REF_REJECTED)) if with_reference else ()
    lengths = dict(zip(("chosen_lengths", "rejected_lengths"), map(as_tensor, LENGTHS), strict=True))
    return loss_fn(as_tensor(CHOSEN), as_tensor(REJECTED), *refs, **lengths).loss.item()


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def means():
    """Length-normalised log-probs of each pair."""
    return [(c / n, r / m) for c, r, n, m in zip(CHOSEN, REJECTED, *LENGTHS, strict=True)]


NLL = -sum(CHOSEN) / sum(LENGTHS[0])


def test_simpo_worked(backend):
    want = mean(-log_sigmoid(2.5 * (c - r) - 1.4) for c, r in means())
    assert worked(fastpref.SimPOLoss(beta=2.5, gamma=1.4)) == pytest.approx(want, rel=1e-12)


def test_simpo_label_smoothing_worked(backend):
    margins = [2.5 * (c - r) - 1.4 for c, r in means()]
    want = mean(-0.9 * log_sigmoid(x) - 0.1 * log_sigmoid(-x) for x in margins)
    assert worked(fastpref.SimPOLoss(2.5, 1.4, label_smoothing=0.1)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("loss_type", "want"),
    [
        ("sigmoid", mean(-log_sigmoid(0.3 * (c - r)) for c, r in zip(CHOSEN, REJECTED, strict=True))),
        ("hinge", mean(max(0.0, 1 - 0.3 * (c - r)) for c, r in zip(CHOSEN, REJECTED, strict=True))),
        ("ipo", mean((c - r - 1 / 0.6) ** 2 for c, r in means())),
        ("simpo", mean(-log_sigmoid(0.3 * (c - r) - 0.5) for c, r in means())),
    ],
)
def test_cpo_worked(backend, loss_type, want):
    assert worked(fastpref.CPOLoss(0.3, alpha=0, loss_type=loss_type)) == pytest.approx(want, rel=1e-12)
    assert worked(fastpref.CPOLoss(0.3, alpha=0.7, loss_type=loss_type)) == pytest.approx(want + 0.7 * NLL, rel=1e-12)


def test_alphapo_worked(backend):
    """TRL 1.16, cpo_trainer.py: r = (1 - p^-alpha) / alpha of the mean log-prob, in place of the log-prob."""
    reward = lambda lp: (1 - math.exp(lp) ** -0.25) / 0.25  # noqa: E731
    want = mean(-log_sigmoid(2.0 * (reward(c) - reward(r)) - 0.5) for c, r in means())
    loss_fn = fastpref.CPOLoss(2.0, alpha=0, loss_type="simpo", gamma=0.5, alphapo_alpha=0.25)
    assert worked(loss_fn) == pytest.approx(want, rel=1e-12)


def test_orpo_worked(backend):
    log_odds = lambda lp: lp - math.log(1 - math.exp(lp))  # noqa: E731
    want = NLL - 0.2 * mean(log_sigmoid(log_odds(c) - log_odds(r)) for c, r in means())
    assert worked(fastpref.ORPOLoss(0.2)) == pytest.approx(want, rel=1e-12)


def test_ipo_worked(backend):
    ratios = [(c - rc, r - rr) for c, rc, r, rr in zip(CHOSEN, REF_CHOSEN, REJECTED, REF_REJECTED, strict=True)]
    paper = mean((a - b - 5.0) ** 2 for a, b in ratios)
    per_token = mean((a / n - b / m - 5.0) ** 2 for (a, b), n, m in zip(ratios, *LENGTHS, strict=True))
    assert worked(fastpref.IPOLoss(0.1), with_reference=True) == pytest.approx(paper, rel=1e-12)
    assert worked(fastpref.IPOLoss(0.1, length_normalize=True), with_reference=True) == pytest.approx(
        per_token, rel=1e-12
    )


REFERENCE_FREE = {
    "simpo": fastpref.SimPOLoss(),
    "cpo": fastpref.CPOLoss(),
    "cpo-simpo-alphapo": fastpref.CPOLoss(loss_type="simpo", alphapo_alpha=0.1),
    "orpo": fastpref.ORPOLoss(),
}


def specification(loss_fn, batch):
    """The loss by fastpref.reference from fp64 log-probs."""
    logps = reference.token_logprobs(torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias), batch.labels)
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    bounds = reference.sequence_bounds(batch.labels, batch.cu_seqlens)
    flat = batch.labels.reshape(-1)
    lengths = torch.stack([(flat[a:b] != IGNORE).sum() for a, b in bounds]).double()
    refs = batch.ref_logps.chunk(2) if loss_fn.with_reference else (None, None)
    return reference.paired_loss(*sums.chunk(2), *refs, *lengths.chunk(2), loss_fn.objective)


@pytest.mark.parametrize("plan", ["store", "pair", "recompute"])
@pytest.mark.parametrize("layout", ["padded", "packed64"])
@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_from_hidden_equals_specification(backend, name, layout, plan):
    loss_fn, batch = REFERENCE_FREE[name], paired_batch(layout=layout, bias=True)
    leaves = (batch.hidden, batch.weight, batch.bias)
    truth = specification(loss_fn, batch)
    wanted = torch.autograd.grad(truth, leaves)
    out = loss_fn.from_hidden(
        *leaves[:2], batch.labels, batch.bias, cu_seqlens=batch.cu_seqlens, plan=plan, workspace_bytes=19 * 8 * 8
    )
    assert_exact_or_rounded(out.loss, truth.detach())
    for got, want in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        assert_exact_or_rounded(got, want)


@pytest.mark.parametrize("entry", ["logits", "store", "pair"])
@pytest.mark.parametrize("layout", ["padded", "packed32"])
def test_orpo_with_prompts_in_the_nll(backend, layout, entry):
    batch = paired_batch(layout=layout)
    logits = torch.nn.functional.linear(batch.hidden, batch.weight)
    prompt_labels = torch.randint(19, batch.labels.shape).masked_fill(batch.labels != IGNORE, IGNORE)
    prompt_labels.view(-1)[-3:] = IGNORE
    flat = batch.labels.reshape(-1)
    bounds = reference.sequence_bounds(batch.labels, batch.cu_seqlens)
    pairs = len(bounds) // 2
    sums = reference.sequence_logprobs(reference.token_logprobs(logits, batch.labels), batch.labels,
                                       cu_seqlens=batch.cu_seqlens)  # fmt: skip
    prompts = reference.token_logprobs(logits, prompt_labels).reshape(-1)
    lengths = torch.stack([(flat[a:b] != IGNORE).sum() for a, b in bounds]).double()
    end = bounds[pairs - 1][1]
    nll_sums = sums[:pairs] + torch.stack([prompts[a:b].sum() for a, b in bounds[:pairs]])
    tokens = lengths[:pairs].sum() + (prompt_labels.reshape(-1)[:end] != IGNORE).sum()
    loss_fn = fastpref.ORPOLoss(0.3)
    truth = reference.paired_loss(
        *sums.chunk(2), None, None, *lengths.chunk(2), loss_fn.objective, chosen_nll_sums=nll_sums, chosen_tokens=tokens
    )
    leaves = (batch.hidden, batch.weight)
    wanted = torch.autograd.grad(truth, leaves, retain_graph=True)
    options = {"cu_seqlens": batch.cu_seqlens, "prompt_labels": prompt_labels}
    if entry == "logits":
        out = loss_fn.from_logits(logits, batch.labels, **options)
    else:
        out = loss_fn.from_hidden(*leaves, batch.labels, plan=entry, workspace_bytes=19 * 8 * 12, **options)
    assert_exact_or_rounded(out.loss, truth.detach())
    for got, want in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        assert_exact_or_rounded(got, want)


def test_orpo_is_finite_where_a_probability_is_one(backend):
    """Liger 0.8.5 returns NaN gradients here: log1p(-exp(logp)) at logp = 0."""
    logits = torch.zeros(4, 3, 11, dtype=torch.float32)
    labels = torch.full((4, 3), 7)
    logits[:, :, 7] = torch.tensor([0.0, 1e4, 1e4, 1e4])[:, None]  # p = 1 on chosen, on rejected, on both
    logits.requires_grad_()
    out = fastpref.ORPOLoss().from_logits(logits, labels)
    out.loss.backward()
    assert out.loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_empty_completions_are_no_nan(backend, name):
    batch = paired_batch((0, 0, 0, 0))
    out = REFERENCE_FREE[name].from_hidden(batch.hidden, batch.weight, batch.labels)
    out.loss.backward()
    assert out.loss.isfinite() and batch.hidden.grad.isfinite().all() and batch.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_gradcheck(backend, name):
    batch = paired_batch((2, 3, 1, 2), vocab=7, width=3)

    def loss(hidden, weight):
        plan = {"plan": "pair", "workspace_bytes": 4 * 7 * 8}
        return REFERENCE_FREE[name].from_hidden(hidden, weight, batch.labels, **plan).loss

    fast = backend == "triton"  # the interpreter takes a minute for every element, a second for two projections
    leaves = (batch.hidden, batch.weight)
    assert torch.autograd.gradcheck(loss, leaves, rtol=1e-6, atol=1e-8, nondet_tol=0.0, fast_mode=fast)


@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2)])
def test_nll_terms_cost_no_further_products(backend, frozen, products):
    batch = paired_batch(frozen=frozen)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        fastpref.ORPOLoss().from_hidden(batch.hidden, batch.weight, batch.labels).loss.backward()
    rows = int((batch.labels != IGNORE).sum())
    done = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            done += 2 * a[0] * a[1] * b[1]
    assert done == products * 2 * rows * 19 * 8


# Token weights (LD-DPO) and pair weights (WPO).


def test_shared_length_weights_worked():
    labels = torch.tensor([[IGNORE, 1, 2, 3], [IGNORE, 4, IGNORE, IGNORE], [5, 6, IGNORE, IGNORE], [7, 8, 9, IGNORE]])
    want = [0, 1, 1, 0.25, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0.25, 0.25, 0]
    assert reference.shared_length_weights(labels, None, 0.25, IGNORE).tolist() == want
    packed = labels.reshape(-1)
    edges = torch.arange(0, 17, 4)
    assert reference.shared_length_weights(packed, edges, 0.25, IGNORE).tolist() == want


@pytest.mark.parametrize("entry", ["logits", "store", "pair", "recompute"])
@pytest.mark.parametrize("layout", ["padded", "packed64"])
def test_ld_dpo_equals_weighted_sums(backend, layout, entry):
    batch = paired_batch(layout=layout)
    loss_fn = fastpref.DPOLoss(0.3, ["sigmoid", "sft"], ld_alpha=0.4)
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels)
    weights = reference.shared_length_weights(batch.labels, batch.cu_seqlens, 0.4, IGNORE).view(logps.shape)
    sums = reference.sequence_logprobs(logps * weights, batch.labels, cu_seqlens=batch.cu_seqlens)
    plain = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    flat = batch.labels.reshape(-1)
    bounds = reference.sequence_bounds(batch.labels, batch.cu_seqlens)
    lengths = torch.stack([(flat[a:b] != IGNORE).sum() for a, b in bounds]).double()
    truth = reference.paired_loss(
        *sums.chunk(2), *batch.ref_logps.chunk(2), *lengths.chunk(2), loss_fn.objective,
        chosen_nll_sums=plain.chunk(2)[0],
    )  # fmt: skip
    torch.testing.assert_close(loss_fn.sequence_logps(logps, batch.labels, batch.cu_seqlens), sums)
    leaves = (batch.hidden, batch.weight)
    wanted = torch.autograd.grad(truth, leaves)
    if entry == "logits":
        logits = torch.nn.functional.linear(*leaves)
        out = loss_fn.from_logits(logits, batch.labels, batch.ref_logps, batch.cu_seqlens)
    else:
        options = {"cu_seqlens": batch.cu_seqlens, "plan": entry, "workspace_bytes": 19 * 8 * 8}
        out = loss_fn.from_hidden(*leaves, batch.labels, ref_logps=batch.ref_logps, **options)
    assert_exact_or_rounded(out.loss, truth.detach())
    for got, want in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        assert_exact_or_rounded(got, want)


@pytest.mark.parametrize("entry", ["logits", "store", "pair", "recompute"])
@pytest.mark.parametrize("layout", ["padded", "packed32"])
def test_wpo_equals_trl_text(backend, layout, entry):
    """TRL 1.16, dpo_trainer.py: each pair's loss times exp(mean_t(logp - log sum p^2)) of chosen and of rejected."""
    batch = paired_batch(layout=layout)
    loss_fn = fastpref.DPOLoss(0.3, use_weighting=True)
    logits = torch.nn.functional.linear(batch.hidden, batch.weight)
    every = logits.log_softmax(-1)
    logps = reference.token_logprobs(logits, batch.labels)
    aligned = torch.where(batch.labels != IGNORE, logps - (2 * every).logsumexp(-1), 0).detach().reshape(-1)
    bounds = reference.sequence_bounds(batch.labels, batch.cu_seqlens)
    flat = batch.labels.reshape(-1)
    w = torch.stack([aligned[a:b].sum() / max(1, int((flat[a:b] != IGNORE).sum())) for a, b in bounds]).exp()
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens) - batch.ref_logps
    a, b = sums.chunk(2)
    truth = (-torch.nn.functional.logsigmoid(0.3 * (a - b)) * w.chunk(2)[0] * w.chunk(2)[1]).mean()
    leaves = (batch.hidden, batch.weight)
    wanted = torch.autograd.grad(truth, leaves, retain_graph=True)
    if entry == "logits":
        out = loss_fn.from_logits(logits, batch.labels, batch.ref_logps, batch.cu_seqlens)
    else:
        options = {"cu_seqlens": batch.cu_seqlens, "plan": entry, "workspace_bytes": 19 * 8 * 8}
        out = loss_fn.from_hidden(*leaves, batch.labels, ref_logps=batch.ref_logps, **options)
    assert_exact_or_rounded(out.loss, truth.detach())
    for got, want in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        assert_exact_or_rounded(got, want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastpref.CPOLoss(loss_type="dpo"),
         "loss_type: got 'dpo', want one of sigmoid, hinge, ipo, simpo"),
        (lambda: fastpref.SimPOLoss(gamma=-1.0), "gamma: got -1.0, want a number in [0.0, inf)"),
        (lambda: fastpref.ORPOLoss(beta=0.0), "beta: got 0.0, want a finite number greater than 0"),
        (lambda: fastpref.DPOLoss(ld_alpha=1.5), "ld_alpha: got 1.5, want a number in [0.0, 1.0]"),
        (lambda: fastpref.DPOLoss(loss_type="aot", use_weighting=True),
         "use_weighting: got True with loss_type aot, want it on others only"),
    ],
)  # fmt: skip
def test_bad_options(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message
