"""Every execution plan computes the same thing as the specification, from the products it promises."""

from __future__ import annotations

import pytest
import torch
from support import (
    DEVICE,
    IGNORE,
    TRANSFORMS,
    assert_exact_or_rounded,
    assert_same_gradients,
    expected_from_hidden,
    from_hidden,
    in_double,
    paired_batch,
    random_labels,
    random_leaf,
)

from fastpref import DPOLoss, linear_token_logprobs, linear_token_statistics, reference
from fastpref.backends import portable
from fastpref.objectives.paired import DPO_LOSS_TYPES
from fastpref.plans import plans
from fastpref.plans.head import borrowed_logits, logits_buffer
from fastpref.reference import LogitTransform

DTYPES = (torch.float32, torch.float64)
VOCAB, WIDTH = 257, 8  # odd, and three slices of the narrowest width that `recompute` takes, 128


def workspace(rows: int, dtype=torch.float64, vocab: int = VOCAB) -> int:
    """Bytes that hold so many rows of logits and no more."""
    return rows * vocab * dtype.itemsize


def inputs(dtype=torch.float64, *, vocab=VOCAB, rows=(3, 5), bias=True, frozen=False):
    hidden, weight = random_leaf(*rows, WIDTH, dtype=dtype), random_leaf(vocab, WIDTH, dtype=dtype)
    offsets = random_leaf(vocab, dtype=dtype) if bias else None
    for parameter in (weight, offsets):
        if parameter is not None:
            parameter.requires_grad_(not frozen)
    return hidden, weight, random_labels(rows, vocab), offsets


def check(hidden, weight, labels, bias, upstream=None, *, plan, workspace_bytes=None, **options):
    leaves = (hidden, weight, bias)
    exact_hidden, exact_weight, exact_bias = exact = in_double(*leaves)
    truth = reference.linear_token_logprobs(exact_hidden, exact_weight, labels, exact_bias, **options)
    got = linear_token_logprobs(hidden, weight, labels, bias, plan=plan, workspace_bytes=workspace_bytes, **options)
    assert got.dtype == hidden.dtype and got.shape == labels.shape
    assert_exact_or_rounded(got, truth, "log-probs")
    assert (got[labels == IGNORE] == 0).all()
    upstream = torch.randn(labels.shape, device=DEVICE, dtype=got.dtype) if upstream is None else upstream
    truth.backward(upstream.double())
    got.backward(upstream)
    for name, leaf, want in zip(("hidden", "weight", "bias"), leaves, exact, strict=True):
        if leaf is None or not leaf.requires_grad:
            assert leaf is None or leaf.grad is None
        else:
            assert leaf.grad.dtype == leaf.dtype
            assert_exact_or_rounded(leaf.grad, want.grad, f"gradient of {name}")
    if hidden.requires_grad:
        assert (hidden.grad[labels == IGNORE] == 0).all()


# (plan, rows of workspace): one tile for all 10 or so scored rows, or several; one slice of V, or three
TRAINING_PLANS = [
    ("frozen", 100),
    ("frozen", 3),
    ("store", 100),
    ("store", 3),
    ("recompute", 100),
    ("recompute", 3),
    ("auto", 100),  # store
    ("auto", 3),  # recompute
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("plan", "rows"), TRAINING_PLANS)
def test_values_and_gradients(backend, plan, rows, dtype, transform):
    arguments = inputs(dtype, frozen=plan == "frozen")
    check(*arguments, plan=plan, workspace_bytes=workspace(rows, dtype), **TRANSFORMS[transform])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("plan", "rows"), TRAINING_PLANS)
def test_statistics_and_the_gradient_of_an_entropy(backend, plan, rows, dtype, transform):
    hidden, weight, labels, bias = inputs(dtype, frozen=plan == "frozen")
    exact = in_double(hidden, weight, bias)
    options = TRANSFORMS[transform]
    truth = reference.token_statistics(torch.nn.functional.linear(*exact), labels, **options)
    got = linear_token_statistics(
        hidden, weight, labels, bias, plan=plan, workspace_bytes=workspace(rows, dtype), **options
    )
    for name in reference.STATISTICS:
        if name == "is_top1":
            assert torch.equal(got.is_top1, truth.is_top1)
        else:
            assert_exact_or_rounded(getattr(got, name), getattr(truth, name), name)
        assert getattr(got, name).requires_grad == (name == "entropy")
    coefs = torch.randn(2, *labels.shape, device=DEVICE, dtype=dtype)
    coefs[:, labels == IGNORE] = float("nan")  # an ignored row's upstream gradient may be anything
    torch.autograd.backward([truth.logps, truth.entropy], [c.double().nan_to_num() for c in coefs])
    for _ in range(2):  # what was kept is still there for a second backward
        for leaf in (hidden, weight, bias):
            leaf.grad = None
        torch.autograd.backward([got.logps, got.entropy], list(coefs), retain_graph=True)
        for name, leaf, want in zip(("hidden", "weight", "bias"), (hidden, weight, bias), exact, strict=True):
            assert leaf.requires_grad or leaf.grad is None
            if leaf.requires_grad:
                assert_exact_or_rounded(leaf.grad, want.grad, f"gradient of {name}")


@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_a_vocabulary_longer_than_a_block(backend, plan):
    check(*inputs(vocab=4097, rows=(4,), bias=False, frozen=plan == "frozen"), plan=plan)


@pytest.mark.parametrize("rows", [100, 3])
@pytest.mark.parametrize("plan", ["auto", "no_grad"])
def test_without_gradients(backend, plan, rows):
    hidden, weight, labels, bias = (x.detach() for x in inputs())
    got = linear_token_logprobs(hidden, weight, labels, bias, plan=plan, workspace_bytes=workspace(rows))
    assert not got.requires_grad
    assert_exact_or_rounded(got, reference.linear_token_logprobs(hidden, weight, labels, bias))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("plan", ["store", "recompute", "auto"])
def test_gradients_that_nobody_needs_do_not_alias(backend, plan, needed):
    """Once a bug: with two of the three absent, as when only the head is trained, the backward operator returned
    the same empty tensor twice, which PyTorch refuses."""
    hidden, weight, labels, bias = inputs()
    for leaf, need in zip((hidden, weight, bias), needed, strict=True):
        leaf.requires_grad_(bool(need))
    check(hidden, weight, labels, bias, plan=plan)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_strided_upstream_gradients(backend, plan, kind):
    upstream = torch.randn(3, 5, device=DEVICE, dtype=torch.float64)
    upstream = {"expanded": upstream[:1, :1].expand(5, 3), "transposed": upstream.t()}[kind]
    check(*inputs(rows=(5, 3), frozen=plan == "frozen"), upstream, plan=plan)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_label_dtypes(backend, plan, dtype):
    hidden, weight, labels, bias = inputs(frozen=plan == "frozen")
    check(hidden, weight, labels.long(), bias, plan=plan)
    got = linear_token_logprobs(hidden, weight, labels.to(dtype), bias, plan=plan)
    assert_exact_or_rounded(got, reference.linear_token_logprobs(hidden, weight, labels, bias))


@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_strided_hidden_states_and_weights(backend, plan):
    """The shift `hidden[:, :-1]`, and the first rows of a padded, transposed embedding."""
    states, table = random_leaf(3, 6, WIDTH), random_leaf(WIDTH, VOCAB + 7)
    table.requires_grad_(plan != "frozen")
    labels = random_labels((3, 5), VOCAB)
    exact_states, exact_table = in_double(states, table)
    truth = reference.linear_token_logprobs(exact_states[:, :-1], exact_table.t()[:VOCAB], labels)
    got = linear_token_logprobs(states[:, :-1], table.t()[:VOCAB], labels, plan=plan)
    assert_exact_or_rounded(got, truth)
    upstream = torch.randn(3, 5, device=DEVICE, dtype=torch.float64)
    truth.backward(upstream)
    got.backward(upstream)
    assert_exact_or_rounded(states.grad, exact_states.grad)
    if plan != "frozen":
        assert_exact_or_rounded(table.grad, exact_table.grad)


@pytest.mark.parametrize("labels", [[3], [IGNORE], [IGNORE] * 4, [], [IGNORE, VOCAB - 1]])
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute", "auto"])
def test_few_rows_or_none(backend, plan, labels):
    hidden, weight, _, bias = inputs(rows=(len(labels),), frozen=plan == "frozen")
    labels = torch.tensor(labels, dtype=torch.long, device=DEVICE)
    check(hidden, weight, labels, bias, plan=plan)
    if not (labels != IGNORE).any():
        assert all(x.grad is None or (x.grad == 0).all() for x in (hidden, weight, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_what_lies_in_ignored_rows_does_not_matter(backend, plan, bad):
    hidden, weight, _, bias = inputs(rows=(3,), frozen=plan == "frozen")
    labels = torch.tensor([2, IGNORE, 256], device=DEVICE)
    upstream = torch.tensor([1.5, bad, -0.5], dtype=torch.float64, device=DEVICE)
    results = []
    for value in (0.0, bad):
        h = hidden.detach().clone()
        h[1] = value
        h.requires_grad_()
        weight.grad = bias.grad = None
        got = linear_token_logprobs(h, weight, labels, bias, plan=plan)
        got.backward(upstream)
        results.append([got, h.grad, weight.grad, bias.grad])
        assert got[1] == 0 and (h.grad[1] == 0).all()
    for want, got in zip(*results, strict=True):
        assert (want is None and got is None) or torch.equal(want, got)


@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
def test_masked_tokens_have_no_influence(backend, plan):
    """A bias of -inf is how a head bans tokens."""
    hidden, weight, labels, _ = inputs(rows=(4,), frozen=plan == "frozen")
    bias = torch.zeros(VOCAB, dtype=torch.float64, device=DEVICE)
    bias[1:200] = float("-inf")
    check(hidden, weight, labels, bias, plan=plan)


# The pair plan, through from_hidden. Scored tokens of the three pairs: 3 + 4, 5 + 0, 2 + 5.


class Passes:
    """How many groups of pairs were finished from a stored U, and how many by recomputation."""

    def __init__(self, monkeypatch) -> None:
        self.stored = self.recomputed = 0
        for name, counter in (("backward_store", "stored"), ("backward_recompute", "recomputed")):
            monkeypatch.setattr(plans, name, self._counting(getattr(plans, name), counter))

    def _counting(self, function, counter):
        def wrapped(*args):
            setattr(self, counter, getattr(self, counter) + 1)
            return function(*args)

        return wrapped


def check_pairs(loss_fn, batch, **options):
    truth, exact = None, batch.double()
    bytes_, plan = options.pop("workspace_bytes", None), options.pop("plan", "pair")
    truth = expected_from_hidden(loss_fn, exact, **options)
    got = from_hidden(loss_fn, batch, plan=plan, workspace_bytes=bytes_, **options)
    for name, value, want in zip(got._fields, got, (truth.loss, *truth.metrics), strict=True):
        assert_exact_or_rounded(value, want, name)
    truth.loss.backward()
    got.loss.backward()
    assert_same_gradients(batch, exact)
    return got


@pytest.mark.parametrize(
    ("rows", "stored", "recomputed"),
    [
        (100, 1, 0),  # everything in one group
        (12, 2, 0),  # 7 + 5, then 7
        (7, 3, 0),  # each pair alone
        (6, 1, 2),  # the first and the last pair outgrow the workspace
        (1, 0, 3),  # all do
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["padded", "packed32", "packed64"])
def test_groups_of_pairs(backend, layout, dtype, frozen, rows, stored, recomputed, monkeypatch):
    passes = Passes(monkeypatch)
    batch = paired_batch(layout=layout, dtype=dtype, vocab=VOCAB, bias=True, frozen=frozen)
    check_pairs(DPOLoss(), batch, workspace_bytes=workspace(rows, dtype), softcap=5.0, temperature=0.7)
    assert (passes.stored, passes.recomputed) == (stored, recomputed)


@pytest.mark.parametrize("rows", [100, 7, 6])
@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_every_loss_in_groups(backend, name, rows, monkeypatch):
    """The two aot sort across the batch: a batch that outgrows the workspace is recomputed as one group."""
    passes = Passes(monkeypatch)
    loss_fn = DPOLoss(loss_type=name, label_smoothing=0.1)
    check_pairs(loss_fn, paired_batch(vocab=VOCAB), workspace_bytes=workspace(rows))
    if name.startswith("aot"):
        assert (passes.stored, passes.recomputed) == ((1, 0) if rows == 100 else (0, 1))


def test_a_mixture_in_groups(backend):
    loss_fn = DPOLoss(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.5])
    check_pairs(loss_fn, paired_batch(vocab=VOCAB), workspace_bytes=workspace(7))


def test_auto_takes_pairs_when_u_outgrows_the_workspace(backend, monkeypatch):
    passes = Passes(monkeypatch)
    check_pairs(DPOLoss(), paired_batch(vocab=VOCAB), plan="auto", workspace_bytes=workspace(7))
    assert passes.stored == 3


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_the_pair_plan_forms_only_what_is_needed(backend, needed):
    batch = paired_batch(vocab=VOCAB, bias=True)
    for leaf, need in zip((batch.hidden, batch.weight, batch.bias), needed, strict=True):
        leaf.requires_grad_(bool(need))
    check_pairs(DPOLoss(), batch, workspace_bytes=workspace(7))


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_a_batch_without_scored_tokens(backend, name):
    for plan in ("pair", "store", "recompute"):
        batch = paired_batch((0, 0, 0, 0), vocab=VOCAB, bias=True)
        loss_fn = DPOLoss(loss_type=name, label_smoothing=0.1)
        got = check_pairs(loss_fn, batch, plan=plan)
        assert got.loss.isfinite()
        assert all((x.grad == 0).all() for x in (batch.hidden, batch.weight, batch.bias))


def test_pairs_alone_in_their_group_read_their_own_references(backend):
    """Once a bug: the references of one pair are a column of [2, B], whose stride the kernel did not follow."""
    batch = paired_batch(vocab=VOCAB)
    batch.ref_logps.copy_(torch.tensor([-1.0, -20.0, -300.0, -4000.0, -50000.0, -600000.0]))
    got = check_pairs(DPOLoss(beta=1e-3), batch, workspace_bytes=workspace(7))
    want = 1e-3 * (got.chosen_logps - batch.ref_logps[:3])
    torch.testing.assert_close(got.chosen_rewards, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("columns", [5, 96, 512, 32_000, 49_152, 50_257, 128_256, 151_665])
@pytest.mark.parametrize("element", [2, 4, 8])
def test_rows_a_multiple_of_2048_bytes_apart_slowed_the_products(columns, element):
    """They compete for the same sets of a cache: 7 % of the three products at V = 49152."""
    stride = portable.row_stride(columns, element)
    assert columns <= stride <= columns + 2 * 64 // element
    assert stride * element % 64 == 0 and stride * element % 2048


def test_scratch_and_kept_logits_have_the_backends_row_stride(monkeypatch):
    monkeypatch.setattr(portable, "row_stride", lambda columns, element: columns + 7)
    like = torch.zeros(32, 3)
    head = plans.Head(like, None, LogitTransform(), -100)
    with borrowed_logits(4, 32, like) as scratch:
        assert (scratch.shape, scratch.stride()) == ((4, 32), (39, 1))
    kept = logits_buffer(head, 4)
    assert (kept.shape, kept.stride()) == ((4, 32), (39, 1))
