"""Process rewards: losses on steps from logits, scores and hidden states; aggregation to sequences."""

from __future__ import annotations

import math

import pytest
import torch
from support import DEVICE, assert_exact_or_rounded

from fastpref import ProcessRewardLoss, aggregate_steps

pytestmark = pytest.mark.usefixtures("backend")
IGNORE = -100
loss_fn = ProcessRewardLoss()


def tensor(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def test_soft_labels_by_hand():
    scores, labels = [[1.5, -0.5, 9.0], [0.25, 3.0, -2.0]], [[0.75, 0.0, IGNORE], [1.0, 0.5, 0.125]]
    losses = [
        [y * softplus(-x) + (1 - y) * softplus(x) if y != IGNORE else 0 for x, y in zip(*row, strict=True)]
        for row in zip(scores, labels, strict=True)
    ]
    x = tensor(scores).requires_grad_()
    out = loss_fn(x, tensor(labels))
    assert out.loss.item() == pytest.approx(sum(map(sum, losses)) / 5, rel=1e-12)
    assert out.num_steps.item() == 5
    assert out.step_losses.tolist() == [pytest.approx(row, rel=1e-12) for row in losses]
    assert out.accuracies.tolist() == [[1, 1, 0], [1, 0, 1]]
    out.loss.backward()
    want = [
        [(1 / (1 + math.exp(-s)) - y) / 5 if y != IGNORE else 0 for s, y in zip(*row, strict=True)]
        for row in zip(scores, labels, strict=True)
    ]
    assert x.grad.tolist() == [pytest.approx(row, rel=1e-11) for row in want]


def test_hard_labels_by_hand():
    logits, labels = [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0], [7.0, 7.0, 7.0]], [0, 2, IGNORE]
    first = math.log(math.exp(1) + math.exp(2) + math.exp(-1)) - 1
    second = math.log(math.exp(0.5) + 1 + math.exp(3)) - 3
    out = loss_fn(tensor(logits), tensor(labels, torch.long))
    assert out.loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    assert out.accuracies.tolist() == [0, 1, 0]


def test_two_classes_are_a_score():
    """Softmax over (0, x) is sigmoid(x): both forms agree."""
    scores, labels = torch.randn(3, 4, device=DEVICE, dtype=torch.float64), torch.randint(0, 2, (3, 4), device=DEVICE)
    two = torch.stack([torch.zeros_like(scores), scores], -1)
    torch.testing.assert_close(loss_fn(two, labels).loss, loss_fn(scores, labels).loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_fn(scores, labels == 1).loss, loss_fn(scores, labels).loss, rtol=0, atol=0)


@pytest.mark.parametrize("classes", [None, 2, 3])
def test_what_does_not_count_may_be_anything(classes):
    shape = (2, 5) if classes is None else (2, 5, classes)
    logits = torch.randn(shape, device=DEVICE, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 5), device=DEVICE)
    labels[0, 3:] = IGNORE
    mask = torch.rand(2, 5, device=DEVICE) < 0.7
    counts = mask & (labels != IGNORE)
    want = loss_fn(logits[counts], labels[counts])
    spoilt = logits.clone()
    spoilt[~counts] = float("nan")
    labels[~mask] = 77
    spoilt.requires_grad_()
    out = loss_fn(spoilt, labels, mask)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-13, atol=0)
    assert out.num_steps == counts.sum()
    (gradient,) = torch.autograd.grad(out.loss, spoilt)
    assert (gradient[~counts] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (4, 2)])
def test_no_labelled_step_is_a_differentiable_zero(shape):
    logits = torch.randn(shape, device=DEVICE, requires_grad=True)
    out = loss_fn(logits, torch.full((4,), IGNORE, device=DEVICE))
    out.loss.backward()
    assert out.loss.item() == 0 and (logits.grad == 0).all() and out.num_steps == 0


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_scores_stay_finite(magnitude):
    scores = tensor([magnitude, 0.0], torch.float32).requires_grad_()
    out = loss_fn(scores, tensor([0.5, 0.5], torch.float32))
    assert out.loss.item() == pytest.approx((5000 + math.log(2)) / 2, rel=1e-6)
    out.loss.backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("by", ["labels", "positions", "rows"])
def test_from_hidden_equals_the_product_first(classes, dtype, by):
    hidden = torch.randn(2, 6, 9, device=DEVICE).to(dtype)
    weight, bias = torch.randn(classes, 9, device=DEVICE).to(dtype), torch.randn(classes, device=DEVICE).to(dtype)
    everywhere = torch.full((2, 6), IGNORE, device=DEVICE)
    everywhere[0, 1], everywhere[0, 4], everywhere[1, 5] = 1, 0, 1
    index, labels = None, everywhere
    if by == "positions":
        index, labels = tensor([[1, 4], [5, -9]], torch.long), tensor([[1, 0], [1, IGNORE]], torch.long)
    elif by == "rows":
        index, labels = tensor([1, 4, 11, 0], torch.int32), tensor([1, 0, 1, IGNORE], torch.long)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    given = hidden.view(12, 9) if by == "rows" else hidden
    out = loss_fn.from_hidden(given, weight, labels, index, bias)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    logits = doubles[0] @ doubles[1].T + doubles[2]
    want = loss_fn(logits[..., 0] if classes == 1 else logits, everywhere).loss
    assert_exact_or_rounded(out.loss, want)
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.step_losses.shape == (labels.shape if index is not None else (3,))
    tolerance = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for got, truth in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, doubles), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance / 10)


def test_soft_labels_from_hidden_and_a_flat_head():
    hidden, weight = (torch.randn(*s, device=DEVICE, dtype=torch.float64) for s in ((3, 4, 5), (5,)))
    index, labels = tensor([[0, 2], [1, 3], [3, 3]], torch.long), torch.rand(3, 2, device=DEVICE, dtype=torch.float64)
    hidden.requires_grad_()
    mask = tensor([[True, True], [True, False], [True, True]], torch.bool)
    scores = hidden[torch.arange(3, device=DEVICE)[:, None], index] @ weight
    want = loss_fn(scores, labels, mask).loss
    out = loss_fn.from_hidden(hidden, weight, labels, index, mask=mask)
    assert_exact_or_rounded(out.loss, want)
    assert_exact_or_rounded(*(torch.autograd.grad(x, hidden)[0] for x in (out.loss, want)))


@pytest.mark.parametrize("classes", [1, 2])
def test_gradcheck(classes):
    hidden, weight, bias = (
        torch.randn(*s, device=DEVICE, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 4), (classes, 4), (classes,))
    )
    labels = tensor([[0, IGNORE, 1], [1, 1, IGNORE]], torch.long)
    assert torch.autograd.gradcheck(
        lambda h, w, b: loss_fn.from_hidden(h, w, labels, None, b).loss, (hidden, weight, bias), rtol=1e-6, atol=1e-8
    )


SCORES = [[0.5, 0.25, 0.75], [0.9, 0.8, 0.1]]
MASK = [[True, True, True], [True, True, False]]


@pytest.mark.parametrize(
    ("method", "want"), [("min", [0.25, 0.8]), ("product", [0.09375, 0.72]), ("last", [0.75, 0.8])]
)
def test_aggregations_by_hand(method, want):
    padded = aggregate_steps(tensor(SCORES), None, method, tensor(MASK, torch.bool))
    packed = aggregate_steps(tensor([0.5, 0.25, 0.75, 0.9, 0.8]), tensor([0, 3, 5], torch.int32), method)
    assert padded.tolist() == pytest.approx(want, rel=1e-14) and packed.tolist() == pytest.approx(want, rel=1e-14)
    masked = tensor([True, True, True, True, True, False], torch.bool)
    both = aggregate_steps(tensor([0.5, 0.25, 0.75, 0.9, 0.8, 0.1]), tensor([0, 3, 6], torch.long), method, masked)
    assert both.tolist() == pytest.approx(want, rel=1e-14)


def test_the_default_is_the_minimum():
    assert aggregate_steps(tensor(SCORES)).tolist() == [0.25, 0.1]


@pytest.mark.parametrize("method", ["min", "product", "last"])
def test_sequences_without_steps_score_a_differentiable_zero(method):
    scores = tensor([[0.5, 0.2], [0.3, 0.4]]).requires_grad_()
    out = aggregate_steps(scores, None, method, tensor([[False, False], [True, True]], torch.bool))
    out.sum().backward()
    assert out[0] == 0 and out[1] != 0 and scores.grad.isfinite().all() and (scores.grad[0] == 0).all()
    packed = tensor([0.5]).requires_grad_()
    out = aggregate_steps(packed, tensor([0, 0, 1, 1], torch.long), method)
    assert out.tolist() == [0, pytest.approx(0.5, rel=1e-15), 0]
    out.sum().backward()
    assert packed.grad.tolist() == pytest.approx([1])
    none = tensor([]).requires_grad_()
    out = aggregate_steps(none, tensor([0, 0], torch.long), method)
    out.sum().backward()
    assert out.tolist() == [0]


def test_a_product_of_many_steps_and_of_zero():
    """In log space a thousand steps do not underflow on the way; a zero makes it zero, without NaN gradients."""
    scores = torch.full((1, 1000), 0.95, device=DEVICE)
    assert aggregate_steps(scores, None, "product").item() == pytest.approx(0.95**1000, rel=1e-3)
    scores = tensor([[0.5, 0.0, 0.5]]).requires_grad_()
    out = aggregate_steps(scores, None, "product")
    out.sum().backward()
    assert out.item() == 0 and scores.grad.isfinite().all()


@pytest.mark.parametrize("method", ["min", "product", "last"])
def test_aggregation_gradcheck(method):
    scores = torch.rand(7, device=DEVICE, dtype=torch.float64).add(0.1).requires_grad_()
    edges = tensor([0, 3, 3, 7], torch.long)
    assert torch.autograd.gradcheck(lambda s: aggregate_steps(s, edges, method), (scores,), rtol=1e-6, atol=1e-8)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, device=DEVICE, dtype=dtype)


LONG = torch.long
ERRORS = [
    (
        lambda: loss_fn(zeros(3, 2), zeros(4, dtype=LONG)), ValueError,
        "step_logits: got shape (3, 2) for labels (4,), want [*, C] logits or [*] scores",
    ),
    (
        lambda: loss_fn(zeros(3, 2), zeros(3)), TypeError,
        "step_labels: got dtype float32 for classes, want integers; probabilities go with one score per step",
    ),
    (lambda: loss_fn(zeros(3), zeros(3) + 1.5), ValueError, "step_labels: got 1.5, want probabilities in [0, 1]"),
    (
        lambda: loss_fn(zeros(3, 2), zeros(3, dtype=LONG) + 2), ValueError,
        "labels: got 2 at row 0, want a token in [0, 2) or ignore_index=-1",
    ),
    (lambda: loss_fn(zeros(3), zeros(3), zeros(3) + 2), ValueError, "mask: got 2, want 0 or 1 (or bool)"),
    (
        lambda: loss_fn.from_hidden(zeros(2, 3, 4), zeros(2, 5), zeros(2, 3, dtype=LONG)), ValueError,
        "hidden: got shape (2, 3, 4), want [*, 5] to match head_weight (2, 5)",
    ),
    (
        lambda: loss_fn.from_hidden(zeros(2, 3, 4), zeros(2, 4), zeros(2, 2, dtype=LONG)), ValueError,
        "step_labels: got shape (2, 2), want (2, 3) (one label per row of hidden)",
    ),
    (
        lambda: loss_fn.from_hidden(zeros(2, 3, 4), zeros(1, 4), zeros(2, 1), zeros(2, 1, dtype=LONG) + 3), ValueError,
        "step_index: got 3, want a position in [0, 3)",
    ),
    (
        lambda: aggregate_steps(zeros(3)), ValueError,
        "step_scores: got shape (3,) without cu_steps, want [S, K]",
    ),
    (
        lambda: aggregate_steps(zeros(3), tensor([0, 2], LONG)), ValueError,
        "cu_steps: got [0, 2], want ascending offsets from 0 to the number of steps, 3",
    ),
    (
        lambda: aggregate_steps(zeros(2, 2) - 0.5, None, "product"), ValueError,
        "step_scores: got -0.5, want probabilities for a product",
    ),
    (
        lambda: aggregate_steps(zeros(2, 2), None, "mean"), ValueError,
        "method: got 'mean', want one of min, product, last",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[message.split(",")[0] for *_, message in ERRORS])
def test_errors(wrong, kind, message, monkeypatch):
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    with pytest.raises(kind) as error:
        wrong()
    assert str(error.value) == message
