"""Unpaired losses: derivatives, operators, matrix products and groups of sequences."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, IGNORE, assert_exact_or_rounded, assert_same_gradients, paired_batch, random_leaf
from support_unpaired import (
    LABELLED,
    LOSSES,
    VOCAB,
    WIDTH,
    Z0,
    assert_output,
    call,
    expected_from_hidden,
    options_of,
    products,
    rows_of,
)

from fastpref import KTOLoss, backends, mismatched_kl_from_hidden
from fastpref.ops.common import encode
from fastpref.reference import UnpairedObjective


@pytest.mark.parametrize("entry", ["sequences", "logits", "store", "pair", "recompute"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(backend, loss, entry):
    batch, loss_fn = paired_batch((2, 1, 0, 1), vocab=3, width=2), LOSSES[loss]("class")
    known, desirable = options_of(loss_fn), LABELLED[:4]
    if entry == "sequences":
        leaves, run = (random_leaf(4),), lambda x: loss_fn(x, desirable, batch.ref_logps, **known).loss
    elif entry == "logits":
        leaves = (random_leaf(4, 3, 3),)

        def run(z):
            return loss_fn.from_logits(z, batch.labels, desirable, batch.ref_logps, **known).loss
    else:
        leaves = (batch.hidden, batch.weight)

        def run(hidden, weight):
            plan = {"plan": entry, "workspace_bytes": 2 * 3 * 8}
            return call(loss_fn, batch._replace(hidden=hidden, weight=weight), desirable, **plan).loss

    assert torch.autograd.gradcheck(run, leaves, rtol=1e-6, atol=1e-8, nondet_tol=0.0)


@pytest.mark.parametrize("layout", ["padded", "packed64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_opcheck(backend, loss, layout):
    batch = paired_batch(layout=layout, bias=True, dtype=torch.float32)
    objective = encode(LOSSES[loss]("class").objective)
    labels = batch.labels.reshape(-1)
    logps = random_leaf(labels.numel(), dtype=torch.float32)
    shift = None if loss == "apo_zero_unpaired" else Z0.float()
    args = (logps, labels, batch.cu_seqlens, batch.ref_logps, LABELLED, shift, objective, IGNORE)
    results = torch.library.opcheck(torch.ops.fastpref.unpaired_loss, args)
    hidden = random_leaf(labels.numel(), WIDTH, dtype=torch.float32)
    args = (
        hidden, batch.weight, labels, batch.bias, batch.ref_logps, LABELLED, shift, batch.cu_seqlens, IGNORE,
        1.0, 1.0, None, objective, 6 * VOCAB * 4, True, True, True,
    )  # fmt: skip
    results |= torch.library.opcheck(torch.ops.fastpref.linear_unpaired_loss, args)
    assert set(results.values()) == {"SUCCESS"}, results


def test_ignored_tokens_have_coefficient_zero(backend):
    """And the others their sequence's: a derivative of 0 even where no later operator would mask it."""
    batch = paired_batch()
    logps, labels = random_leaf(batch.labels.numel()), batch.labels.reshape(-1)
    objective = encode(UnpairedObjective())
    args = (logps, labels, None, batch.ref_logps, LABELLED, Z0, objective, IGNORE)
    coefs = torch.ops.fastpref.unpaired_loss(*args)[2].view(batch.labels.shape)
    scored = batch.labels != IGNORE
    assert (coefs[~scored] == 0).all() and (coefs[scored] != 0).all()
    assert all(row[mask].unique().numel() == min(1, int(mask.sum())) for row, mask in zip(coefs, scored, strict=True))


@pytest.mark.parametrize("entry", ["sequences", "store", "pair"])
def test_backward_twice_and_double_backward(backend, entry):
    batch = paired_batch()
    if entry == "sequences":
        leaf = random_leaf(6)
        loss = KTOLoss()(leaf, LABELLED, batch.ref_logps, Z0).loss
    else:
        leaf, loss = batch.weight, call(KTOLoss(), batch, plan=entry).loss
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert_exact_or_rounded(torch.autograd.grad(-2 * loss, leaf, retain_graph=True)[0], -2 * first)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize("plan", ["store", "pair"])
def test_determinism(backend, plan):
    batch = paired_batch(dtype=torch.float32)

    def results():
        out = call(KTOLoss(mean="class"), batch, plan=plan)
        return out.loss, out.rewards, *torch.autograd.grad(out.loss, (batch.hidden, batch.weight))

    first = results()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, results(), strict=True))


@pytest.mark.parametrize(
    ("frozen", "plan", "want"), [(False, "store", 3), (False, "pair", 3), (False, "auto", 3), (True, "auto", 2)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_products(backend, loss, frozen, plan, want):
    batch = paired_batch(frozen=frozen)
    one_sequence = {"workspace_bytes": 5 * VOCAB * 8}  # `auto` cannot store all of U, nor needs to
    assert (
        products(lambda: call(LOSSES[loss](), batch, plan=plan, **one_sequence).loss.backward(), rows_of(batch)) == want
    )


def test_products_without_gradients(backend):
    batch = paired_batch()
    with torch.no_grad():
        assert products(lambda: call(KTOLoss(), batch), rows_of(batch)) == 1
    assert products(lambda: mismatched_kl_from_hidden(*batch[:2], batch.labels, batch.ref_logps), rows_of(batch)) == 1


def test_groups_are_whole_sequences_and_know_the_whole_batch(backend, monkeypatch):
    """A workspace of 5 rows: completions of 3, 5, 2, 4, 0 and 5 tokens make five groups."""
    module = backends.backend_for(LABELLED)
    seen, unpaired_loss = [], module.unpaired_loss

    def spy(logps, labels, cu_seqlens, ref_logps, desirable, shift, objective, *, first_sequence, num_sequences, **kw):
        seen.append((first_sequence, num_sequences, logps.numel()))
        assert desirable is not None and desirable.numel() == 6
        return unpaired_loss(
            logps, labels, cu_seqlens, ref_logps, desirable, shift, objective, first_sequence=first_sequence,
            num_sequences=num_sequences, **kw,
        )  # fmt: skip

    monkeypatch.setattr(module, "unpaired_loss", spy)
    batch = paired_batch()
    exact = batch.double()
    out = call(KTOLoss(mean="class"), batch, plan="auto", workspace_bytes=5 * VOCAB * 8)
    assert seen == [(0, 1, 3), (1, 1, 5), (2, 1, 2), (3, 2, 4), (5, 1, 5)]
    truth = expected_from_hidden(KTOLoss(mean="class"), exact)
    assert_output(out, truth)
    out.loss.backward()
    truth[0].backward()
    assert_same_gradients(batch, exact)


def test_many_sequences(backend):
    """More than the kernel holds at once in either direction: 37 sequences, one of 140 tokens."""
    lengths = [140, *(i % 3 for i in range(36))]
    batch = paired_batch(lengths, layout="packed32", width=3, vocab=5)
    desirable = torch.arange(37, device=DEVICE) % 5 > 1
    exact, loss_fn = batch.double(), KTOLoss(0.3, 1.7, 0.6, mean="class")
    for plan in ("store", "pair"):
        truth = expected_from_hidden(loss_fn, exact, desirable)
        out = call(loss_fn, batch, desirable, plan=plan, workspace_bytes=20 * 5 * 8 if plan == "pair" else None)
        assert_output(out, truth)
        got, want = (torch.autograd.grad(x, (b.hidden, b.weight)) for x, b in ((out.loss, batch), (truth[0], exact)))
        assert_exact_or_rounded(got[0], want[0])
        assert_exact_or_rounded(got[1], want[1])
