"""Floating-point operations, counted from the matrix products that really run.

A row costs 2 d V operations a product; ignored rows (half of them here) and gradients that nobody needs cost none.
"""

from __future__ import annotations

import math

import pytest
import torch
from support import IGNORE, PairedBatch, from_hidden, paired_batch, random_leaf
from torch.profiler import ProfilerActivity, profile

from fastpref import DPOLoss, linear_token_logprobs, linear_token_statistics

VOCAB, WIDTH = 257, 8
LENGTHS = (6, 5, 6, 7)  # 24 scored rows of 4 x 12
ROW = 2 * WIDTH * VOCAB

# (operator, index of the first factor among the inputs)
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::bmm": 0, "aten::baddbmm": 1, "aten::mv": 0, "aten::addmv": 1}


def count_flops(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        function()
    total = 0
    for event in trace.events():
        if event.name in PRODUCTS:
            first = PRODUCTS[event.name]
            a, b = event.input_shapes[first : first + 2]
            total += 2 * math.prod(a) * (b[-1] if len(b) > 1 else 1)
    return total


def half_ignored(*, frozen=False) -> PairedBatch:
    batch = paired_batch(LENGTHS, vocab=VOCAB, width=WIDTH, frozen=frozen, dtype=torch.float32)
    pad = torch.full_like(batch.labels[:, :4], IGNORE)
    hidden = torch.cat([batch.hidden.detach(), torch.randn_like(batch.hidden[:, :4])], 1).requires_grad_()
    batch = batch._replace(hidden=hidden, labels=torch.cat([batch.labels, pad], 1))
    assert (batch.labels != IGNORE).sum() * 2 == batch.labels.numel() == 48
    return batch


def workspace(rows: int) -> int:
    return rows * VOCAB * 4


def test_the_counter_counts():
    a, b, c = random_leaf(3, 5), random_leaf(5, 7), random_leaf(7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.nn.functional.linear(a, b.t(), c)) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    out = torch.empty_like(a @ b)
    assert count_flops(lambda: torch.addmm(out, a.detach(), b.detach(), out=out)) == 2 * 3 * 5 * 7


# one tile, or tiles of 5 rows and slices of 128 columns: the same products
@pytest.mark.parametrize("rows", [100, 5])
@pytest.mark.parametrize(
    ("plan", "products"), [("no_grad", 1), ("frozen", 2), ("store", 3), ("recompute", 4)], ids=lambda x: str(x)
)
def test_token_logprobs(backend, plan, products, rows):
    batch = half_ignored(frozen=plan == "frozen")
    options = {"plan": plan, "workspace_bytes": workspace(rows)}

    def step():
        logps = linear_token_logprobs(batch.hidden, batch.weight, batch.labels, **options)
        if plan != "no_grad":
            logps.sum().backward()

    with torch.set_grad_enabled(plan != "no_grad"):
        assert count_flops(step) == products * 24 * ROW


@pytest.mark.parametrize(
    ("plan", "looked_at", "differentiated"), [("frozen", 2, 4), ("store", 3, 3), ("recompute", 4, 4)]
)
def test_an_entropy_beside_the_log_probs(backend, plan, looked_at, differentiated):
    """Looking at it costs no product; its gradient only where what plan `frozen` kept does not give it."""
    batch = half_ignored(frozen=plan == "frozen")
    for detached, products in ((True, looked_at), (False, differentiated)):

        def step(detached=detached):
            found = linear_token_statistics(batch.hidden, batch.weight, batch.labels, None, ("entropy",), plan=plan)
            entropy = found.entropy.detach() if detached else found.entropy
            (found.logps + entropy).sum().backward()

        assert count_flops(step) == products * 24 * ROW


@pytest.mark.parametrize(
    ("plan", "rows", "products"),
    [
        ("no_grad", 100, 1),
        ("frozen", 100, 2),
        ("store", 100, 3),
        ("pair", 100, 3),  # one group
        ("pair", 12, 3),  # each pair alone
        ("recompute", 100, 4),
        ("pair", 5, 4),  # no pair fits: all are recomputed
    ],
)
def test_from_hidden(backend, plan, rows, products):
    batch, loss_fn = half_ignored(frozen=plan == "frozen"), DPOLoss()

    def step():
        out = from_hidden(loss_fn, batch, plan=plan, workspace_bytes=workspace(rows))
        if plan != "no_grad":
            out.loss.backward()

    with torch.set_grad_enabled(plan != "no_grad"):
        assert count_flops(step) == products * 24 * ROW


@pytest.mark.parametrize("entry", ["token_logprobs", "from_hidden"])
@pytest.mark.parametrize(
    ("trainable", "rows", "products"),
    [
        ("", 100, 1),
        ("hidden", 100, 2),
        ("hidden weight", 100, 3),
        ("weight", 100, 2),  # the trunk is frozen
    ],
)
def test_auto_does_no_work_for_frozen_inputs(backend, trainable, rows, products, entry):
    batch = half_ignored()
    for name in ("hidden", "weight"):
        getattr(batch, name).requires_grad_(name in trainable.split())

    def step():
        if entry == "from_hidden":
            result = from_hidden(DPOLoss(), batch, workspace_bytes=workspace(rows)).loss
        else:
            result = linear_token_logprobs(
                batch.hidden, batch.weight, batch.labels, workspace_bytes=workspace(rows)
            ).sum()
        if trainable:
            result.backward()

    assert count_flops(step) == products * 24 * ROW


@pytest.mark.parametrize(
    ("plan", "trainable", "products"),
    [
        ("store", "hidden", 2),
        ("store", "weight", 2),
        ("pair", "hidden", 2),
        ("pair", "weight", 2),
        ("recompute", "hidden", 3),
        ("recompute", "weight", 3),
    ],
)
def test_no_plan_works_for_frozen_inputs(backend, plan, trainable, products):
    batch = half_ignored()
    for name in ("hidden", "weight"):
        getattr(batch, name).requires_grad_(name == trainable)
    assert count_flops(lambda: from_hidden(DPOLoss(), batch, plan=plan).loss.backward()) == products * 24 * ROW


def test_all_rows_ignored_cost_nothing(backend):
    batch = half_ignored()
    labels = torch.full_like(batch.labels, IGNORE)
    for plan in ("store", "pair", "recompute"):
        step = batch._replace(labels=labels)
        assert count_flops(lambda step=step, plan=plan: from_hidden(DPOLoss(), step, plan=plan).loss.backward()) == 0
