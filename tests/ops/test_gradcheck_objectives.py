"""Every objective beyond DPOLoss's own table, from every entry point, on both backends: fp64 gradcheck at rtol 1e-6.

By random projections (fast mode): what each entry point's operators do to every single element is checked by
test_gradcheck.py; here it is the wiring and the formulas. WPO's weights are constants by definition, so that its
gradient is not the derivative of its value; test_reference_free.py holds it against TRL's text instead.
"""

from __future__ import annotations

import pytest
import torch
from support import paired_batch
from support_unpaired import LABELLED, LOSSES, MEANS, options_of
from torch.autograd import gradcheck

import fastpref
from fastpref import CPOLoss, DPOLoss, IPOLoss, ORPOLoss, PolicyGradientLoss, SimPOLoss

EXACT = {"rtol": 1e-6, "atol": 1e-8, "nondet_tol": 0.0, "fast_mode": True}
PAIRED = {
    "ipo": IPOLoss(0.3),
    "ipo per token": IPOLoss(0.3, length_normalize=True),
    "ld-dpo": DPOLoss(0.3, ld_alpha=0.4),
    "mpo": DPOLoss(0.3, ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "simpo": SimPOLoss(2.0, 0.5, label_smoothing=0.1),
    "cpo": CPOLoss(0.3),
    "cpo hinge": CPOLoss(0.3, loss_type="hinge"),
    "cpo ipo": CPOLoss(0.3, loss_type="ipo"),
    "alphapo": CPOLoss(2.0, loss_type="simpo", alphapo_alpha=0.25),
    "orpo": ORPOLoss(0.3),
}
ENTRIES = ("log-probs", "logits", "hidden")


def small_batch():
    return paired_batch((2, 3, 1, 2), vocab=7, width=3)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", PAIRED)
def test_paired(backend, name, entry):
    loss_fn, batch = PAIRED[name], small_batch()
    refs = batch.ref_logps if loss_fn.with_reference else None
    if entry == "log-probs":
        sums = (torch.rand(4, dtype=torch.float64) * -5 - 1).to(batch.hidden.device).requires_grad_()
        lengths = torch.tensor([2, 3, 1, 2], device=sums.device).chunk(2)
        pairs = refs.chunk(2) if refs is not None else (None, None)
        assert gradcheck(lambda s: loss_fn(*s.chunk(2), *pairs, *lengths).loss, (sums,), **EXACT)
    elif entry == "logits":
        assert gradcheck(lambda z: loss_fn.from_logits(z, batch.labels, refs).loss, (batch.logits(),), **EXACT)
    else:
        plans = {"plan": "pair", "workspace_bytes": 4 * 7 * 8}  # a pair at a time, the larger one recomputed

        def loss(hidden, weight):
            return loss_fn.from_hidden(hidden, weight, batch.labels, ref_logps=refs, **plans).loss

        assert gradcheck(loss, (batch.hidden, batch.weight), **EXACT)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", LOSSES)
def test_unpaired(backend, name, mean, entry):
    loss_fn, batch = LOSSES[name](mean), small_batch()
    desirable, options = LABELLED[:4], options_of(LOSSES[name](mean))
    if entry == "log-probs":
        sums = torch.randn(4, dtype=torch.float64).to(batch.hidden.device).requires_grad_()
        assert gradcheck(lambda s: loss_fn(s, desirable, batch.ref_logps, **options).loss, (sums,), **EXACT)
    elif entry == "logits":

        def loss_of_logits(z):
            return loss_fn.from_logits(z, batch.labels, desirable, batch.ref_logps, **options).loss

        assert gradcheck(loss_of_logits, (batch.logits(),), **EXACT)
    else:

        def loss(hidden, weight):
            return loss_fn.from_hidden(
                hidden, weight, batch.labels, desirable, ref_logps=batch.ref_logps, plan="pair", **options
            ).loss

        assert gradcheck(loss, (batch.hidden, batch.weight), **EXACT)


@pytest.mark.parametrize("entry", ENTRIES)
def test_policy_gradient(backend, entry):
    loss_fn, batch = PolicyGradientLoss(0.2, 0.3, beta=0.1, entropy_coef=0.05), small_batch()
    logits = batch.logits()
    tokens = fastpref.token_statistics(logits.detach(), batch.labels, ("entropy",))
    old, ref = (tokens.logps + 0.3 * torch.randn_like(tokens.logps) for _ in range(2))
    rest = (batch.labels, torch.randn(4, dtype=torch.float64, device=logits.device), old, ref)
    if entry == "log-probs":
        leaves = tokens.logps.clone().requires_grad_(), tokens.entropy.clone().requires_grad_()
        assert gradcheck(lambda p, h: loss_fn(p, *rest, entropy=h).loss, leaves, **EXACT)
    elif entry == "logits":
        assert gradcheck(lambda z: loss_fn.from_logits(z, *rest).loss, (logits,), **EXACT)
    else:
        assert gradcheck(lambda h, w: loss_fn.from_hidden(h, w, *rest).loss, (batch.hidden, batch.weight), **EXACT)
