"""Unpaired losses: what a wrong argument says."""

from __future__ import annotations

import pytest
import torch
from support_unpaired import LABELLED

import fastpref
from fastpref import BCOLoss, KTOLoss, kto_kl, mismatched_indices


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
