"""Every plan, the row kernels and the paired loss, at sizes for a laptop.

    python -m pytest benchmarks --benchmark-only

For watching a change, not for quoting: what is quoted comes from `python -m benchmarks.head`.
"""

from __future__ import annotations

import pytest
import torch

import fastpref
from benchmarks import measure, peers
from benchmarks.head import Case, make_batch
from fastpref.backends import backend_for
from fastpref.reference import LogitTransform, PairedObjective

PAIRS, SEQ_LEN, D, VOCAB = 2, 64, 256, 8192
ROWS = 2 * PAIRS * SEQ_LEN
SCORED = {"dense": ROWS, "half masked": ROWS // 2}
# plan, is the head trained, matrix products of forward and backward
PLANS = (
    ("no_grad", False, 1),
    ("frozen", False, 2),
    ("store", False, 2),
    ("store", True, 3),
    ("pair", False, 2),
    ("pair", True, 3),
    ("recompute", False, 3),
    ("recompute", True, 4),
)


@pytest.mark.parametrize("rows", SCORED)
@pytest.mark.parametrize(
    ("plan", "trainable", "products"), PLANS, ids=[f"{p}-{'trainable' if t else 'frozen'}" for p, t, _ in PLANS]
)
def test_plan(rated, device, plan, trainable, products, rows) -> None:
    case = Case("plan", D, VOCAB, PAIRS, SEQ_LEN, SCORED[rows], torch.float32, trainable=trainable)
    batch = make_batch(case, device)
    loss = fastpref.DPOLoss(beta=peers.BETA)

    def run() -> None:
        batch.clear_gradients()
        with torch.set_grad_enabled(plan != "no_grad"):
            out = loss.from_hidden(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, plan=plan)
        if plan != "no_grad":
            out.loss.backward()

    rated(run, flops=case.flops(products))


@pytest.mark.parametrize(("kernel", "passes"), [("forward", 1), ("forward_with_u", 3), ("gradient", 2)])
@pytest.mark.parametrize("rows", SCORED)
def test_rows(rated, device, kernel, passes, rows) -> None:
    """On logits: the forward reads them once; with U in place it reads them twice and writes them; the gradient
    reads and writes once. Masked rows count: nothing was compacted here."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB, device=device)
    labels = torch.randint(VOCAB, (ROWS,), device=device)
    labels[SCORED[rows] :] = peers.IGNORE
    u, backend = logits.clone(), backend_for(logits)
    options = {"transform": LogitTransform(), "ignore_index": peers.IGNORE}
    done = backend.row_logprob(logits, labels, **options)
    calls = {
        "forward": lambda: backend.row_logprob(logits, labels, **options),
        "forward_with_u": lambda: backend.row_logprob(u, labels, write_u=True, **options),
        "gradient": lambda: backend.row_gradient(logits, labels, done["logps"], done["lse"], u, **options),
    }
    rated(calls[kernel], bytes=measure.row_bytes(ROWS, VOCAB, logits.element_size(), passes))


def test_paired_loss(rated, device) -> None:
    """One launch over 16 pairs of 256 tokens: reads a log-prob and a label a token, writes a coefficient."""
    torch.manual_seed(0)
    pairs, seq_len = 16, 256
    tokens = 2 * pairs * seq_len
    logps, ref_logps = -torch.rand(tokens, device=device), -seq_len / 2 * torch.ones(2 * pairs, device=device)
    labels = torch.zeros(tokens, dtype=torch.long, device=device)
    backend = backend_for(logps)

    def run() -> None:
        backend.paired_loss(
            logps, labels, None, ref_logps, None, None, None, PairedObjective(),
            num_pairs=pairs, total_pairs=pairs, ignore_index=peers.IGNORE,
        )  # fmt: skip

    rated(run, bytes=tokens * (logps.element_size() * 2 + labels.element_size()))
