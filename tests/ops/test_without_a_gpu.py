"""What only an accelerator runs, without one: whole forwards and backwards on tensors that have no values.

Every operator checks shapes and dtypes, and nobody can look at a value. Kernels are launched, with whatever they would
be given, but not run. So this finds products that have no such dtypes, tensors that were left on the CPU, and waits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from counting import Operators
from support import DEVICE
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastpref
from fastpref import (
    DPOLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PolicyGradientLoss,
    SimPOLoss,
    backends,
)
from fastpref.models import attention
from fastpref.models.segments import Segment, Segments
from fastpref.plans import products

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="there is one: kernels are not interpreted")
LENGTHS, VOCAB, WIDTH = (3, 5, 2, 4, 2, 5), 137, 16
TOTAL, SEQUENCES = sum(LENGTHS), len(LENGTHS)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# of hidden states and weight, and of autocast
PRECISIONS = [(BF16, None), (FP32, BF16), (FP16, None), (FP32, FP16), (FP32, None)]
IDS = ["bf16", "bf16 autocast", "fp16", "fp16 autocast", "fp32"]


class OnTheDevice(Operators):
    """Every operator's tensors must be there, but for numbers: meta operators take those of a CPU, too."""

    def _note(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
        assert all(x.device.type == "meta" for x in tensors), name
        super()._note(name, args, kwargs, result)


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """What CUDA's product demands: that of meta tensors takes any dtypes."""
    assert a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    assert out_dtype is None or (a.dtype.itemsize == 2 and out_dtype == FP32)
    out = empty(a.shape[0], b.shape[1], dtype=out_dtype or a.dtype) if out is None else out
    assert out.shape == (a.shape[0], b.shape[1]) and out.dtype == (out_dtype or a.dtype)
    return out


def addmm(x: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    assert x.dtype == mm(a, b, **options).dtype
    return options["out"]


class Accelerator:
    """Makes the meta device one: Triton's kernels, mixed-output products, autocast as to `cast`."""

    def __init__(self, monkeypatch, operators: Operators) -> None:
        from fastpref_kernels import _launch
        from triton.runtime import interpreter

        self.operators, self.launched = operators, Counter[str]()
        self.cast: torch.dtype | None = None

        def launch(executor, *arguments, **options) -> None:
            tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
            assert {x.device.type for x in tensors} == {"meta"}, executor.fn
            self.launched[executor.fn.__name__.strip("_")] += 1

        for owner, name, value in (
            (interpreter.GridExecutor, "__call__", launch),
            (_launch, "warp_size", lambda device: 32),
            (torch, "mm", mm),
            (torch, "addmm", addmm),
            (backends, "ACCELERATORS", ("meta",)),
            (products, "MIXED_OUTPUT", ("meta",)),
            (torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
            (torch, "is_autocast_enabled", lambda device: self.cast is not None),
            (torch, "get_autocast_dtype", lambda device: self.cast),
        ):
            monkeypatch.setattr(owner, name, value)


@pytest.fixture
def accelerator(monkeypatch) -> Iterator[Accelerator]:
    with OnTheDevice() as operators:  # runs our operators themselves, not what says of which shape their results are
        yield Accelerator(monkeypatch, operators)


class Batch(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    edges: Tensor

    @classmethod
    def of(cls, dtype: torch.dtype, trainable: bool = True) -> Batch:
        hidden, weight, bias = (empty(*shape, dtype=dtype) for shape in ((TOTAL, WIDTH), (VOCAB, WIDTH), (VOCAB,)))
        for head in (weight, bias):
            head.requires_grad_(trainable)
        labels, edges = empty(TOTAL, dtype=torch.long), empty(SEQUENCES + 1, dtype=torch.int32)
        return cls(hidden.requires_grad_(), weight, bias, labels, edges)

    def check(self, loss: Tensor) -> None:
        """One backward, and a gradient of every leaf in its dtype."""
        assert (loss.shape, loss.dtype, loss.device.type) == ((), FP32, "meta")
        loss.backward()
        for leaf in self[:3]:
            assert (leaf.grad is not None) == leaf.requires_grad
            assert leaf.grad is None or (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)


def empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def room(rows: int, dtype: torch.dtype, cast: torch.dtype | None) -> int:
    """The bytes of so many rows of logits."""
    return rows * VOCAB * (cast or dtype).itemsize


@pytest.mark.parametrize(("dtype", "cast"), PRECISIONS, ids=IDS)
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
@pytest.mark.parametrize("statistics", [(), ("entropy", "mean_logit")])
def test_log_probs(statistics, plan, dtype, cast, accelerator):
    accelerator.cast, x = cast, Batch.of(dtype, plan != "frozen")
    found = fastpref.linear_token_statistics(
        x.hidden, x.weight, x.labels, x.bias, statistics, softcap=30.0, plan=plan,
        workspace_bytes=room(9, dtype, cast), scored_rows=TOTAL - 1,
    )  # fmt: skip
    x.check((found.logps + found.entropy if statistics else found.logps).sum())
    assert accelerator.launched["row_logprob_kernel"] == 3
    assert (accelerator.launched["target_logit_kernel"] > 0) == (dtype != FP32 or cast is not None)


@pytest.mark.parametrize(("dtype", "cast"), PRECISIONS, ids=IDS)
@pytest.mark.parametrize("plan", ["frozen", "store", "recompute"])
@pytest.mark.parametrize("direction", ["reverse", "jsd"])
def test_exact_divergences(direction, plan, dtype, cast, accelerator):
    accelerator.cast, x = cast, Batch.of(dtype, plan != "frozen")
    ref = empty(TOTAL, 8, dtype=dtype), empty(VOCAB, 8, dtype=dtype)
    found = fastpref.linear_token_kl(
        x.hidden, x.weight, *ref, x.labels, x.bias, direction=direction, plan=plan,
        workspace_bytes=room(9, dtype, cast), scored_rows=TOTAL - 1,
    )  # fmt: skip
    x.check(found.kl.sum())
    assert accelerator.launched["token_kl_kernel"] > 0


def paired(loss_fn):
    def call(x, **options):
        return loss_fn.from_hidden(x.hidden, x.weight, x.labels, x.bias, empty(SEQUENCES), x.edges, **options).loss

    return call


def kto(x, **options):
    given = empty(SEQUENCES, dtype=torch.bool), x.bias, empty(SEQUENCES), empty(), x.edges
    return KTOLoss().from_hidden(x.hidden, x.weight, x.labels, *given, **options).loss


LOSSES = {
    "dpo": paired(DPOLoss()), "wpo": paired(DPOLoss(use_weighting=True)), "ipo": paired(IPOLoss()),
    "aot": paired(DPOLoss(loss_type="aot")), "simpo": paired(SimPOLoss()), "orpo": paired(ORPOLoss()), "kto": kto,
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "cast"), PRECISIONS[:4], ids=IDS[:4])
@pytest.mark.parametrize(
    ("plan", "rows"), [("frozen", 9), ("store", 9), ("pair", TOTAL), ("pair", 13), ("pair", 2)], ids=str
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, plan, rows, dtype, cast, accelerator):
    """With plan `pair` all at once, in groups, or each group recomputed."""
    accelerator.cast, x = cast, Batch.of(dtype, plan != "frozen")
    x.check(LOSSES[name](x, plan=plan, workspace_bytes=room(rows, dtype, cast), scored_rows=LENGTHS))
    assert any("paired_loss" in kernel for kernel in accelerator.launched)


@pytest.mark.parametrize("plan", ["store", "recompute", "pair"])
def test_the_head_is_cast_once_and_products_copy_nothing(plan, accelerator):
    """Under autocast dW is stored in fp32 by the product that forms it, and U is read by it as it is."""
    accelerator.cast, x = BF16, Batch.of(FP32)
    bytes_of = room(TOTAL, FP32, BF16)
    x.check(LOSSES["dpo"](x, plan=plan, workspace_bytes=bytes_of, scored_rows=LENGTHS))
    upstream = {"pair": 4 + 4}.get(plan, 0)  # the loss's own upstream gradient: one read, one write
    assert accelerator.operators.moved(VOCAB, WIDTH) == VOCAB * WIDTH * (4 + 2 + upstream)
    assert accelerator.operators.moved(TOTAL, VOCAB) == 0


@pytest.mark.parametrize(("most", "stored"), [(0, BF16), (products.ONE_WAVE, FP32)])
def test_a_product_that_may_be_split_over_the_vocabulary_adds_up_in_fp32(most, stored, accelerator, monkeypatch):
    """Its parts would be added up in the dtype of the result."""
    found = []
    monkeypatch.setattr(torch, "mm", lambda *args, **options: found.append(mm(*args, **options)) or found[-1])
    monkeypatch.setattr(products, "ONE_WAVE", most)
    x = Batch.of(BF16, trainable=False)
    x.check(fastpref.linear_token_logprobs(x.hidden, x.weight, x.labels, plan="frozen", scored_rows=TOTAL).sum())
    assert [(tuple(y.shape), y.dtype) for y in found] == [((TOTAL, VOCAB), BF16), ((TOTAL, WIDTH), stored)]


@pytest.mark.parametrize(("dtype", "cast"), PRECISIONS, ids=IDS)
def test_policy_gradients(dtype, cast, accelerator):
    accelerator.cast, x = cast, Batch.of(dtype)
    loss_fn = PolicyGradientLoss(beta=0.1, entropy_coef=0.1)
    out = loss_fn.from_hidden(
        x.hidden, x.weight, x.labels, empty(SEQUENCES), empty(TOTAL), empty(TOTAL), x.bias, x.edges,
        workspace_bytes=room(9, dtype, cast), scored_rows=TOTAL - 1,
    )  # fmt: skip
    x.check(out.loss)
    assert accelerator.launched["policy_loss_kernel"] == accelerator.launched["row_gradient_kernel"] == 3


SEGMENTS = Segments.of(
    [Segment(0, 7), Segment(7, 11, ((0, 4),)), Segment(11, 12, ((0, 4), (7, 9))), Segment(12, 15)]
).to("meta")


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_packed_rows(window, softcap, accelerator, monkeypatch):
    """One call, whatever the number of segments, with as few key heads as there are; none a segment."""
    given = [empty(1, heads, 15, 64, dtype=BF16).requires_grad_() for heads in (4, 2, 2)]
    calls = []

    def varlen(q, k, v, cu_queries, cu_keys, *_, **options):
        calls.append((q.shape, k.shape, v.shape))
        assert cu_queries.dtype == cu_keys.dtype == torch.int32 and all(x.is_contiguous() for x in (q, k, v))
        return q * k.sum() * v.sum()

    def flex(query, key, value, score_mod, block_mask, **options):
        calls.append(tuple(x[0].transpose(0, 1).shape for x in (query, key, value)))
        assert score_mod(query).shape == query.shape
        return query * key.sum() * value.sum()

    monkeypatch.setattr(attention, "_varlen", lambda: (varlen, frozenset(("scale", "window_size", "enable_gqa"))))
    monkeypatch.setattr(attention, "_flex", lambda device: flex)
    monkeypatch.setattr(Segments, "block_mask", lambda self, window: None)
    if softcap is None:
        out = attention.by_varlen(*given, SEGMENTS, 0.3, window)
    else:
        out = attention.by_flex(*given, SEGMENTS, 0.3, window, softcap)
    out.sum().backward()
    assert calls == [((15, 4, 64), (25, 2, 64), (25, 2, 64))]
    assert [x.grad.dtype for x in given] == [BF16] * 3
