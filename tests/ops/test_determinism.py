"""The autograd contract: the same bits every time, as many backward passes as one likes, and one order of them."""

from __future__ import annotations

import pytest
import torch
from support import (
    DEVICE,
    expected_from_hidden,
    from_hidden,
    in_double,
    paired_batch,
    random_labels,
    random_leaf,
    relative_error,
)
from torch.utils.checkpoint import checkpoint

from fastpref import DPOLoss, linear_token_logprobs, reference, token_logprobs, token_statistics
from fastpref.objectives.paired import DPO_LOSS_TYPES

VOCAB = 257
PLANS = ["frozen", "store", "pair", "recompute"]
WITHOUT_PLAN = [("token_logprobs", None), ("token_statistics", None), ("call", None), ("from_logits", None)]
ENTRIES = [*WITHOUT_PLAN, *(("linear", p) for p in PLANS if p != "pair"), *(("from_hidden", p) for p in PLANS)]


def problem(entry: str, plan: str | None, dtype=torch.float64):
    """(function to a scalar, its leaves): groups and slices where the plan has some."""
    batch = paired_batch((1, 2, 1, 2, 0, 2), vocab=VOCAB, bias=True, dtype=dtype, frozen=plan == "frozen")
    logits, coefs = batch.logits(), torch.randn(batch.labels.shape, device=DEVICE, dtype=dtype)
    leaves = [x for x in (batch.hidden, batch.weight, batch.bias) if x.requires_grad]
    options = {"plan": plan, "workspace_bytes": 3 * VOCAB * dtype.itemsize}
    match entry:
        case "token_logprobs":
            return (lambda: (token_logprobs(logits, batch.labels) * coefs).sum()), [logits]
        case "token_statistics":

            def both():
                found = token_statistics(logits, batch.labels)
                return (found.logps * coefs + found.entropy * coefs.square()).sum()

            return both, [logits]
        case "call":
            columns = [random_leaf(5, dtype=dtype) for _ in range(2)]
            refs = [random_leaf(5, dtype=dtype).detach() for _ in range(2)]
            return (lambda: DPOLoss()(*columns, *refs).loss), columns
        case "from_logits":
            return (lambda: DPOLoss().from_logits(logits, batch.labels, batch.ref_logps).loss), [logits]
        case "linear":

            def weighted():
                logps = linear_token_logprobs(batch.hidden, batch.weight, batch.labels, batch.bias, **options)
                return (logps * coefs).sum()

            return weighted, leaves
        case "from_hidden":
            return (lambda: from_hidden(DPOLoss(), batch, **options).loss), leaves


def gradients(value, leaves, **options):
    return torch.autograd.grad(value, leaves, **options)


@pytest.mark.parametrize(("entry", "plan"), ENTRIES)
def test_bitwise_equal_repeats(backend, entry, plan):
    function, leaves = problem(entry, plan, torch.float32)
    runs = []
    for _ in range(4):
        value = function()
        runs.append([value, *gradients(value, leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_every_loss_repeats_bitwise(backend, name):
    batch, loss_fn = paired_batch(dtype=torch.float32), DPOLoss(loss_type=name, label_smoothing=0.1)
    runs = [from_hidden(loss_fn, batch, plan="pair") for _ in range(3)]
    grads = [gradients(run.loss, [batch.hidden, batch.weight]) for run in runs]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(a, b) for grad in grads[1:] for a, b in zip(grads[0], grad, strict=True))


@pytest.mark.parametrize("scale", [1.0, -3.0])
@pytest.mark.parametrize(("entry", "plan"), ENTRIES)
def test_a_second_backward_gives_the_same_gradient(backend, entry, plan, scale):
    """Scaling a saved gradient in place would give 3, 9, 27 times it."""
    function, leaves = problem(entry, plan, torch.float32)
    want = [scale * g for g in gradients(function(), leaves)]
    value = function()
    upstream = torch.tensor(scale, dtype=value.dtype, device=DEVICE)
    runs = [gradients(value, leaves, grad_outputs=upstream, retain_graph=True) for _ in range(3)]
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(run, want, strict=True))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("entry", "plan"), ENTRIES)
def test_gradients_accumulate_over_backwards_of_one_graph(backend, entry, plan, scale):
    """Once a bug of the pair plan: `.grad` takes the tensor that backward returns, and the next pass adds to it in
    place. It must not be the one that is saved."""
    function, leaves = problem(entry, plan)
    want = gradients(function(), leaves)
    value = function()
    for times in (1, 2, 3):
        (value * scale).backward(retain_graph=True) if scale != 1 else value.backward(retain_graph=True)
        for leaf, grad in zip(leaves, want, strict=True):
            torch.testing.assert_close(leaf.grad, times * scale * grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("entry", "plan"), ENTRIES)
def test_a_gradient_belongs_to_its_caller(backend, entry, plan):
    """What clipping and `zero_grad(set_to_none=False)` do to `.grad` must not reach the next backward."""
    function, leaves = problem(entry, plan)
    want = gradients(function(), leaves)
    value = function()
    for _ in range(3):
        value.backward(retain_graph=True)
        for leaf, grad in zip(leaves, want, strict=True):
            torch.testing.assert_close(leaf.grad, grad, rtol=1e-13, atol=1e-15)
            leaf.grad.zero_()


@pytest.mark.parametrize("plan", PLANS)
def test_accumulation_over_micro_batches(backend, plan):
    """Two pairs at a time, the losses averaged, as the whole batch at once."""
    whole = paired_batch((3, 5, 2, 4, 4, 1, 5, 2), vocab=VOCAB, frozen=plan == "frozen")
    truth = whole.double()
    expected_from_hidden(DPOLoss(), truth).loss.backward()
    for pairs in ([0, 1], [2, 3]):
        rows = pairs + [4 + p for p in pairs]
        part = whole._replace(hidden=whole.hidden[rows], labels=whole.labels[rows], ref_logps=whole.ref_logps[rows])
        (from_hidden(DPOLoss(), part, plan=plan).loss / 2).backward()
    assert relative_error(whole.hidden.grad, truth.hidden.grad) < 1e-12
    if plan != "frozen":
        assert relative_error(whole.weight.grad, truth.weight.grad) < 1e-12


@pytest.mark.parametrize(("entry", "plan"), ENTRIES)
def test_a_double_backward_is_refused(backend, entry, plan):
    """Part of the answer would be worse than none."""
    function, leaves = problem(entry, plan)
    first = gradients(function(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(function(), leaves), strict=True))
    for grad in first:
        with pytest.raises(RuntimeError, match=r"fastpref.* cannot be differentiated again"):
            gradients(grad.square().sum(), leaves, allow_unused=True, retain_graph=True)


def test_a_graph_through_the_reference_logprobs_is_cut(backend):
    columns = [random_leaf(2) for _ in range(4)]
    out = DPOLoss()(*columns)
    assert [g is None for g in gradients(out.loss, columns, allow_unused=True)] == [False, False, True, True]


def test_an_inner_derivative_of_the_hidden_states(backend):
    """The op sits in the middle of a graph: an arbitrary function before and after."""
    states, weight, labels = random_leaf(4, 8), random_leaf(37, 8), random_labels((4,), 37)
    exact_states, exact_weight = in_double(states, weight)
    got = linear_token_logprobs(states.tanh(), weight * 2, labels).exp().sum()
    truth = reference.linear_token_logprobs(exact_states.tanh(), exact_weight * 2, labels).exp().sum()
    for x, y in zip(gradients(got, [states, weight]), gradients(truth, [exact_states, exact_weight]), strict=True):
        assert relative_error(x, y) < 1e-10


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_casts_as_a_linear_layer_would(plan):
    """The result is that of casting the inputs by hand, to what F.linear under autocast computes in."""
    torch.manual_seed(0)
    batch = paired_batch(dtype=torch.float32, vocab=VOCAB, bias=True, frozen=plan == "frozen")
    leaves = [x for x in (batch.hidden, batch.weight, batch.bias) if x.requires_grad]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        layer = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
        out = from_hidden(DPOLoss(), batch, plan=plan)
    assert layer.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    cast = batch._replace(**{n: getattr(batch, n).to(layer.dtype) for n in ("hidden", "weight", "bias")})
    want = from_hidden(DPOLoss(), cast, plan=plan)
    assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
    got_grads, want_grads = gradients(out.loss, leaves), gradients(want.loss, leaves)
    for leaf, x, y in zip(leaves, got_grads, want_grads, strict=True):
        assert x.dtype == leaf.dtype == torch.float32
        if leaf is batch.hidden:
            assert torch.equal(x, y)
        else:  # straight to fp32; by hand it is rounded to the layer's dtype first
            assert relative_error(x, y) <= torch.finfo(layer.dtype).eps / 2


def test_autocast_leaves_logits_and_logprobs_alone(backend):
    batch = paired_batch(dtype=torch.float32)
    logits = batch.logits()
    want = DPOLoss().from_logits(logits, batch.labels, batch.ref_logps)
    (gradient,) = gradients(want.loss, [logits])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = DPOLoss().from_logits(logits, batch.labels, batch.ref_logps)
        (again,) = gradients(got.loss, [logits])
    assert torch.equal(got.loss, want.loss) and torch.equal(again, gradient)


def test_a_backward_outside_and_inside_autocast_is_the_same():
    batch = paired_batch(dtype=torch.float32, vocab=VOCAB)
    results = []
    for inside in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = from_hidden(DPOLoss(), batch, plan="store").loss
            early = gradients(loss, [batch.hidden, batch.weight]) if inside else None
        results.append(early or gradients(loss, [batch.hidden, batch.weight]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_gradient_checkpointing_gives_the_same(backend, plan):
    batch = paired_batch(vocab=VOCAB, frozen=plan == "frozen")
    leaves = [x for x in (batch.hidden, batch.weight) if x.requires_grad]

    def loss(hidden):
        return from_hidden(DPOLoss(), batch._replace(hidden=hidden), plan=plan).loss

    got = checkpoint(loss, batch.hidden, use_reentrant=False)
    want = gradients(loss(batch.hidden), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, leaves), want, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_saved_tensors_may_be_offloaded(backend, plan):
    """As trainers do with activations."""
    batch = paired_batch(vocab=VOCAB, frozen=plan == "frozen")
    leaves = [x for x in (batch.hidden, batch.weight) if x.requires_grad]
    want = gradients(from_hidden(DPOLoss(), batch, plan=plan).loss, leaves)
    with torch.autograd.graph.save_on_cpu():
        loss = from_hidden(DPOLoss(), batch, plan=plan).loss
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss, leaves), want, strict=True))
