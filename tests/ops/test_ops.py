"""Per-token log-probs and statistics from logits, and sequence sums, against the specification in fp64."""

from __future__ import annotations

import pytest
import torch
from support import (
    DEVICE,
    IGNORE,
    TRANSFORMS,
    assert_exact_or_rounded,
    in_double,
    random_labels,
    random_leaf,
    relative_error,
)

from fastpref import reference, sequence_logprobs, token_logprobs, token_statistics
from fastpref.backends import backend_for
from fastpref.reference import STATISTICS

DTYPES = (torch.float32, torch.float64)
VOCABS = (
    1,  # nothing to choose from: log-prob 0
    2,
    131,  # odd, shorter than a block
    257,  # just past a power of two
    4096,  # exactly one Triton block
    4097,  # a block and one column
    8197,  # two blocks and a short tail
)


def check(logits, labels, upstream=None, **options):
    """Values and gradient of token_logprobs for an arbitrary upstream gradient."""
    (exact,) = in_double(logits)
    truth = reference.token_logprobs(exact, labels, **options)
    got = token_logprobs(logits, labels, **options)
    assert got.dtype == logits.dtype and got.shape == labels.shape
    assert_exact_or_rounded(got, truth, "log-probs")
    upstream = torch.randn(labels.shape, device=DEVICE, dtype=got.dtype) if upstream is None else upstream
    truth.backward(upstream.double())
    got.backward(upstream)
    assert_exact_or_rounded(logits.grad, exact.grad, "gradient")
    assert (logits.grad[labels == IGNORE] == 0).all()
    return got


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_values_and_gradients(backend, vocab, dtype, transform):
    check(random_leaf(4, vocab, dtype=dtype, scale=3), random_labels((4,), vocab), **TRANSFORMS[transform])


def test_a_real_vocabulary_of_odd_size(backend):
    """GPT-2's 50257: thirteen blocks, the last one short."""
    check(random_leaf(2, 50257, dtype=torch.float32, scale=3), random_labels((2,), 50257))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3), (1, 1)])
def test_any_number_of_leading_dimensions(backend, shape):
    check(random_leaf(*shape, 7), torch.randint(7, shape, device=DEVICE))


@pytest.mark.parametrize("shape", [(0,), (0, 4), (2, 0)])
def test_no_rows(backend, shape):
    logits = random_leaf(*shape, 7)
    got = token_statistics(logits, torch.zeros(shape, dtype=torch.long, device=DEVICE))
    assert all(value.shape == shape for value in got)
    (got.logps.sum() + got.entropy.sum()).backward()
    assert logits.grad.shape == (*shape, 7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_dtypes_and_ignore_index(backend, dtype):
    labels = torch.tensor([3, 0, 6, 0], device=DEVICE, dtype=dtype)
    logits = random_leaf(4, 7)
    got = token_logprobs(logits, labels, ignore_index=0)  # a token id, as padding often is
    assert_exact_or_rounded(got, reference.token_logprobs(logits, labels.long(), ignore_index=0))
    got.sum().backward()
    assert (logits.grad[[1, 3]] == 0).all() and (logits.grad[[0, 2]] != 0).all()


def strided(kind: str):
    """Logits that are a view of something larger."""
    match kind:
        case "shifted":  # the usual next-token shift
            base = random_leaf(3, 5, 13)
            return base[:, :-1]
        case "padded vocabulary":
            base = random_leaf(3, 4, 32)
            return base[..., :13]
        case "shifted and padded":
            base = random_leaf(3, 5, 32)
            return base[:, 1:, :13]
        case "every other row":
            base = random_leaf(8, 13)
            return base[::2]
        case "batch second":
            base = random_leaf(4, 3, 13)
            return base.transpose(0, 1)
        case "one row for all":
            base = random_leaf(13)
            return base.expand(4, 13)


@pytest.mark.parametrize(
    "kind",
    ["shifted", "padded vocabulary", "shifted and padded", "every other row", "batch second", "one row for all"],
)
def test_row_strides_are_read_in_place(backend, kind, monkeypatch):
    view = strided(kind)
    module, seen = backend_for(view), []
    genuine = module.row_logprob

    def watched(logits, *args, **kwargs):
        seen.append(logits)
        return genuine(logits, *args, **kwargs)

    monkeypatch.setattr(module, "row_logprob", watched)
    labels = random_labels(view.shape[:-1], view.shape[-1])
    (exact,) = in_double(view)
    upstream = torch.randn(labels.shape, device=DEVICE, dtype=torch.float64)
    truth = reference.token_logprobs(exact, labels)
    truth.backward(upstream)
    got = token_logprobs(view, labels)
    (gradient,) = torch.autograd.grad(got, view, upstream)
    assert_exact_or_rounded(got, truth)
    assert_exact_or_rounded(gradient, exact.grad)
    assert seen[0].data_ptr() == view.data_ptr() and seen[0].stride() == view.stride()


def test_columns_with_gaps_are_copied(backend):
    logits, labels = random_leaf(13, 4).t(), random_labels((4,), 13)
    assert_exact_or_rounded(token_logprobs(logits, labels), reference.token_logprobs(logits, labels))


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_strided_upstream_gradients(backend, kind):
    upstream = torch.randn(3, 4, device=DEVICE, dtype=torch.float64)
    upstream = {"expanded": upstream[:1, :1].expand(4, 3), "transposed": upstream.t()}[kind]
    assert not upstream.is_contiguous()
    check(random_leaf(4, 3, 11), random_labels((4, 3), 11), upstream)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_vocabulary(backend, dtype):
    """-inf logits in a prefix longer than a block, in the tail, and under the label itself."""
    logits = random_leaf(4, 8197, dtype=dtype)
    with torch.no_grad():
        logits[0, :4200] = float("-inf")
        logits[1, 4000:] = float("-inf")
        logits[2, 8190] = float("-inf")
        logits[3, 1:] = float("-inf")  # one token left: log-prob 0
    got = check(logits, torch.tensor([5000, 17, 8190, 0], device=DEVICE))
    assert got[2] == float("-inf") and got[3] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_logit_poisons_only_its_row(backend, bad):
    labels = torch.tensor([1, 2, 3], device=DEVICE)
    clean = random_leaf(3, 4099)
    dirty = clean.detach().clone().requires_grad_()
    with torch.no_grad():
        dirty[1, 4098] = bad
    results = []
    for logits in (clean, dirty):
        got = token_statistics(logits, labels)
        (got.logps.sum() + got.entropy.sum()).backward()
        results.append((got.logps, got.entropy, got.log_sum_sq, logits.grad))
    for want, got in zip(*results, strict=True):
        assert got[1].isnan().any()
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_the_ten_thousands(backend, dtype):
    """There fp32 numbers lie 1e-3 apart. Log-probs keep their digits; the gradient is judged against exact arithmetic
    that rounds the saved log-sum-exp once."""
    logits = (torch.randint(0, 2, (3, 300), device=DEVICE) * 2e4 - 1e4).to(dtype).requires_grad_()
    labels = torch.tensor([0, 1, 299], device=DEVICE)
    got = token_logprobs(logits, labels)
    got.sum().backward()
    z = logits.detach().double()
    picked, onehot = z.log_softmax(1).gather(1, labels[:, None])[:, 0], torch.nn.functional.one_hot(labels, 300)
    lse = z.logsumexp(1)
    rounded = lse.to(dtype).double()
    torch.testing.assert_close(got.double(), picked, rtol=2e-7 if dtype == torch.float32 else 1e-12, atol=0)
    truth, ideal = (onehot - (z - x[:, None]).exp() for x in (lse, rounded))
    floor = torch.finfo(dtype).eps if dtype == torch.float32 else 1e-12  # the truth itself is fp64
    assert relative_error(logits.grad, truth) <= 1.25 * relative_error(ideal, truth) + floor


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_lies_in_ignored_rows_does_not_matter(backend, bad):
    logits = random_leaf(3, 9)
    with torch.no_grad():
        logits[1] = bad
    labels = torch.tensor([2, IGNORE, 8], device=DEVICE)
    got = token_statistics(logits, labels)
    assert all((value[1] == 0).all() for value in got)
    upstream = torch.tensor([1.0, bad, 1.0], dtype=torch.float64, device=DEVICE)
    torch.autograd.backward([got.logps, got.entropy], [upstream, upstream])
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).all()


def test_all_rows_ignored(backend):
    logits = random_leaf(3, 9)
    got = token_statistics(logits, torch.full((3,), IGNORE, device=DEVICE))
    assert all((value == 0).all() for value in got)
    (got.logps.sum() + got.entropy.sum()).backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [131, 4097])
def test_statistics(backend, vocab, dtype, transform):
    options = TRANSFORMS[transform]
    logits, labels = random_leaf(6, vocab, dtype=dtype, scale=3), random_labels((6,), vocab)
    labels[2] = logits[2].argmax()  # a label that the model would have chosen
    (exact,) = in_double(logits)
    truth, got = reference.token_statistics(exact, labels, **options), token_statistics(logits, labels, **options)
    assert torch.equal(got.is_top1, truth.is_top1) and got.is_top1.any() and not got.is_top1.all()
    for name in ("logps", "entropy", "mean_logit", "log_sum_sq"):
        assert_exact_or_rounded(getattr(got, name), getattr(truth, name), name)

    upstream = torch.randn(2, 6, device=DEVICE, dtype=dtype)
    torch.autograd.backward([truth.logps, truth.entropy], list(upstream.double()))
    torch.autograd.backward([got.logps, got.entropy], list(upstream))
    assert_exact_or_rounded(logits.grad, exact.grad, "gradient of both")


def test_entropy_alone_has_a_gradient(backend):
    logits, labels = random_leaf(3, 37), random_labels((3,), 37)
    (exact,) = in_double(logits)
    upstream = torch.randn(3, device=DEVICE, dtype=torch.float64)
    reference.token_statistics(exact, labels).entropy.backward(upstream)
    token_statistics(logits, labels, ("entropy",)).entropy.backward(upstream)
    assert_exact_or_rounded(logits.grad, exact.grad)


def test_entropy_of_a_masked_vocabulary(backend):
    logits = random_leaf(2, 4200)
    with torch.no_grad():
        logits[0, :4100] = float("-inf")
    got = token_statistics(logits, torch.tensor([4150, 0], device=DEVICE), ("entropy", "log_sum_sq"))
    p = logits.detach()[0, 4100:].softmax(0)
    torch.testing.assert_close(got.entropy[0], -(p * p.log()).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.log_sum_sq[0], p.square().sum().log(), rtol=1e-12, atol=0)
    got.entropy.sum().backward()
    assert (logits.grad[0, :4100] == 0).all() and logits.grad.isfinite().all()


def test_a_tie_goes_to_the_first_index(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0]] * 3, device=DEVICE)
    got = token_statistics(logits, torch.tensor([0, 1, 2], device=DEVICE), ("is_top1",))
    assert got.is_top1.tolist() == [False, True, False]


@pytest.mark.parametrize("name", STATISTICS)
def test_only_what_was_asked_for(backend, name):
    got = token_statistics(torch.randn(3, 5, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE), (name,))
    assert [n for n in STATISTICS if getattr(got, n) is not None] == [name]
    assert getattr(got, name).requires_grad is False


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("edges_dtype", [None, torch.int32, torch.int64])
def test_sequence_logprobs(average, edges_dtype):
    logps, labels = random_leaf(4, 5), random_labels((4, 5), 9)
    labels[2] = IGNORE
    cu_seqlens = None
    if edges_dtype is not None:
        cu_seqlens = torch.tensor([0, 7, 7, 12, 20], dtype=edges_dtype, device=DEVICE)  # one has no rows at all
        logps, labels = logps.detach().view(-1).requires_grad_(), labels.view(-1)
    (exact,) = in_double(logps)
    truth = reference.sequence_logprobs(exact, labels, cu_seqlens=cu_seqlens, average=average)
    got = sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens, average=average)
    assert_exact_or_rounded(got, truth)
    upstream = torch.randn(4, device=DEVICE, dtype=torch.float64)
    truth.backward(upstream)
    got.backward(upstream)
    assert_exact_or_rounded(logps.grad, exact.grad)
    assert (logps.grad[labels == IGNORE] == 0).all()
