"""The Bradley-Terry loss from rewards and from hidden states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import DEVICE, assert_exact_or_rounded, relative_error
from torch import Tensor

from fastpref import BradleyTerryLoss, reference

pytestmark = pytest.mark.usefixtures("backend")


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def tensor(*values, dtype=torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def truth(hidden, weight, bias, index, margin, layout, center) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, rewards and gradients of the specification in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    rewards = reference.row_scores(leaves[0], leaves[1].reshape(-1), leaves[2], index, layout)
    loss = reference.bradley_terry(*rewards.chunk(2), None if margin is None else margin.double(), center)
    return loss.detach(), rewards.detach(), list(torch.autograd.grad(loss, leaves))


class TestCall:
    def test_worked_values(self):
        """By hand: losses of the pairs, their centring and the derivatives."""
        chosen, rejected, margin = [2.0, -0.5, 1.0], [0.5, 0.25, 1.0], [1.0, 0.0, 3.0]
        x = [a - b - m for a, b, m in zip(chosen, rejected, margin, strict=True)]
        loss = (
            sum(softplus(-v) for v in x) / 3
            + 0.1 * sum((a + b) ** 2 for a, b in zip(chosen, rejected, strict=True)) / 3
        )
        r_w, r_l = tensor(*chosen).requires_grad_(), tensor(*rejected).requires_grad_()
        out = BradleyTerryLoss(center_coefficient=0.1)(r_w, r_l, tensor(*margin))
        assert out.loss.item() == pytest.approx(loss, rel=1e-12)
        out.loss.backward()
        sigma = [1 / (1 + math.exp(v)) for v in x]
        twice = [0.2 * (a + b) for a, b in zip(chosen, rejected, strict=True)]
        assert r_w.grad.tolist() == pytest.approx([(t - s) / 3 for s, t in zip(sigma, twice, strict=True)], rel=1e-12)
        assert r_l.grad.tolist() == pytest.approx([(t + s) / 3 for s, t in zip(sigma, twice, strict=True)], rel=1e-12)
        assert out.chosen_rewards.tolist() == chosen and out.rejected_rewards.tolist() == rejected
        assert out.margins.tolist() == [1.5, -0.75, 0.0] and out.accuracies.tolist() == [1, 0, 0]
        assert not any(t.requires_grad for t in out[1:])

    def test_equal_rewards_cost_log_2(self):
        assert BradleyTerryLoss()(tensor(0.3), tensor(0.3)).loss.item() == pytest.approx(math.log(2), rel=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_extreme_margins_stay_finite(self, dtype):
        r_w = tensor(1e4, -1e4, 0.0, 0.0, dtype=dtype).requires_grad_()
        out = BradleyTerryLoss()(r_w, torch.zeros_like(r_w), tensor(0.0, 0.0, 1e4, -1e4, dtype=dtype))
        assert out.loss.item() == pytest.approx(5000.0, rel=1e-7)
        out.loss.backward()
        assert r_w.grad.tolist() == [0, -0.25, -0.25, 0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_results_are_fp32(self, dtype):
        r_w, r_l = (torch.randn(37, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(2))
        out = BradleyTerryLoss(0.01)(r_w, r_l)
        assert all(t.dtype == torch.float32 for t in out)
        assert_exact_or_rounded(out.loss, reference.bradley_terry(r_w.double(), r_l.double(), None, 0.01))
        out.loss.backward()
        assert r_w.grad.dtype == dtype

    def test_more_pairs_than_one_block(self):
        r_w, r_l, margin = (torch.randn(1300, device=DEVICE, dtype=torch.float64).requires_grad_() for _ in range(3))
        out = BradleyTerryLoss(0.3)(r_w, r_l, margin)
        want = reference.bradley_terry(r_w, r_l, margin.detach(), 0.3)
        assert_exact_or_rounded(out.loss, want)
        for got, expected in zip(
            torch.autograd.grad(out.loss, (r_w, r_l)), torch.autograd.grad(want, (r_w, r_l)), strict=True
        ):
            assert_exact_or_rounded(got, expected)

    def test_the_margin_is_a_constant_and_may_be_integer(self):
        out = BradleyTerryLoss()(tensor(1.0), tensor(0.0), torch.tensor([2], device=DEVICE))
        assert out.loss.item() == pytest.approx(softplus(1.0), rel=1e-12)

    def test_gradcheck(self):
        margin = torch.randn(5, device=DEVICE, dtype=torch.float64)
        r_w, r_l = (torch.randn(5, device=DEVICE, dtype=torch.float64, requires_grad=True) for _ in range(2))
        loss_fn = BradleyTerryLoss(0.2)
        assert torch.autograd.gradcheck(lambda a, b: loss_fn(a, b, margin).loss, (r_w, r_l), rtol=1e-6, atol=1e-8)


LAYOUTS = ("positions", "rows", "edges")


def hidden_batch(layout: str, pairs: int, d: int, dtype=torch.float64):
    """(hidden, weight, bias, index): sequences of 1 to 5 tokens, the last real one never at a fixed place."""
    lengths = [1 + (3 * s) % 5 for s in range(2 * pairs)]
    edges = [0, *itertools.accumulate(lengths)]
    shape = (2 * pairs, 6, d) if layout == "positions" else (edges[-1], d)
    hidden = torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype)
    index = {"positions": [n - 1 for n in lengths], "rows": [e - 1 for e in edges[1:]], "edges": edges}[layout]
    weight = (torch.randn(1, d, device=DEVICE, dtype=torch.float64) / d**0.5).to(dtype)
    return (
        hidden,
        weight,
        torch.randn(1, device=DEVICE, dtype=torch.float64).to(dtype),
        torch.tensor(index, device=DEVICE),
    )


def call(loss_fn, hidden, weight, bias, index, margin, layout):
    which = {"cu_seqlens": index} if layout == "edges" else {"last_index": index}
    return loss_fn.from_hidden(hidden, weight, margin=margin, head_bias=bias, **which)


class TestFromHidden:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("pairs", "d"), [(1, 1), (1, 4097), (37, 5), (3, 130)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_specification(self, layout, pairs, d, dtype):
        hidden, weight, bias, index = hidden_batch(layout, pairs, d, dtype)
        margin = torch.randn(pairs, device=DEVICE, dtype=dtype)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        out = call(BradleyTerryLoss(0.05), *leaves, index, margin, layout)
        loss, rewards, gradients = truth(hidden, weight, bias, index, margin, layout, 0.05)
        assert_exact_or_rounded(out.loss, loss, "loss")
        assert_exact_or_rounded(torch.cat([out.chosen_rewards, out.rejected_rewards]), rewards, "rewards")
        out.loss.backward()
        for leaf, want, name in zip(leaves, gradients, ("dH", "dW", "db"), strict=True):
            assert leaf.grad.shape == leaf.shape
            assert_exact_or_rounded(leaf.grad, want.view(leaf.shape), name)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_half_precision_is_rounded_once(self, backend, dtype, layout):
        if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
            pytest.skip("the interpreter truncates bf16")
        hidden, weight, bias, index = hidden_batch(layout, 5, 70, dtype)
        leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
        out = call(BradleyTerryLoss(0.1), *leaves, index, None, layout)
        loss, rewards, gradients = truth(hidden, weight, bias, index, None, layout, 0.1)
        assert_exact_or_rounded(out.loss, loss)
        assert_exact_or_rounded(torch.cat([out.chosen_rewards, out.rejected_rewards]), rewards)
        out.loss.backward()
        for leaf, want in zip(leaves, gradients, strict=True):
            want = want.view(leaf.shape)
            ideal = relative_error(want.to(dtype), want)
            assert leaf.grad.dtype == dtype and relative_error(leaf.grad, want) <= 1.25 * ideal + 1e-6

    def test_a_pad_id_that_also_ends_sequences_is_no_matter(self):
        """Rows behind the last index, padded or not, have no say: they may hold NaN."""
        hidden, weight, bias, index = hidden_batch("positions", 3, 8)
        want = call(BradleyTerryLoss(), hidden, weight, bias, index, None, "positions").loss
        behind = torch.arange(hidden.shape[1], device=DEVICE) > index[:, None]
        spoilt = hidden.masked_fill(behind[..., None], float("nan")).requires_grad_()
        out = call(BradleyTerryLoss(), spoilt, weight, bias, index, None, "positions")
        assert torch.equal(out.loss, want)
        out.loss.backward()
        rows = torch.zeros_like(behind).scatter_(1, index[:, None], True)
        assert (spoilt.grad[~rows] == 0).all() and (spoilt.grad[rows] != 0).all()

    def test_strided_hidden_is_read_in_place(self):
        hidden, weight, bias, index = hidden_batch("positions", 4, 9)
        wide = torch.full((8, 9, 13), float("nan"), device=DEVICE, dtype=torch.float64)
        view = wide[:, 2:8, 3:12]
        view.copy_(hidden)
        across = hidden.transpose(1, 2).contiguous().transpose(1, 2)
        want, _, gradients = truth(hidden, weight, bias, index, None, "positions", 0.0)
        for strided in (view, across):
            assert not strided.is_contiguous()
            strided = strided.detach().requires_grad_()
            out = call(BradleyTerryLoss(), strided, weight, bias, index, None, "positions")
            assert_exact_or_rounded(out.loss, want)
            assert_exact_or_rounded(torch.autograd.grad(out.loss, strided)[0], gradients[0])

    def test_a_row_that_ends_two_sequences_gets_both_gradients(self):
        hidden, weight, bias, _ = hidden_batch("rows", 2, 4)
        index = torch.tensor([3, 1, 1, 0], device=DEVICE)
        hidden.requires_grad_()
        out = call(BradleyTerryLoss(0.5), hidden, weight, bias, index, None, "rows")
        _, _, gradients = truth(hidden, weight, bias, index, None, "rows", 0.5)
        assert_exact_or_rounded(torch.autograd.grad(out.loss, hidden)[0], gradients[0])

    def test_flat_head_and_mixed_dtypes(self):
        hidden, weight, _, index = hidden_batch("positions", 2, 6, torch.float16)
        flat = weight.float().reshape(-1).requires_grad_()
        out = BradleyTerryLoss().from_hidden(hidden, flat, index)
        out.loss.backward()
        zero = torch.zeros(1, device=DEVICE)
        loss, _, gradients = truth(hidden, weight, zero, index, None, "positions", 0.0)
        assert_exact_or_rounded(out.loss, loss)
        assert flat.grad.shape == (6,) and flat.grad.dtype == torch.float32
        assert_exact_or_rounded(flat.grad, gradients[1].view(-1))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_gradcheck(self, layout):
        hidden, weight, bias, index = hidden_batch(layout, 2, 3)
        margin = torch.randn(2, device=DEVICE, dtype=torch.float64)
        loss_fn = BradleyTerryLoss(0.1)

        def loss(h, w, b):
            return call(loss_fn, h, w, b, index, margin, layout).loss

        leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
        assert torch.autograd.gradcheck(loss, leaves, rtol=1e-6, atol=1e-8)

    def test_gradients_only_where_asked(self):
        hidden, weight, bias, index = hidden_batch("positions", 2, 3)
        for which in range(3):
            leaves = [t.detach().clone().requires_grad_(i == which) for i, t in enumerate((hidden, weight, bias))]
            call(BradleyTerryLoss(), *leaves, index, None, "positions").loss.backward()
            assert [t.grad is not None for t in leaves] == [i == which for i in range(3)]

    def test_second_backward_upstream_scale_and_refusal_of_double_backward(self):
        hidden, weight, bias, index = hidden_batch("edges", 2, 3)
        hidden.requires_grad_()
        loss = call(BradleyTerryLoss(), hidden, weight, bias, index, None, "edges").loss
        (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        (second,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
        torch.testing.assert_close(second, 3 * first, rtol=1e-14, atol=0)
        (again,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            again.sum().backward()

    def test_bitwise_deterministic(self):
        hidden, weight, bias, index = hidden_batch("rows", 20, 33, torch.float32)
        index[1:4] = index[0]

        def run():
            leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
            out = call(BradleyTerryLoss(0.1), *leaves, index, None, "rows")
            return [out.loss, *torch.autograd.grad(out.loss, leaves)]

        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))

    def test_compiles_without_a_graph_break(self, backend):
        if backend == "triton" and DEVICE == "cpu":
            pytest.skip("the interpreter is not compiled")
        hidden, weight, bias, index = hidden_batch("positions", 2, 3, torch.float32)
        loss_fn = BradleyTerryLoss()

        def step(h):
            return call(loss_fn, h, weight, bias, index, None, "positions").loss

        h = hidden.clone().requires_grad_()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(h)
        assert torch.equal(torch.autograd.grad(compiled, h)[0], torch.autograd.grad(step(h), h)[0])


class TestOperators:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_opcheck(self, layout):
        hidden, weight, bias, index = hidden_batch(layout, 2, 3)
        flat, margin = weight.reshape(-1), torch.ones(2, device=DEVICE, dtype=torch.float64)
        leaves = [t.detach().requires_grad_() for t in (hidden, flat, bias)]
        ops = torch.ops.fastpref
        torch.library.opcheck(ops.row_scores.default, (*leaves, index, layout))
        torch.library.opcheck(ops.linear_bradley_terry.default, (*leaves, index, margin, layout, 0.1))
        torch.library.opcheck(ops.bradley_terry.default, (torch.randn(4, device=DEVICE, requires_grad=True), None, 0.0))
        torch.library.opcheck(
            ops.row_scores_gradient.default,
            (
                torch.randn(4, device=DEVICE, dtype=torch.float64),
                None,
                hidden,
                flat,
                bias,
                index,
                layout,
                True,
                True,
                True,
            ),
        )


def _hidden(*shape):
    return torch.randn(*shape, device=DEVICE)


def _index(*values):
    return torch.tensor(values, device=DEVICE)


ONE, TWO = torch.zeros(1, device=DEVICE), torch.zeros(2, device=DEVICE)
ERRORS = [
    (lambda f: f(ONE, TWO), ValueError, "rejected_rewards: got shape (2,), want (1,) (as many as chosen_rewards)"),
    (lambda f: f(ONE[:0], ONE[:0]), ValueError, "chosen_rewards: got no pairs, want at least 1"),
    (lambda f: f(ONE[0], ONE[0]), ValueError, "chosen_rewards: got shape (), want a 1-d tensor"),
    (lambda f: f([1.0], ONE), TypeError, "chosen_rewards: got list, want a torch.Tensor"),
    (lambda f: f(TWO, TWO, ONE), ValueError, "margin: got shape (1,), want (2,) (one per pair)"),
    (
        lambda f: f.from_hidden(_hidden(3, 4, 5), _hidden(1, 5), _index(0, 1, 2)), ValueError,
        "last_index: got 3 sequences, want an even number, at least 2 ([B chosen; B rejected])",
    ),
    (
        lambda f: f.from_hidden(_hidden(9, 5), _hidden(5), cu_seqlens=_index(0, 9)), ValueError,
        "cu_seqlens: got 1 sequences, want an even number, at least 2 ([B chosen; B rejected])",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), _index(0, 1, 2, 3)), ValueError,
        "last_index: got shape (4,), want (2,) (one position per sequence of hidden)",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(2, 5), _index(0, 1)), ValueError,
        "head_weight: got shape (2, 5), want (1, 5) or (5,) (hidden is 5 wide)",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), _index(0, 1), head_bias=_hidden(2)), ValueError,
        "head_bias: got shape (2,), want (1,)",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), _index(0, 1), TWO), ValueError,
        "margin: got shape (2,), want (1,) (one per pair)",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5)), ValueError,
        "last_index, cu_seqlens: got neither, want one of them",
    ),
    (
        lambda f: f.from_hidden(_hidden(9, 5), _hidden(1, 5), _index(0, 1), cu_seqlens=_index(0, 4, 9)), ValueError,
        "last_index, cu_seqlens: got both, want one of them",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), cu_seqlens=_index(0, 4, 8)), ValueError,
        "hidden: got shape (2, 4, 5) with cu_seqlens, want packed rows [N, d]",
    ),
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), _index(0, 1).float()), TypeError,
        "last_index: got dtype float32, want int32 or int64",
    ),
    (
        lambda f: BradleyTerryLoss(-1.0), ValueError, "center_coefficient: got -1.0, want a number in [0.0, inf)",
    ),
]  # fmt: skip
RANGE_ERRORS = [
    (
        lambda f: f.from_hidden(_hidden(2, 4, 5), _hidden(1, 5), _index(3, 4)),
        "last_index: got 4 for sequence 1, want a position in [0, 4)",
    ),
    (
        lambda f: f.from_hidden(_hidden(9, 5), _hidden(1, 5), _index(-1, 3)),
        "last_index: got -1 for sequence 0, want a row in [0, 9)",
    ),
    (
        lambda f: f.from_hidden(_hidden(9, 5), _hidden(1, 5), cu_seqlens=_index(0, 9, 9)),
        "cu_seqlens: got no rows in sequence 1, want at least 1 in each",
    ),
    (
        lambda f: f.from_hidden(_hidden(9, 5), _hidden(1, 5), cu_seqlens=_index(0, 4, 8)),
        "cu_seqlens: got [0, 4, 8], want ascending offsets from 0 to the number of rows, 9",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[message.split(",")[0] for *_, message in ERRORS])
def test_errors(wrong, kind, message):
    with pytest.raises(kind) as error:
        wrong(BradleyTerryLoss())
    assert str(error.value) == message


@pytest.mark.parametrize(("wrong", "message"), RANGE_ERRORS, ids=[m.split(",")[0] for _, m in RANGE_ERRORS])
def test_range_errors(wrong, message, monkeypatch):
    monkeypatch.setenv("FASTPREF_DEBUG", "1")
    with pytest.raises(ValueError) as error:
        wrong(BradleyTerryLoss())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("layout", "index"), [("positions", (4, 0)), ("positions", (-1, 0)), ("rows", (8, 0)), ("edges", (0, 0, 8))]
)
def test_a_row_that_does_not_exist_scores_nan_where_nothing_checks(layout, index, backend):
    """What an accelerator does, where a check would be a host sync: straight through the backend."""
    from fastpref.backends import backend_for

    hidden, weight = _hidden(2, 4, 5), _hidden(5)
    hidden = hidden if layout == "positions" else hidden.view(8, 5)
    module = backend_for(hidden)
    scores = module.row_scores(hidden, weight, None, _index(*index), layout=layout)
    assert scores.isnan().tolist() == [True, False]
    d_hidden, *_ = module.row_scores_gradient(
        torch.ones(2, device=DEVICE), None, hidden, weight, None, _index(*index), layout=layout,
        need_hidden=True, need_weight=False, need_bias=False,
    )  # fmt: skip
    assert (d_hidden != 0).any(-1).sum() == 1
