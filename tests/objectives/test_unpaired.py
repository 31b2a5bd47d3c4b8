"""KTO, APO-zero-unpaired and BCO: worked values, TRL's text, and the specification through every entry point."""

from __future__ import annotations

import math

import pytest
import torch
from support import (
    DEVICE,
    TRANSFORMS,
    assert_exact_or_rounded,
    assert_same_gradients,
    in_double,
    paired_batch,
    random_leaf,
)
from support_unpaired import (
    LABELLED,
    LOSSES,
    MEANS,
    MIXES,
    VOCAB,
    Z0,
    assert_output,
    call,
    expected,
    expected_from_hidden,
    options_of,
)

import fastpref
from fastpref import BCOLoss, KTOLoss, reference
from fastpref.reference import UnpairedObjective


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
