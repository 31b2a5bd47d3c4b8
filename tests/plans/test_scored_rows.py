"""`scored_rows`: what the host knows of the scored rows changes no value, and nothing waits for a device any more."""

from __future__ import annotations

import pytest
import torch
from counting import Watch
from support import IGNORE, assert_exact_or_rounded, assert_same_gradients, from_hidden, paired_batch

import fastpref
from fastpref import DPOLoss, IPOLoss, KTOLoss, ORPOLoss, PolicyGradientLoss, linear_token_kl, linear_token_logprobs
from fastpref.common import checks

VOCAB = 137
LENGTHS = (3, 5, 2, 4, 0, 5)  # of the scored tokens of paired_batch
TOTAL = sum(LENGTHS)
ONE_PAIR = 9 * VOCAB * 8  # bytes: groups of a pair each


def batch(**options):
    torch.manual_seed(0)
    return paired_batch(LENGTHS, vocab=VOCAB, bias=True, **options)


def policy(x, **options):
    advantages = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64)
    nan = torch.where(x.labels == IGNORE, float("nan"), -2.0).double()  # of ignored rows, anything
    loss_fn = PolicyGradientLoss(beta=0.1, entropy_coef=0.1)
    out = loss_fn.from_hidden(x.hidden, x.weight, x.labels, advantages, nan, nan, x.bias, x.cu_seqlens, **options)
    return out.loss, torch.stack([out.logps.sum(), out.kl, out.entropy])


def kl(x, **options):
    generator = torch.Generator().manual_seed(1)
    ref = (torch.randn(s, generator=generator, dtype=x.hidden.dtype) for s in (x.hidden.shape, x.weight.shape))
    out = linear_token_kl(x.hidden, x.weight, *ref, x.labels, x.bias, **options)
    return out.kl.sum(), torch.stack([out.logps, out.ref_logps])


def logps(x, **options):
    values = linear_token_logprobs(x.hidden, x.weight, x.labels, x.bias, **options)
    upstream = torch.where(x.labels == IGNORE, float("nan"), 1.0)
    return torch.where(x.labels == IGNORE, 0, values * upstream).sum(), values.detach()


def entropies(x, **options):
    found = fastpref.linear_token_statistics(x.hidden, x.weight, x.labels, x.bias, **options)
    return (found.logps + found.entropy).sum(), torch.stack([found.logps, found.mean_logit]).detach()


def paired(loss_fn):
    def call(x, **options):
        out = from_hidden(loss_fn, x, **options)
        return out.loss, torch.stack(out[1:])

    return call


def kto(x, **options):
    desirable = torch.arange(len(LENGTHS)) % 2 == 0
    out = KTOLoss().from_hidden(
        x.hidden, x.weight, x.labels, desirable, x.bias, x.ref_logps, x.ref_logps.new_zeros(()), x.cu_seqlens, **options
    )
    return out.loss, torch.stack([out.logps, out.rewards])


def orpo(x, **options):
    out = ORPOLoss().from_hidden(x.hidden, x.weight, x.labels, x.bias, None, x.cu_seqlens, **options)
    return out.loss, torch.stack(out[1:])


# (call, options, how the rows are known): at most, or of each sequence
CASES = [
    (logps, {"plan": "store"}, TOTAL + 2),
    (logps, {"plan": "recompute"}, TOTAL + 2),
    (logps, {"plan": "frozen"}, TOTAL + 2),
    (logps, {}, TOTAL),
    (entropies, {"plan": "store"}, TOTAL + 2),
    (entropies, {"plan": "frozen"}, TOTAL + 2),
    (kl, {"plan": "store"}, TOTAL + 2),
    (kl, {"plan": "recompute"}, TOTAL + 2),
    (kl, {"plan": "frozen"}, TOTAL + 2),
    (policy, {}, TOTAL + 2),
    (paired(DPOLoss()), {}, TOTAL + 2),
    (paired(DPOLoss(ld_alpha=0.5, use_weighting=True)), {"plan": "pair", "workspace_bytes": ONE_PAIR}, LENGTHS),
    (paired(IPOLoss()), {"plan": "pair"}, LENGTHS),
    (kto, {"plan": "pair", "workspace_bytes": ONE_PAIR}, LENGTHS),
    (kto, {"plan": "store"}, LENGTHS),
    (orpo, {}, LENGTHS),
]


@pytest.mark.parametrize("layout", ["padded", "packed64"])
@pytest.mark.parametrize(("call", "options", "known"), CASES)
def test_same_values_and_nothing_waits(call, options, known, layout, backend, monkeypatch):
    found = []
    for given in ({}, {"scored_rows": known}):
        x = batch(layout=layout, frozen=options.get("plan") == "frozen")
        watch = Watch(monkeypatch) if given else None
        if watch:
            watch.start()
        try:
            loss, values = call(x, **options, **given)
            loss.backward()
        finally:
            if watch:
                watch.stop()
                assert watch.ours == []
        found.append((x, loss, values))
    (truth, loss, values), (got, got_loss, got_values) = found
    assert_exact_or_rounded(got_loss, loss)
    assert_exact_or_rounded(got_values, values)
    truth_gradients = truth._replace(hidden=_with_gradient(truth.hidden))
    assert_same_gradients(got, truth_gradients)


def _with_gradient(hidden):
    assert hidden.grad is not None
    return hidden


@pytest.mark.parametrize(("call", "options"), [(c, o) for c, o, known in CASES if isinstance(known, int)])
def test_too_few_rows_are_an_error_on_a_cpu_and_nan_on_an_accelerator(call, options, monkeypatch):
    x = batch(frozen=options.get("plan") == "frozen")
    with pytest.raises(ValueError, match=f"scored_rows: got {TOTAL - 1}, want at least {TOTAL}, the labels that are"):
        call(x, **options, scored_rows=TOTAL - 1)
    monkeypatch.setattr(checks, "free_to_read", lambda value: False)
    loss, _ = call(x, **options, scored_rows=TOTAL - 1)
    assert loss.isnan()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("19", TypeError, "scored_rows: got str, want an int"),
        (1.0, TypeError, "scored_rows: got float"),
        (1000, ValueError, "scored_rows: got 1000, want at most the 36 labels"),
        (-1, ValueError, "scored_rows: got -1"),
        (LENGTHS[:4], ValueError, "scored_rows: got 4 counts, want one for each of 6 sequences"),
        ((3, 5, 2, 4, 1, 4), ValueError, r"scored_rows: got offsets \[0, 3, 8, 10, 14, 15, 19\], want those of"),
    ],
)
def test_errors(given, error, message):
    with pytest.raises(error, match=message):
        from_hidden(DPOLoss(), batch(), plan="pair", scored_rows=given)


def test_plain_labels_ask_the_device_once_and_the_plan_counts_scored_rows(monkeypatch):
    """Prompt rows fill no workspace: `store` where the scored ones fit, and whoever counted them has the answer."""
    for workspace, plan in ((TOTAL, "linear_token_logprobs"), (TOTAL - 1, "linear_paired_loss")):
        watch = Watch(monkeypatch)
        with watch as operators:
            from_hidden(DPOLoss(), batch(), workspace_bytes=workspace * VOCAB * 8).loss.backward()
        assert plan in operators.of_fastpref
        assert len(watch.ours) == 1
    watch = Watch(monkeypatch)
    with watch:
        linear_token_logprobs(*batch()[:2], batch().labels)
    assert len(watch.ours) == 1


def test_one_shape_of_products_for_batches_that_differ(monkeypatch):
    """What a CUDA graph replays: the same launches whatever is scored."""
    launches = []
    for lengths in ((3, 5, 2, 4, 0, 5), (1, 5, 1, 1, 2, 3)):
        x, watch = paired_batch(lengths, vocab=VOCAB), Watch(monkeypatch)
        with watch as operators:
            from_hidden(DPOLoss(), x, plan="store", scored_rows=24).loss.backward()
        assert watch.ours == []
        launches.append((operators.launches, [x.shape for x in operators.touched]))
    assert launches[0] == launches[1]
