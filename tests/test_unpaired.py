"""KTO, APO-zero-unpaired and BCO, z0, and BCO's running shift."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from support import (
    DEVICE,
    IGNORE,
    TRANSFORMS,
    assert_exact_or_rounded,
    assert_same_gradients,
    in_double,
    paired_batch,
    random_leaf,
)
from torch.profiler import ProfilerActivity, profile

import fastpref
from fastpref import BCOLoss, KTOLoss, backends, kto_kl, mismatched_indices, mismatched_kl_from_hidden, reference
from fastpref.ops.unpaired import encode
from fastpref.reference import UnpairedObjective

LABELLED = torch.tensor([True, False, False, True, True, False], device=DEVICE)  # of paired_batch's six sequences
Z0 = torch.tensor(0.6, dtype=torch.float64, device=DEVICE)
MIXES = {"mixed": LABELLED, "desirable": torch.ones_like(LABELLED), "undesirable": torch.zeros_like(LABELLED)}
VOCAB, WIDTH = 19, 8  # of paired_batch
MEANS = ("batch", "class")
LOSSES = {
    "kto": lambda mean="batch": KTOLoss(0.3, 1.7, 0.6, "kto", mean),
    "apo_zero_unpaired": lambda mean="batch": KTOLoss(0.3, 1.7, 0.6, "apo_zero_unpaired", mean),
    "bco": lambda mean="batch": with_shift(BCOLoss(0.3, 1.7, 0.6, mean)).eval(),
}


def with_shift(loss_fn: BCOLoss) -> BCOLoss:
    loss_fn.class_means, loss_fn.class_counts = torch.tensor([0.5, -0.125]), torch.tensor([3, 2])
    return loss_fn


def options_of(loss_fn) -> dict:
    return {"kl": Z0} if isinstance(loss_fn, KTOLoss) else {}


def expected(loss_fn, token_logps, batch, desirable=LABELLED, shift=None):
    """Loss and metrics by the specification, differentiable."""
    sums = reference.sequence_logprobs(token_logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    ref_logps = batch.ref_logps.double()
    if shift is None:
        shift = Z0 if isinstance(loss_fn, KTOLoss) else loss_fn.delta.double().to(DEVICE)
    loss = reference.unpaired_loss(sums, ref_logps, desirable, shift, loss_fn.objective)
    return loss, reference.unpaired_metrics(sums, ref_logps, loss_fn.objective).detach()


def expected_from_hidden(loss_fn, batch, desirable=LABELLED, shift=None, **options):
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels, batch.bias, **options)
    return expected(loss_fn, logps, batch, desirable, shift)


def call(loss_fn, batch, desirable=LABELLED, **options):
    return loss_fn.from_hidden(
        batch.hidden, batch.weight, batch.labels, desirable, batch.bias, batch.ref_logps,
        cu_seqlens=batch.cu_seqlens, **options_of(loss_fn), **options,
    )  # fmt: skip


def assert_output(out, truth) -> None:
    loss, metrics = truth
    assert_exact_or_rounded(out.loss, loss.detach(), "loss")
    assert_exact_or_rounded(out.logps, metrics[0], "log-probs")
    assert_exact_or_rounded(out.rewards, metrics[1], "rewards")
    assert not any(x.requires_grad for x in out[1:])


# The formulas


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


WORKED = {  # log-ratios 2, -1 and 0.5 (desirable, undesirable, desirable), beta 0.5, z0 0.4, weights 2 and 3
    ("kto", "batch"): (2 * (1 - sigma(0.5 * 1.6)) + 3 * (1 - sigma(0.5 * 1.4)) + 2 * (1 - sigma(0.5 * 0.1))) / 3,
    ("kto", "class"): (2 * (1 - sigma(0.8)) + 2 * (1 - sigma(0.05))) / 2 + 3 * (1 - sigma(0.7)),
    ("apo_zero_unpaired", "batch"): (2 * (1 - sigma(1.0)) + 3 * sigma(-0.5) + 2 * (1 - sigma(0.25))) / 3,
    ("apo_zero_unpaired", "class"): (2 * (1 - sigma(1.0)) + 2 * (1 - sigma(0.25))) / 2 + 3 * sigma(-0.5),
    # delta: halfway between the mean rewards (1 + 0.25) / 2 and -0.5
    ("bco", "batch"): -(2 * math.log(sigma(0.9375)) + 3 * math.log(sigma(0.5625)) + 2 * math.log(sigma(0.1875))) / 3,
    ("bco", "class"): -(2 * math.log(sigma(0.9375)) + 2 * math.log(sigma(0.1875))) / 2 - 3 * math.log(sigma(0.5625)),
}


@pytest.mark.parametrize(("loss", "mean"), WORKED)
def test_worked_values(backend, loss, mean):
    ref = torch.tensor([-10.0, -20.0, -5.0], dtype=torch.float64, device=DEVICE)
    logps = ref + torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, device=DEVICE)
    desirable = torch.tensor([True, False, True], device=DEVICE)
    if loss == "bco":
        out = BCOLoss(0.5, 2, 3, mean)(logps, desirable, ref)
        assert out.shift.item() == pytest.approx(0.0625, rel=1e-14)
    else:
        out = KTOLoss(0.5, 2, 3, loss, mean)(logps, desirable, ref, torch.full_like(ref[0], 0.4))
        assert out.kl.item() == (0.4 if loss == "kto" else 0.0)
    assert out.loss.item() == pytest.approx(WORKED[loss, mean], rel=1e-14)
    assert out.rewards.tolist() == pytest.approx([1.0, -0.5, 0.25], rel=1e-14)
    assert out.logps.tolist() == logps.tolist()
    means = (out.chosen_rewards, out.rejected_rewards, out.margins, out.chosen_logps, out.rejected_logps)
    assert torch.stack(means).tolist() == pytest.approx([0.625, -0.5, 1.125, -6.25, -21.0], rel=1e-14)


def trl_kto(logps, desirable, ref, kl, loss_type, beta, desirable_weight, undesirable_weight):
    """TRL 1.16, kto_trainer.py, `_compute_loss`: select each class, its losses, cat, nanmean."""
    chosen_logratios, rejected_logratios = (logps - ref)[desirable], (logps - ref)[~desirable]
    if loss_type == "kto":
        chosen_losses = 1 - torch.sigmoid(beta * (chosen_logratios - kl))
        rejected_losses = 1 - torch.sigmoid(beta * (kl - rejected_logratios))
    else:
        chosen_losses = 1 - torch.sigmoid(beta * chosen_logratios)
        rejected_losses = torch.sigmoid(beta * rejected_logratios)
    return torch.cat((desirable_weight * chosen_losses, undesirable_weight * rejected_losses), 0).nanmean()


def trl_bco(logps, desirable, ref, running_mean, beta):
    """TRL 1.13, bco_trainer.py, `bco_loss` without embeddings, then `losses.nanmean()`."""
    chosen_rewards, rejected_rewards = beta * (logps - ref)[desirable], beta * (logps - ref)[~desirable]
    chosen_losses = -torch.nn.functional.logsigmoid(chosen_rewards - running_mean)
    rejected_losses = -torch.nn.functional.logsigmoid(-(rejected_rewards - running_mean))
    return torch.cat((chosen_losses, rejected_losses), dim=0).nanmean()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mix", MIXES)
def test_trl_parity(backend, loss, mix):
    logps, ref, desirable = random_leaf(6, scale=8), random_leaf(6, scale=8).detach(), MIXES[mix]
    exact = in_double(logps)[0]
    if loss == "bco":
        loss_fn = BCOLoss(0.3, shift="mean")
        seen = 0.3 * random_leaf(4).detach()
        loss_fn.update_shift(seen, torch.tensor([True, True, True, False], device=DEVICE))
        running = torch.cat([seen, 0.3 * (logps - ref)]).mean().detach()
        out, truth = loss_fn(logps, desirable, ref), trl_bco(exact, desirable, ref, running, 0.3)
    else:
        out = KTOLoss(0.3, 1.7, 0.6, loss)(logps, desirable, ref, Z0)
        truth = trl_kto(exact, desirable, ref, Z0, loss, 0.3, 1.7, 0.6)
    assert_exact_or_rounded(out.loss, truth.detach())
    out.loss.backward()
    truth.backward()
    assert_exact_or_rounded(logps.grad, exact.grad)


# Every entry point and plan against the specification


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["padded", "packed32", "packed64"])
@pytest.mark.parametrize("loss", LOSSES)
def test_from_logits(backend, loss, layout, dtype):
    batch, loss_fn = paired_batch(layout=layout, dtype=dtype), LOSSES[loss]("class")
    logits = batch.logits()
    (exact,) = in_double(logits)
    out = loss_fn.from_logits(
        logits, batch.labels, LABELLED, batch.ref_logps, cu_seqlens=batch.cu_seqlens, **options_of(loss_fn)
    )
    truth = expected(loss_fn, reference.token_logprobs(exact, batch.labels), batch)
    assert out.loss.dtype == dtype
    assert_output(out, truth)
    out.loss.backward()
    truth[0].backward()
    assert_exact_or_rounded(logits.grad, exact.grad)


@pytest.mark.parametrize("plan", ["auto", "store", "pair", "recompute"])
@pytest.mark.parametrize("layout", ["padded", "packed64"])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loss", LOSSES)
def test_from_hidden(backend, loss, mean, layout, plan):
    batch, loss_fn = paired_batch(layout=layout, bias=True), LOSSES[loss](mean)
    exact = batch.double()
    out = call(loss_fn, batch, plan=plan, workspace_bytes=6 * VOCAB * 8)
    truth = expected_from_hidden(loss_fn, exact)
    assert_output(out, truth)
    out.loss.backward()
    truth[0].backward()
    assert_same_gradients(batch, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", ["auto", "pair"])
@pytest.mark.parametrize("loss", LOSSES)
def test_frozen_head_transform_and_precision(backend, loss, plan, dtype):
    batch, loss_fn = paired_batch(frozen=True, bias=True, dtype=dtype), LOSSES[loss]("class")
    exact, transform = batch.double(), TRANSFORMS["capped"]
    out = call(loss_fn, batch, plan=plan, **transform)
    truth = expected_from_hidden(loss_fn, exact, **transform)
    assert_output(out, truth)
    out.loss.backward()
    truth[0].backward()
    assert_same_gradients(batch, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_from_sequence_log_probs(backend, dtype):
    logps, ref = random_leaf(40, dtype=dtype), random_leaf(40).detach()
    desirable = torch.arange(40, device=DEVICE) % 3 > 0
    out = KTOLoss(mean="class")(logps, desirable, ref, Z0)
    (exact,) = in_double(logps)
    truth = reference.unpaired_loss(exact, ref, desirable, Z0, UnpairedObjective(mean="class"))
    assert out.loss.dtype == torch.float32
    assert_exact_or_rounded(out.loss, truth.detach())
    (3 * out.loss).backward()
    (3 * truth).backward()
    assert logps.grad.dtype == dtype
    torch.testing.assert_close(logps.grad, exact.grad.to(dtype))


def test_half_precision_hidden_states():
    """bf16 hidden states, with the specification on the same rounded values (portable: the interpreter truncates)."""
    fastpref.set_backend("portable")
    try:
        batch = paired_batch(dtype=torch.bfloat16)
        for plan in ("store", "pair"):
            out = call(KTOLoss(), batch, plan=plan)
            loss, _ = expected_from_hidden(KTOLoss(), batch.double())
            assert out.loss.dtype == torch.float32
            torch.testing.assert_close(out.loss.double(), loss.detach(), rtol=1e-2, atol=0)
            out.loss.backward()
        assert batch.hidden.grad.dtype == batch.weight.grad.dtype == torch.bfloat16
    finally:
        fastpref.set_backend("auto")


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("plan", ["store", "pair"])
def test_a_missing_class_adds_nothing(backend, loss, mix, mean, plan):
    batch, loss_fn, desirable = paired_batch(), LOSSES[loss](mean), MIXES[mix]
    out = call(loss_fn, batch, desirable, plan=plan)
    out.loss.backward()
    assert_output(out, expected_from_hidden(loss_fn, batch, desirable))
    assert batch.hidden.grad.isfinite().all() and batch.weight.grad.isfinite().all()
    assert batch.weight.grad.abs().sum() > 0
    means = torch.stack([out.chosen_rewards, out.rejected_rewards, out.chosen_logps, out.rejected_logps, out.margins])
    assert means.isfinite().all()
    if mix == "desirable":
        assert out.rejected_rewards == out.rejected_logps == 0
        assert_exact_or_rounded(out.margins, out.rewards.mean())
    if mix != "mixed" and mean == "class":  # the one class there is has the batch's mean
        assert_exact_or_rounded(out.loss, call(LOSSES[loss]("batch"), batch, desirable).loss.detach())


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_completions(backend, loss):
    """No token at all: the loss of a log-ratio of -ref, and a gradient of exactly zero."""
    batch, loss_fn = paired_batch((0, 0, 0, 0, 0, 0)), LOSSES[loss]()
    for plan in ("store", "pair", "recompute"):
        out = call(loss_fn, batch, plan=plan)
        gradients = torch.autograd.grad(out.loss, (batch.hidden, batch.weight))
        assert_output(out, expected_from_hidden(loss_fn, batch))
        assert out.logps.tolist() == [0.0] * 6
        assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios(backend, loss, dtype):
    ratios = [1e4, -1e4, 1e4, -1e4, 90.0, -90.0]
    logps = torch.tensor(ratios, dtype=dtype, device=DEVICE).requires_grad_()
    loss_fn = LOSSES[loss]()
    out = loss_fn(logps, LABELLED, torch.zeros_like(logps), **options_of(loss_fn))
    out.loss.backward()
    (exact,) = in_double(logps)
    shift = Z0 if loss != "bco" else loss_fn.delta.double().to(DEVICE)
    truth = reference.unpaired_loss(exact, torch.zeros_like(exact), LABELLED, shift, loss_fn.objective)
    truth.backward()
    assert out.loss.isfinite() and logps.grad.isfinite().all()
    assert_exact_or_rounded(out.loss, truth.detach())
    torch.testing.assert_close(logps.grad.double(), exact.grad, rtol=1e-4, atol=1e-30)


# Derivatives and operators


@pytest.mark.parametrize("entry", ["sequences", "logits", "store", "pair", "recompute"])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(backend, loss, mean, entry):
    batch, loss_fn = paired_batch((2, 3, 0, 2, 1, 1), vocab=7, width=3), LOSSES[loss](mean)
    known = options_of(loss_fn)
    if entry == "sequences":
        leaves, run = (random_leaf(6),), lambda x: loss_fn(x, LABELLED, batch.ref_logps, **known).loss
    elif entry == "logits":
        leaves = (random_leaf(6, 4, 7),)

        def run(z):
            return loss_fn.from_logits(z, batch.labels, LABELLED, batch.ref_logps, **known).loss
    else:
        leaves = (batch.hidden, batch.weight)

        def run(hidden, weight):
            plan = {"plan": entry, "workspace_bytes": 4 * 7 * 8}
            return call(loss_fn, batch._replace(hidden=hidden, weight=weight), **plan).loss

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


# Plans: products and groups


def products(run, rows: int) -> float:
    """Matrix products of `rows` scored rows with the head that `run` does."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    done = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm"):
            a, b = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
            done += 2 * a[0] * a[1] * b[1]
    return done / (2 * rows * VOCAB * WIDTH)


def rows_of(batch) -> int:
    return int((batch.labels != IGNORE).sum())


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
    """More than the kernel holds at once in either direction: 37 sequences, one of 300 tokens."""
    lengths = [300, *(i % 4 for i in range(36))]
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


# z0


def test_kto_kl(backend):
    logps = torch.tensor([-3.0, -5.0, -4.0], device=DEVICE, requires_grad=True)
    ref = torch.tensor([-4.0, -5.5, -4.75], device=DEVICE)
    assert kto_kl(logps, ref).item() == 0.75 and not kto_kl(logps, ref).requires_grad
    assert kto_kl(logps, ref + 2).item() == 0  # the mean of one-sample estimates may be negative, a KL may not
    assert reference.kto_kl(logps, ref).item() == 0.75


@pytest.mark.parametrize("layout", ["padded", "packed32"])
def test_mismatched_kl_from_hidden(backend, layout):
    batch = paired_batch(layout=layout, bias=True)
    ref = batch.ref_logps - 5
    got = mismatched_kl_from_hidden(
        batch.hidden, batch.weight, batch.labels, ref, batch.bias, batch.cu_seqlens, softcap=3.0
    )
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels, batch.bias, softcap=3.0)
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    assert_exact_or_rounded(got, reference.kto_kl(sums, ref))
    assert got > 0 and got.ndim == 0 and not got.requires_grad


def test_mismatched_indices_are_trls_rotation():
    """TRL 1.16, kto_trainer.py, `add_kl_completion_ids`, mapped over blocks of the batch size."""
    completions = list(range(11))
    blocks = [completions[i : i + 4] for i in range(0, 11, 4)]
    want = [c for block in blocks for c in [block[-1], *block[:-1]]]
    assert mismatched_indices(11, 4) == want == [3, 0, 1, 2, 7, 4, 5, 6, 10, 8, 9]
    assert mismatched_indices(5, 2) == [1, 0, 3, 2, 4]
    assert mismatched_indices(0, 2) == []


# BCO's running shift


REWARDS = [[1.0, 3.0, -2.0], [0.5, -1.0, -3.0], [4.0, 2.0, 1.0]]
CLASSES = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def run_batches(loss_fn, batches=range(3), dtype=torch.float64) -> list[float]:
    """Each batch's delta; beta = 1 and a reference of zeros, so that log-probs are rewards."""
    rewards, classes = (torch.tensor(x, device=DEVICE) for x in (REWARDS, CLASSES))
    zeros = torch.zeros(3, device=DEVICE, dtype=dtype)
    return [loss_fn(rewards[i].to(dtype), classes[i].bool(), zeros).shift.item() for i in batches]


def test_ema_by_hand():
    """Class means: desirable 2, 0.5, 7/3; undesirable -2, -2, none."""
    desirable = [2.0, 0.8 * 2 + 0.2 * 0.5, 0.8 * 1.7 + 0.2 * 7 / 3]
    want = [(2.0 - 2.0) / 2, (desirable[1] - 2.0) / 2, (desirable[2] - 2.0) / 2]
    assert run_batches(BCOLoss(1.0, decay=0.8)) == pytest.approx(want, abs=1e-14)


def test_running_mean_by_hand():
    """TRL 1.13's RunningMoments: the mean of everything seen."""
    flat = [r for batch in REWARDS for r in batch]
    want = [sum(flat[:n]) / n for n in (3, 6, 9)]
    assert run_batches(BCOLoss(1.0, shift="mean")) == pytest.approx(want, abs=1e-14)


def test_the_first_batch_may_have_one_class():
    loss_fn = BCOLoss(1.0)
    assert loss_fn.delta.item() == 0
    assert run_batches(loss_fn, [2]) == pytest.approx([7 / 3])
    assert run_batches(loss_fn, [0]) == pytest.approx([(0.9 * 7 / 3 + 0.1 * 2 - 2) / 2])


@pytest.mark.parametrize("shift", ["ema", "mean"])
def test_state_dict_round_trip(shift):
    loss_fn, other = BCOLoss(1.0, shift=shift), BCOLoss(1.0, shift=shift)
    run_batches(loss_fn, [0, 1], torch.float32)
    assert set(loss_fn.state_dict()) == {"class_means", "class_counts"}
    other.load_state_dict(loss_fn.state_dict())
    assert other.delta.item() == loss_fn.delta.item() != 0
    assert run_batches(other, [2], torch.float32) == run_batches(loss_fn, [2], torch.float32)


def test_updates_follow_the_mode_unless_told():
    logps, zeros = torch.tensor([1.0, -3.0], device=DEVICE), torch.zeros(2, device=DEVICE)
    desirable = torch.tensor([True, False], device=DEVICE)
    loss_fn = BCOLoss(1.0)
    assert loss_fn(logps, desirable, zeros, update=False).shift == 0
    assert loss_fn.eval()(logps, desirable, zeros).shift == 0
    assert loss_fn(logps, desirable, zeros, update=True).shift == -1
    assert loss_fn.class_counts.tolist() == [1, 1]
    loss_fn.train()(logps, desirable, zeros)
    assert loss_fn.class_counts.tolist() == [2, 2]


@pytest.mark.parametrize("entry", ["logits", "store", "recompute", "frozen"])
@pytest.mark.parametrize("layout", ["padded", "packed64"])
def test_bco_updates_from_its_batch_before_the_loss(backend, layout, entry):
    batch, loss_fn = paired_batch(layout=layout, frozen=entry == "frozen"), BCOLoss(0.3)
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels)
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens).detach()
    rewards = 0.3 * (sums - batch.ref_logps)
    delta = (rewards[LABELLED].mean() + rewards[~LABELLED].mean()) / 2
    if entry == "logits":
        out = loss_fn.from_logits(batch.logits(), batch.labels, LABELLED, batch.ref_logps, batch.cu_seqlens)
    else:
        out = call(loss_fn, batch, plan=entry)
    assert_exact_or_rounded(out.shift, delta)
    assert_output(out, expected(loss_fn, logps, batch, shift=delta))


def test_bco_with_the_shift_of_the_batch_before(backend):
    """Three products in bounded memory: the loss first, the update from its rewards."""
    batch, loss_fn = paired_batch(), BCOLoss(0.3)
    assert products(lambda: call(loss_fn, batch, update=True, plan="recompute").loss.backward(), rows_of(batch)) == 4
    before = loss_fn.delta.clone()
    out = call(loss_fn, batch, update=False, plan="pair")
    assert_exact_or_rounded(out.shift, before.double())
    loss_fn.update_shift(out.rewards, out.desirable)
    assert loss_fn.class_counts.tolist() == [6, 6]


RANK = """
import sys, torch, torch.distributed as dist
from fastpref import BCOLoss, kto_kl
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
logps = [torch.tensor([1.0, 2.0]), torch.tensor([-6.0, 5.0, 4.0, 7.0])][rank]
desirable = [torch.tensor([True, True]), torch.tensor([False, True, True, True])][rank]
loss_fn = BCOLoss(1.0)
out = loss_fn(logps, desirable, torch.zeros_like(logps))
print(kto_kl(logps, torch.zeros_like(logps)).item(), kto_kl(-logps, torch.zeros_like(logps)).item(),
      out.shift.item(), *loss_fn.class_counts.tolist())
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path):
    """z0: the mean of the ranks' means 1.5 and 2.5; delta: between 19 / 5 and -6, wherever the sequences are."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for r in range(2)
    ]
    results = [rank.communicate(timeout=100)[0].split() for rank in ranks]
    for result in results:
        assert [float(x) for x in result] == pytest.approx([2.0, 0.0, (3.8 - 6) / 2, 5, 1])


# Errors


def kto(**changes):
    inputs = {
        "logps": torch.zeros(3), "desirable": torch.ones(3, dtype=torch.bool), "ref_logps": torch.zeros(3),
        "kl": torch.tensor(0.0),
    }  # fmt: skip
    return KTOLoss()(**inputs | changes)


def kto_from_hidden(labels=None, weight=None, **changes):
    labels = torch.zeros(3, 2, dtype=torch.long) if labels is None else labels
    hidden, weight = torch.zeros(*labels.shape, 4), torch.zeros(5, 4, requires_grad=True)
    inputs = {"desirable": torch.ones(3, dtype=torch.bool), "ref_logps": torch.zeros(3), "kl": torch.tensor(0.0)}
    return KTOLoss().from_hidden(hidden, weight, labels, **inputs | changes)


EDGES = torch.tensor([0, 2, 4, 6])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: KTOLoss(loss_type="bco"), ValueError, "loss_type: got 'bco', want one of kto, apo_zero_unpaired"),
        (lambda: KTOLoss(mean="sum"), ValueError, "mean: got 'sum', want one of batch, class"),
        (lambda: KTOLoss(beta=0), ValueError, "beta: got 0, want a finite number greater than 0"),
        (lambda: KTOLoss(desirable_weight="1"), TypeError,
         "desirable_weight: got str, want a number greater than 0"),
        (lambda: BCOLoss(undesirable_weight=-1.0), ValueError,
         "undesirable_weight: got -1.0, want a finite number greater than 0"),
        (lambda: BCOLoss(shift="last"), ValueError, "shift: got 'last', want one of ema, mean"),
        (lambda: BCOLoss(decay=1.0), ValueError, "decay: got 1.0, want a number in [0.0, 1.0)"),
        (lambda: kto(kl=None), ValueError,
         "kl: got None, want the detached z0 (0-d; see fastpref.kto_kl) for loss_type 'kto'"),
        (lambda: kto(kl=0.5), TypeError, "kl: got float, want a torch.Tensor"),
        (lambda: kto(kl=torch.zeros(3)), ValueError, "kl: got shape (3,), want () (one z0 for the batch)"),
        (lambda: kto_from_hidden(plan="pair", kl=None), ValueError,
         "kl: got None, want the detached z0 (0-d; see fastpref.kto_kl) for loss_type 'kto'"),
        (lambda: kto(ref_logps=None), ValueError,
         "ref_logps: got None, want the reference model's log-probs [3]"),
        (lambda: kto(ref_logps=torch.zeros(2)), ValueError,
         "ref_logps: got shape (2,), want (3,) (one per sequence)"),
        (lambda: kto(desirable=torch.ones(3)), TypeError, "desirable: got dtype float32, want bool"),
        (lambda: kto(desirable=torch.ones(4, dtype=torch.bool)), ValueError,
         "desirable: got shape (4,), want (3,) (one per sequence)"),
        (lambda: kto(desirable=torch.ones(3, dtype=torch.bool, device="meta")), ValueError,
         "desirable: got device meta, want cpu (the device of the policy's log-probs)"),
        (lambda: kto(logps=torch.zeros(0)), ValueError, "logps: got no sequences, want at least 1"),
        (lambda: kto(logps=torch.zeros(3, 1)), ValueError, "logps: got shape (3, 1), want a 1-d tensor"),
        (lambda: kto_from_hidden(torch.zeros(6, dtype=torch.long)), ValueError,
         "labels: got shape (6,) without cu_seqlens, want [S, T] (padded), or pass cu_seqlens for packed rows [N]"),
        (lambda: kto_from_hidden(cu_seqlens=EDGES), ValueError,
         "labels: got shape (3, 2) with cu_seqlens, want packed rows [N]"),
        (lambda: kto_from_hidden(torch.zeros(0, dtype=torch.long), cu_seqlens=EDGES[:1]), ValueError,
         "cu_seqlens: got no sequences, want at least 1"),
        (lambda: kto_from_hidden(torch.zeros(7, dtype=torch.long), cu_seqlens=EDGES), ValueError,
         "cu_seqlens: got [0, 2, 4, 6], want ascending offsets from 0 to the number of rows, 7"),
        (lambda: kto_from_hidden(torch.full((3, 2), 5)), ValueError,
         "labels: got 5 at row 0, want a token in [0, 5) or ignore_index=-100"),
        (lambda: BCOLoss().from_hidden(
            torch.zeros(1, 2, 4), torch.zeros(5, 4), torch.zeros(1, 2, dtype=torch.long), LABELLED[:1].cpu(),
            ref_logps=torch.zeros(1), plan="pair"),
         ValueError, "plan: got 'pair' while delta is updated from the same batch, want update=False"),
        (lambda: kto_kl(torch.zeros(0), torch.zeros(0)), ValueError, "logps: got no sequences, want at least 1"),
        (lambda: kto_kl(torch.zeros(2), torch.zeros(3)), ValueError,
         "ref_logps: got shape (3,), want (2,) (one per sequence)"),
        (lambda: mismatched_indices(4, 1), ValueError,
         "block_size: got 1, want at least 2 (a sequence alone has no other completion)"),
    ],
)  # fmt: skip
def test_errors(make, kind, message):
    fastpref.set_backend("portable")
    try:
        with pytest.raises(kind) as error:
            make()
    finally:
        fastpref.set_backend("auto")
    assert str(error.value) == message


def test_repr_says_what_differs():
    assert repr(KTOLoss(undesirable_weight=1.5)) == "KTOLoss(loss='kto', undesirable_weight=1.5)"
    assert repr(BCOLoss(0.2)) == "BCOLoss(loss='bco', beta=0.2, shift='ema', decay=0.9)"
