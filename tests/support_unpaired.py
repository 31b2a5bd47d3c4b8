"""What the tests of unpaired losses share."""

from __future__ import annotations

import torch
from support import DEVICE, IGNORE, assert_exact_or_rounded
from torch.profiler import ProfilerActivity, profile

from fastpref import BCOLoss, KTOLoss, reference

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
