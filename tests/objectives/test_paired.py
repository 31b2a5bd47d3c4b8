"""DPOLoss against the specification: three entry points, both batch layouts, every loss type."""

from __future__ import annotations

import json

import pytest
import torch
from support import (
    DEVICE,
    IGNORE,
    assert_exact_or_rounded,
    assert_same_gradients,
    expected_dpo,
    expected_from_hidden,
    from_hidden,
    in_double,
    paired_batch,
    random_leaf,
)

from fastpref import DPOLoss, reference, token_statistics
from fastpref.objectives.paired import DPO_LOSS_TYPES, WITH_DIVERGENCE
from fastpref.reference import F_DIVERGENCES

DTYPES = (torch.float32, torch.float64)
LAYOUTS = ("padded", "packed32", "packed64")
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft", "ipo"], "loss_weights": [0.8, 0.2, 1.5, 0.01]}


def assert_output(got, want, dtype) -> None:
    """`want` is the loss and metrics that the specification gives in fp64."""
    assert got.loss.shape == () and got.loss.requires_grad
    for name, value, truth in zip(got._fields, got, (want.loss, *want.metrics), strict=True):
        assert value.dtype == dtype, name
        assert name == "loss" or not value.requires_grad, name
        assert_exact_or_rounded(value, truth, name)


def by_entry_point(entry: str, loss_fn, batch):
    """(output, expected, leaf, fp64 leaf of the expectation) of one of the ways from batch to loss."""
    truth = batch.double()
    if entry == "from_hidden":
        return from_hidden(loss_fn, batch), expected_from_hidden(loss_fn, truth), batch.hidden, truth.hidden
    logits = batch.logits()
    (exact,) = in_double(logits)
    got = loss_fn.from_logits(logits, batch.labels, batch.ref_logps, batch.cu_seqlens)
    logps = reference.token_logprobs(exact, batch.labels)
    return got, expected_dpo(loss_fn, logps, batch.labels, truth.ref_logps, batch.cu_seqlens), logits, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("entry", ["from_logits", "from_hidden"])
@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_every_loss_from_tokens(backend, name, entry, layout, dtype):
    loss_fn = DPOLoss(loss_type=name, label_smoothing=0.1)
    got, want, leaf, exact = by_entry_point(entry, loss_fn, paired_batch(layout=layout, dtype=dtype))
    assert_output(got, want, dtype)
    got.loss.backward()
    want.loss.backward()
    assert_exact_or_rounded(leaf.grad, exact.grad, "gradient")


def call(loss_fn, pairs: int, dtype=torch.float64, spread: float = 3.0):
    """(output, expected, leaves, fp64 leaves) of the call on sequence log-probs."""
    leaves = [random_leaf(pairs, dtype=dtype, scale=spread) for _ in range(2)]
    refs = [random_leaf(pairs, dtype=dtype, scale=spread).detach() for _ in range(2)]
    lengths = [torch.randint(1, 9, (pairs,), device=DEVICE) for _ in range(2)]
    exact = in_double(*leaves)
    got = loss_fn(*leaves, *refs, *lengths)
    columns = (*exact, *in_double(*refs), *(x.double() for x in lengths))
    loss = reference.paired_loss(*columns, loss_fn.objective)
    metrics = reference.paired_metrics(*columns, loss_fn.objective).detach()
    return got, loss, metrics, leaves, exact


def check_call(loss_fn, pairs: int, dtype=torch.float64) -> None:
    got, loss, metrics, leaves, exact = call(loss_fn, pairs, dtype)
    for name, value, truth in zip(got._fields, got, (loss, *metrics), strict=True):
        assert value.dtype == dtype
        assert_exact_or_rounded(value, truth, name)
    got.loss.backward()
    loss.backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert_exact_or_rounded(leaf.grad, torch.zeros_like(want) if want.grad is None else want.grad, "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "pairs",
    [
        1,
        5,
        16,  # the kernel's block of pairs
        37,  # three blocks, the last one short
    ],
)
@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_every_loss_from_sequence_logprobs(backend, name, pairs, dtype):
    check_call(DPOLoss(loss_type=name, label_smoothing=0.1), pairs, dtype)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", sorted(WITH_DIVERGENCE))
def test_every_divergence(backend, name, divergence):
    check_call(DPOLoss(0.3, name, 0.1, divergence, f_alpha_divergence_coef=0.7), 5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.0 + 1e-7, 2.0])
def test_alpha_divergence(backend, alpha):
    """At 1 it is the reverse KL; beyond 1 its exponent grows with the log-ratio."""
    check_call(DPOLoss(f_divergence="alpha_divergence", f_alpha_divergence_coef=alpha), 5)


def test_the_alpha_divergence_stays_finite_beyond_its_clamp(backend):
    chosen = torch.tensor([-500.0, -1.0], device=DEVICE, requires_grad=True)  # (alpha - 1) x = 250 > 80
    zero = torch.zeros(2, device=DEVICE)
    out = DPOLoss(f_divergence="alpha_divergence")(chosen, zero, zero, zero)
    out.loss.backward()
    assert out.loss.isfinite() and chosen.grad.isfinite().all() and chosen.grad[0] == 0


@pytest.mark.parametrize("entry", ["from_logits", "from_hidden"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixtures_from_tokens(backend, layout, entry):
    got, want, leaf, exact = by_entry_point(entry, DPOLoss(**MIXTURE), paired_batch(layout=layout))
    assert_output(got, want, torch.float64)
    got.loss.backward()
    want.loss.backward()
    assert_exact_or_rounded(leaf.grad, exact.grad, "gradient")


@pytest.mark.parametrize("losses", [["aot", "sigmoid"], ["aot", "aot_unpaired"], ["sft"], ["sft", "aot_unpaired"]])
def test_mixtures_with_sorting(backend, losses):
    check_call(DPOLoss(loss_type=losses, loss_weights=[0.5, 2.0][: len(losses)]), 37)


def test_mixtures_from_sequence_logprobs(backend):
    check_call(DPOLoss(**MIXTURE), 5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_ties_are_sorted_all_the_same(backend, name):
    """Equal keys leave the matching open; the loss and the total gradient do not depend on it."""
    logps = torch.tensor([-3.0, -3.0, -3.0, -1.0], dtype=torch.float64, device=DEVICE).requires_grad_()
    other = torch.tensor([-4.0, -4.0, -4.0, -4.0], dtype=torch.float64, device=DEVICE)
    loss_fn = DPOLoss(loss_type=name)
    out = loss_fn(logps, other, other, other)
    out.loss.backward()
    (exact,) = in_double(logps)
    ones = torch.ones_like(other)
    truth = reference.paired_loss(exact, other, other, other, ones, ones, loss_fn.objective)
    truth.backward()
    assert_exact_or_rounded(out.loss, truth)
    assert_exact_or_rounded(logps.grad.sort().values, exact.grad.sort().values)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("entry", ["from_logits", "from_hidden"])
@pytest.mark.parametrize("lengths", [(2, 3), (0, 3), (4, 0), (0, 0), (1, 0, 0, 2)])
def test_one_pair_and_empty_completions(backend, lengths, entry, layout):
    for name in ("sigmoid", "ipo", "sft"):
        batch = paired_batch(lengths, layout=layout)
        got, want, leaf, exact = by_entry_point(entry, DPOLoss(loss_type=name), batch)
        assert_output(got, want, torch.float64)
        got.loss.backward()
        want.loss.backward()
        assert_exact_or_rounded(leaf.grad, exact.grad, name)
        assert (leaf.grad[batch.labels == IGNORE] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_longer_than_a_block(backend, layout):
    """The kernel sums 16 sequences by 128 tokens at a time: 37 pairs of up to 300 tokens, on the operator itself."""
    lengths = torch.randint(0, 9, (74,)).tolist()
    lengths[3], lengths[20], lengths[73] = 127, 128, 299
    batch = paired_batch(lengths, layout=layout, width=1, vocab=2)
    logps, loss_fn = random_leaf(*batch.labels.shape), DPOLoss(loss_type=["sigmoid", "ipo", "sft"])
    (exact,) = in_double(logps)
    want = expected_dpo(loss_fn, exact, batch.labels, batch.ref_logps, batch.cu_seqlens)
    loss, metrics, _ = torch.ops.fastpref.paired_loss(
        logps.view(-1), batch.labels.view(-1), batch.cu_seqlens, batch.ref_logps, None, None,
        json.dumps(loss_fn.objective._asdict()), 37, IGNORE,
    )  # fmt: skip
    assert_exact_or_rounded(loss, want.loss)
    assert_exact_or_rounded(metrics, want.metrics)
    loss.backward()
    want.loss.backward()
    assert_exact_or_rounded(logps.grad, exact.grad)


def test_the_metrics_of_a_hand_worked_pair(backend):
    column = [torch.tensor(x, device=DEVICE) for x in ([-3.0, -8.0], [-5.0, -7.0], [-4.0, -8.5], [-4.5, -9.0])]
    out = DPOLoss(beta=0.5)(*column)
    assert out.chosen_logps.tolist() == [-3, -8] and out.rejected_logps.tolist() == [-5, -7]
    assert out.chosen_rewards.tolist() == [0.5, 0.25] and out.rejected_rewards.tolist() == [-0.25, 1]
    assert out.margins.tolist() == [0.75, -0.75] and out.accuracies.tolist() == [1, 0]


def test_a_policy_equal_to_its_reference_gives_log_2(backend):
    batch = paired_batch()
    with torch.no_grad():
        sums = from_hidden(DPOLoss(), batch)
        own = torch.cat([sums.chosen_logps, sums.rejected_logps])
    out = from_hidden(DPOLoss(), batch._replace(ref_logps=own))
    torch.testing.assert_close(out.loss.item(), 0.6931471805599453, rtol=1e-14, atol=0)
    assert (out.margins == 0).all() and (out.accuracies == 0).all()


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
@pytest.mark.parametrize("margin", [1e3, -1e3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_stay_finite_at_large_margins(backend, dtype, margin, name):
    leaf = torch.tensor([[margin / 2, 1.0], [-margin / 2, 2.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    zero, one = torch.zeros(2, dtype=dtype, device=DEVICE), torch.ones(2, dtype=dtype, device=DEVICE)
    out = DPOLoss(beta=1.0, loss_type=name, label_smoothing=0.1)(leaf[0], leaf[1], zero, zero, one, one)
    out.loss.backward()
    assert out.loss.isfinite() and leaf.grad.isfinite().all()


def test_the_hinge_derivative_is_fp64_in_an_fp64_run(backend):
    """Once a bug: an fp32 constant in the kernel made -beta / B wrong in the 8th digit."""
    chosen = torch.zeros(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    zero = torch.zeros_like(chosen)
    DPOLoss(beta=0.1, loss_type="hinge")(chosen, zero, zero, zero).loss.backward()
    torch.testing.assert_close(chosen.grad, torch.full_like(zero, -0.1 / 3), rtol=1e-15, atol=0)


def test_a_nan_logprob_reaches_only_its_pair(backend):
    chosen, zero = torch.tensor([-1.0, float("nan"), -2.0], device=DEVICE), torch.zeros(3, device=DEVICE)
    out = DPOLoss()(chosen, zero, zero, zero)
    assert out.loss.isnan()
    assert out.margins.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_results_are_fp32_or_fp64(backend, dtype):
    want = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [torch.full((2,), -2.0, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(4)]
    batch = paired_batch(dtype=dtype)
    for out, leaf in (
        (DPOLoss()(*leaves), leaves[0]),
        (DPOLoss().from_logits(logits := batch.logits(), batch.labels, batch.ref_logps), logits),
        (from_hidden(DPOLoss(), batch), batch.hidden),
    ):
        assert all(value.dtype == want and value.isfinite().all() for value in out)
        out.loss.backward()
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_fp16_logprobs_are_widened_before_anything_else(backend):
    half = [torch.randn(4, device=DEVICE).half().requires_grad_() for _ in range(4)]
    single = [x.detach().float().requires_grad_() for x in half]
    got, want = DPOLoss()(*half), DPOLoss()(*single)
    got.loss.backward()
    want.loss.backward()
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(half[0].grad, single[0].grad.half())


@pytest.mark.parametrize("frozen", [False, True])
def test_the_head_and_its_bias(backend, frozen):
    batch = paired_batch(bias=True, frozen=frozen)
    truth = batch.double()
    options = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
    got, want = from_hidden(DPOLoss(), batch, **options), expected_from_hidden(DPOLoss(), truth, **options)
    assert_output(got, want, torch.float64)
    got.loss.backward()
    want.loss.backward()
    assert_same_gradients(batch, truth)


def test_references_and_lengths_get_no_gradient(backend):
    columns = [random_leaf(3) for _ in range(4)]
    DPOLoss()(*columns).loss.backward()
    assert [x.grad is not None for x in columns] == [True, True, False, False]


@pytest.mark.parametrize("ignore_index", [-1, 0])
def test_another_ignore_index(backend, ignore_index):
    """0 is a token too: it can be what padding is labelled with."""
    batch = paired_batch()
    labels = batch.labels.masked_fill(batch.labels == 0, 1)
    renamed = labels.masked_fill(labels == IGNORE, ignore_index)
    for plan in ("store", "pair", "recompute"):
        batch.hidden.grad = None
        want = from_hidden(DPOLoss(), batch._replace(labels=labels), plan=plan)
        (gradient,) = torch.autograd.grad(want.loss, batch.hidden)
        got = from_hidden(DPOLoss(), batch._replace(labels=renamed), plan=plan, ignore_index=ignore_index)
        got.loss.backward()
        assert torch.equal(got.loss, want.loss) and torch.equal(batch.hidden.grad, gradient)


@pytest.mark.parametrize("options", [{}, {"use_weighting": True}, {"ld_alpha": 0.5}, {"loss_type": ["sigmoid", "sft"]}])
def test_from_tokens_is_from_logits(options):
    """For those who want statistics beside the loss: the same loss and gradient, from one pass over the logits."""
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 31, dtype=torch.float64, device=DEVICE, requires_grad=True)
    labels, ref_logps = torch.randint(31, (4, 6), device=DEVICE), torch.randn(4, dtype=torch.float64, device=DEVICE)
    labels[:, :2] = IGNORE
    loss_fn = DPOLoss(**options)
    tokens = token_statistics(logits, labels, ("entropy", *loss_fn.statistics))
    outs = (loss_fn.from_tokens(tokens, labels, ref_logps), loss_fn.from_logits(logits, labels, ref_logps))
    gradients = [torch.autograd.grad(out.loss, logits)[0] for out in outs]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    torch.testing.assert_close(*gradients)
    if options.get("use_weighting"):
        with pytest.raises(ValueError, match=r"tokens: got no log_sum_sq, want statistics=\('log_sum_sq',\)"):
            loss_fn.from_tokens(token_statistics(logits, labels, ("entropy",)), labels, ref_logps)
