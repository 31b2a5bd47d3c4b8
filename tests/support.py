"""What the tests share: the device, the backends, inputs, and how an error is judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("portable", "triton")
IGNORE = -100
# what a model may do to its head's output: nothing, scale it and sample warm (Granite), cap it (Gemma 2)
TRANSFORMS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 0.3},
    "capped": {"softcap": 5.0, "temperature": 1.3, "logit_scale": 1.7},
}


def relative_error(got: Tensor, truth: Tensor) -> float:
    """L2 norm of the error over that of the truth, in fp64."""
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).norm() / truth.norm().clamp(min=1e-300))


def projected_error(got: Tensor, truth: Tensor) -> float:
    """|sum e r / sum r^2|: a factor of 1 + x gives x, however large the rounding noise around it."""
    got, truth = got.detach().double(), truth.detach().double()
    return float((((got - truth) * truth).sum() / truth.square().sum().clamp(min=1e-300)).abs())


def assert_exact_or_rounded(got: Tensor, truth: Tensor, name: str = "result") -> None:
    """fp64 to 1e-10; fp32 by its norm to 1e-5 and without a common factor beyond 1e-6. `truth` is fp64.

    Noise of 1e-5 averages to 1e-5 / sqrt(n) over n values: below n = 100 a factor of 1e-6 cannot be told from it,
    and that is the limit.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(truth.shape)}"
    assert truth.dtype == torch.float64 and got.dtype in (torch.float32, torch.float64), (got.dtype, truth.dtype)
    finite = truth.isfinite()
    torch.testing.assert_close(got[~finite].double(), truth[~finite], equal_nan=True)
    got, truth = got[finite], truth[finite]
    limit = 1e-10 if got.dtype == torch.float64 else 1e-5
    error = relative_error(got, truth)
    assert error <= limit, f"{name}: relative error {error:.2e}, allowed {limit:.0e}"
    if got.dtype == torch.float32:
        bias, limit = projected_error(got, truth), max(1e-6, 1e-5 / max(1, got.numel()) ** 0.5)
        assert bias <= limit, f"{name}: common factor of 1 + {bias:.2e}, allowed {limit:.0e}"


def random_labels(rows: tuple[int, ...], vocab: int, *, ignored: float = 0.3, dtype=torch.int64) -> Tensor:
    """About a share `ignored` is not scored; the first row scores the first token, the last row the last."""
    labels = torch.randint(vocab, rows)
    labels = labels.masked_fill(torch.rand(rows) < ignored, IGNORE)
    labels.view(-1)[:1] = 0
    labels.view(-1)[-1:] = vocab - 1
    return labels.to(DEVICE, dtype)


def random_leaf(*shape: int, dtype=torch.float64, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype).requires_grad_()


def in_double(*values: Tensor | None) -> list[Tensor | None]:
    """Leaves of the same values in fp64, for the truth."""
    return [None if v is None else v.detach().double().requires_grad_(v.requires_grad) for v in values]


class PairedBatch(NamedTuple):
    """Hidden states, a head and labels of `[B chosen; B rejected]`."""

    hidden: Tensor  # [2B, T, d], or [N, d] with cu_seqlens
    weight: Tensor  # [V, d]
    bias: Tensor | None
    labels: Tensor
    ref_logps: Tensor  # [2B]
    cu_seqlens: Tensor | None

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias).detach().requires_grad_()

    def double(self) -> PairedBatch:
        hidden, weight, bias, ref_logps = in_double(self.hidden, self.weight, self.bias, self.ref_logps)
        return self._replace(hidden=hidden, weight=weight, bias=bias, ref_logps=ref_logps)


def paired_batch(
    lengths=(3, 5, 2, 4, 0, 5),
    *,
    layout="padded",
    dtype=torch.float64,
    vocab=19,
    width=8,
    bias=False,
    frozen=False,
    scale=1.0,
) -> PairedBatch:
    """Completions of `lengths` scored tokens each, by default ragged and one of them empty. Every padded row has
    one prompt token more; `layout` "packed32" and "packed64" have one before each completion."""
    sequences, longest = len(lengths), max(lengths) + 1
    labels = torch.randint(vocab, (sequences, longest))
    for row, length in zip(labels, lengths, strict=True):
        row[0] = IGNORE
        row[length + 1 :] = IGNORE
    cu_seqlens = None
    if layout != "padded":
        labels = torch.cat([row[: n + 1] if n else row[:0] for row, n in zip(labels, lengths, strict=True)])
        sizes = torch.tensor([0] + [n + 1 if n else 0 for n in lengths])
        cu_seqlens = sizes.cumsum(0).to(DEVICE, torch.int32 if layout == "packed32" else torch.int64)
    weight = random_leaf(vocab, width, dtype=dtype)
    offsets = random_leaf(vocab, dtype=dtype) if bias else None
    if frozen:
        weight.requires_grad_(False)
        offsets = None if offsets is None else offsets.requires_grad_(False)
    hidden = random_leaf(*labels.shape, width, dtype=dtype, scale=scale)
    ref_logps = -2.5 * torch.tensor(lengths, dtype=torch.float64) + torch.randn(sequences, dtype=torch.float64)
    return PairedBatch(hidden, weight, offsets, labels.to(DEVICE), ref_logps.to(DEVICE, dtype), cu_seqlens)


class Expected(NamedTuple):
    loss: Tensor
    metrics: Tensor  # [6, B]


def expected_dpo(loss_fn, token_logps: Tensor, labels: Tensor, ref_logps: Tensor, cu_seqlens=None) -> Expected:
    """What DPOLoss must return from these log-probs, by the specification, differentiable."""
    sums = reference.sequence_logprobs(token_logps, labels, cu_seqlens=cu_seqlens)
    ones = torch.ones_like(token_logps)
    lengths = reference.sequence_logprobs(ones, labels, cu_seqlens=cu_seqlens).detach()
    columns = (*sums.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2))
    loss = reference.paired_loss(*columns, loss_fn.objective)
    return Expected(loss, reference.paired_metrics(*columns, loss_fn.objective).detach())


def expected_from_hidden(loss_fn, batch: PairedBatch, **options) -> Expected:
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels, batch.bias, **options)
    return expected_dpo(loss_fn, logps, batch.labels, batch.ref_logps, batch.cu_seqlens)


def from_hidden(loss_fn, batch: PairedBatch, **options):
    return loss_fn.from_hidden(
        batch.hidden, batch.weight, batch.labels, batch.bias, batch.ref_logps, batch.cu_seqlens, **options
    )


def assert_same_gradients(got: PairedBatch, truth: PairedBatch) -> None:
    for name in ("hidden", "weight", "bias"):
        value, exact = getattr(got, name), getattr(truth, name)
        if value is None or not value.requires_grad:
            assert value is None or value.grad is None, f"{name}: a gradient that nobody asked for"
            continue
        assert_exact_or_rounded(value.grad, exact.grad, f"gradient of {name}")
