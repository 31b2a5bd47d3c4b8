"""Losses on ranked lists: a naive loop in fp64, DPO and its pairs, every entry point and plan, both backends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import DEVICE, assert_exact_or_rounded, assert_same_gradients, random_leaf
from support_lists import GROUP, LOSSES, RANKS, SIZES, VOCAB, call, list_batch, naive_loss
from support_unpaired import products, rows_of
from torch.autograd import gradcheck

from fastpref import BradleyTerryLoss, DPOLoss, ListDPOLoss, reference

EXACT = {"rtol": 1e-6, "atol": 1e-8, "nondet_tol": 0.0, "fast_mode": True}
# more than one block of the kernel, groups that are not together, and of one, two and many
SCATTERED = torch.tensor([i * 7 % 5 if i % 6 else 40 + i for i in range(37)], device=DEVICE)


def scattered(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logps, refs = (torch.randn(37, generator=generator, dtype=torch.float64) * 9 - 40 for _ in range(2))
    ranks = torch.randint(0, 4, (37,), generator=generator)
    return logps.to(DEVICE, dtype).requires_grad_(), refs.to(DEVICE, dtype), ranks.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
def test_a_naive_loop_gives_the_same(backend, name, dtype):
    loss_fn, (logps, refs, ranks) = LOSSES[name], scattered(dtype)
    o = loss_fn.objective
    out = loss_fn(logps, refs, ranks, SCATTERED)
    scores = (o.beta * (logps.detach().double() - refs.double())).tolist()
    want = naive_loss(name, scores, ranks.tolist(), SCATTERED.tolist(), o.nu)
    assert out.loss.item() == pytest.approx(want, rel=1e-12 if dtype == torch.float64 else 1e-6)
    (got,) = torch.autograd.grad(out.loss, logps)
    exact = logps.detach().double().requires_grad_()
    truth = reference.list_loss(o.beta * (exact - refs.double()), ranks, SCATTERED, o)
    assert_exact_or_rounded(got, *torch.autograd.grad(truth, exact), "gradient")
    metrics = reference.list_metrics(exact.detach(), refs.double(), ranks, SCATTERED, o)
    for found, wanted in zip(out[1:], metrics, strict=True):
        assert_exact_or_rounded(found, wanted)
    assert not any(x.requires_grad for x in out[1:])


def test_the_measures_of_a_list(backend):
    """Rewards 1, 0, 0.5, -1 of ranks 1, 0, 1, 2: of five pairs three are right; the best has 0, the worst -1."""
    ref = torch.full((5,), -3.0, dtype=torch.float64, device=DEVICE)
    logps = ref + torch.tensor([2.0, 0.0, 1.0, -2.0, 9.0], dtype=torch.float64, device=DEVICE)
    out = ListDPOLoss(0.5, "all_pairs")(logps, ref, torch.tensor([1, 0, 1, 2, 0], device=DEVICE), sizes=[4, 1])
    assert out.accuracies.item() == pytest.approx(3 / 5) and out.margins.item() == pytest.approx(1.0)
    assert (out.chosen_rewards.item(), out.rejected_rewards.item()) == pytest.approx((0.0, -1.0))
    assert (out.chosen_logps.item(), out.rejected_logps.item()) == pytest.approx((-3.0, -5.0))
    assert out.rewards.tolist() == pytest.approx([1.0, 0.0, 0.5, -1.0, 4.5])


@pytest.mark.parametrize("name", ["plackett_luce", "all_pairs"])
def test_two_responses_are_dpo(backend, name):
    columns = [random_leaf(6, scale=9) for _ in range(2)]
    refs = [random_leaf(6, scale=9).detach() for _ in range(2)]
    pairs = DPOLoss(0.3)(*columns, *refs)
    ranks = torch.arange(2, device=DEVICE).repeat_interleave(6)
    out = LOSSES[name](torch.cat(columns), torch.cat(refs), ranks, torch.arange(6, device=DEVICE).repeat(2))
    torch.testing.assert_close(out.loss, pairs.loss, rtol=1e-14, atol=0)
    for got, want in zip(*(torch.autograd.grad(x.loss, columns) for x in (out, pairs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-16)
    assert out.accuracies.item() == pytest.approx(pairs.accuracies.mean().item())
    assert out.margins.item() == pytest.approx(pairs.margins.mean().item())


def test_all_pairs_is_trl_s_loss_of_its_pairs(backend):
    """TRL 1.16, dpo_trainer.py, 'sigmoid': the losses of the six pairs of a list of four, their mean."""
    logps, refs = random_leaf(4, scale=5), random_leaf(4, scale=5).detach()
    pairs = torch.tensor(list(itertools.combinations(range(4), 2)), device=DEVICE)
    chosen, rejected = (logps - refs)[pairs].unbind(1)
    trl = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    out = LOSSES["all_pairs"](logps, refs, torch.arange(4, device=DEVICE), sizes=[4])
    torch.testing.assert_close(out.loss, trl, rtol=1e-13, atol=0)
    for got, want in zip(*(torch.autograd.grad(x, logps) for x in (out.loss, trl)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", ["rao_kupper", "davidson"])
def test_the_probabilities_of_win_tie_and_loss_add_up_to_one(backend, name):
    """And with the paper's nu, equal scores tie half of the time."""
    for difference in (0.0, 0.4, -3.0):
        logps = torch.tensor([difference, 0.0], dtype=torch.float64, device=DEVICE)
        zeros, outcomes = torch.zeros_like(logps), torch.tensor([[0, 1], [1, 0], [0, 0]], device=DEVICE)
        losses = [ListDPOLoss(1.0, name)(logps, zeros, ranks, sizes=[2]).loss.item() for ranks in outcomes]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, rel=1e-14)
        if not difference:
            assert math.exp(-losses[2]) == pytest.approx(0.5, rel=1e-14)


def test_ties_pull_scores_together_where_the_loss_knows_them(backend):
    """Plackett-Luce and all pairs do not compare tied responses; the models of ties ask for equal scores."""
    logps = torch.tensor([3.0, 0.0, -40.0], dtype=torch.float64, device=DEVICE).requires_grad_()
    ranks = torch.tensor([0, 0, 1], device=DEVICE)
    for name, loss_fn in LOSSES.items():
        out = loss_fn(logps, torch.zeros_like(logps), ranks, sizes=[3])
        (gradient,) = torch.autograd.grad(out.loss, logps)
        first, second, _ = gradient.tolist()
        assert second < 0 and (first < 0) == (name in ("plackett_luce", "all_pairs"))
        assert sum(gradient.tolist()) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_compare_is_a_differentiable_zero_and_does_not_count(backend, name):
    logps, refs = random_leaf(5), random_leaf(5).detach()
    ranks, loss_fn = torch.tensor([0, 1, 7, 4, 4], device=DEVICE), LOSSES[name]
    alone = loss_fn(logps, refs, ranks, torch.arange(5, device=DEVICE))
    (gradient,) = torch.autograd.grad(alone.loss, logps)
    assert alone.loss.item() == 0 and gradient.tolist() == [0.0] * 5 and alone.margins.item() == 0
    ties_count = name in reference.TIE_MODELS
    whole = loss_fn(logps, refs, ranks, sizes=[2, 1, 2]).loss
    parts = [loss_fn(logps[part], refs[part], ranks[part], sizes=[2]).loss for part in (slice(2), slice(3, 5))]
    want = sum(parts) / 2 if ties_count else parts[0]
    torch.testing.assert_close(whole, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", ["padded", "packed32"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("plan", ["pair", "store", "recompute"])
def test_from_hidden_states(backend, plan, frozen, layout):
    """Groups together, the larger one beyond the workspace; loss, measures and gradients by the specification."""
    if frozen and plan != "pair":
        plan = "auto"
    batch = list_batch(layout=layout, bias=True, frozen=frozen)
    truth, loss_fn = batch.double(), LOSSES["davidson"]
    options = {"workspace_bytes": 6 * VOCAB * 8} if plan == "pair" else {}
    out = call(loss_fn, batch, plan=plan, **options)
    logps = reference.linear_token_logprobs(truth.hidden, truth.weight, truth.labels, truth.bias)
    sums = reference.sequence_logprobs(logps, truth.labels, cu_seqlens=truth.cu_seqlens)
    want = reference.list_loss(0.3 * (sums - truth.ref_logps), RANKS, GROUP, loss_fn.objective)
    assert_exact_or_rounded(out.loss, want.detach(), "loss")
    metrics = reference.list_metrics(sums.detach(), truth.ref_logps, RANKS, GROUP, loss_fn.objective)
    assert_exact_or_rounded(torch.stack(out[1:]), metrics, "metrics")
    out.loss.backward()
    want.backward()
    assert_same_gradients(batch, truth)


def test_a_group_is_finished_whole_wherever_its_responses_are(backend):
    """Plan pair cuts between groups only: where they are interleaved, all of them are one piece."""
    group = torch.tensor([0, 1, 0, 1, 2, 2], device=DEVICE)
    batch, room = list_batch(), {"plan": "pair", "workspace_bytes": VOCAB * 8}
    want = call(LOSSES["all_pairs"], batch, group=group, plan="store").loss
    torch.testing.assert_close(call(LOSSES["all_pairs"], batch, group=group, **room).loss, want, rtol=1e-13, atol=0)
    known = call(LOSSES["all_pairs"], batch, group=None, sizes=SIZES, **room)
    torch.testing.assert_close(known.loss, call(LOSSES["all_pairs"], batch, plan="store").loss, rtol=1e-13, atol=0)


def test_three_products_with_a_trainable_head_two_with_a_frozen_one(backend):
    for frozen, plan, times in ((False, "pair", 3), (False, "store", 3), (True, "auto", 2), (True, "pair", 2)):
        batch = list_batch(frozen=frozen)
        done = products(
            lambda b=batch, p=plan: call(LOSSES["plackett_luce"], b, plan=p).loss.backward(), rows_of(batch)
        )
        assert done == pytest.approx(times), (frozen, plan)


@pytest.mark.parametrize("entry", ["log-probs", "logits", "hidden"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(backend, name, entry):
    loss_fn, batch = LOSSES[name], list_batch()
    if entry == "log-probs":
        logps, refs, ranks = scattered()
        assert gradcheck(
            lambda x: loss_fn(x, refs, ranks, SCATTERED).loss, (logps,), **EXACT | {"fast_mode": backend == "triton"}
        )
    elif entry == "logits":
        given = (batch.labels, RANKS, batch.ref_logps, GROUP)
        assert gradcheck(lambda z: loss_fn.from_logits(z, *given).loss, (batch.logits(),), **EXACT)
    else:

        def loss(hidden, weight):
            part = batch._replace(hidden=hidden, weight=weight)
            return call(loss_fn, part, sizes=SIZES, plan="pair", workspace_bytes=6 * VOCAB * 8).loss

        assert gradcheck(loss, (batch.hidden, batch.weight), **EXACT)


@pytest.mark.parametrize("name", LOSSES)
def test_scores_far_apart_stay_finite(backend, name):
    for scale in (1e3, 1e5):
        logps = (torch.tensor([1.0, -1.0, 0.5, 0.5], device=DEVICE) * scale).requires_grad_()
        ranks = torch.tensor([1, 0, 2, 2], device=DEVICE)
        out = LOSSES[name](logps, torch.zeros_like(logps), ranks, sizes=[4])
        (gradient,) = torch.autograd.grad(out.loss, logps)
        assert out.loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() <= 0.9


@pytest.mark.parametrize("method", ["pairs", "plackett_luce", "rao_kupper", "davidson"])
def test_reward_models_have_the_same_formulas(backend, method):
    rewards = random_leaf(37)
    _, _, ranks = scattered()
    name = {"pairs": "all_pairs"}.get(method, method)
    nu = LOSSES[name].objective.nu if name in reference.TIE_MODELS else None
    out = BradleyTerryLoss().from_rankings(rewards, ranks, SCATTERED, method, nu)
    want = naive_loss(name, rewards.tolist(), ranks.tolist(), SCATTERED.tolist(), nu or 1.0)
    assert out.loss.item() == pytest.approx(want, rel=1e-12)
    assert gradcheck(
        lambda r: BradleyTerryLoss().from_rankings(r, ranks, SCATTERED, method, nu).loss, (rewards,), **EXACT
    )


TWO = torch.zeros(2, device=DEVICE)
ERRORS = [
    (lambda f: f(TWO, TWO, TWO), "group, sizes: got neither, want which prompt each response answers"),
    (lambda f: f(TWO, TWO, TWO, sizes=[3]),
     "sizes: got [3], want at least 1 response to each prompt, 2 in all"),
    (lambda f: f(TWO, TWO, TWO, sizes=[2, 0]),
     "sizes: got [2, 0], want at least 1 response to each prompt, 2 in all"),
    (lambda f: f(TWO, TWO, TWO, TWO.long(), sizes=[1, 1]),
     "sizes: got [1, 1], want those of the groups, one after the other: [2]"),
    (lambda f: f(TWO, TWO, TWO / 0, sizes=[2]), "ranks: got NaN at 0, want a number for each response"),
    (lambda f: f(TWO, None, TWO, sizes=[2]), "ref_logps: got None, want the reference model's log-probs [2]"),
    (lambda f: f(TWO, TWO, TWO[:1], sizes=[2]), "ranks: got shape (1,), want (2,) (one per response)"),
    (lambda f: f(TWO[:0], TWO, TWO, sizes=[2]), "logps: got no responses, want at least 1"),
    (lambda f: ListDPOLoss(loss_type="listwise"),
     "loss_type: got 'listwise', want one of plackett_luce, all_pairs, rao_kupper, davidson"),
    (lambda f: ListDPOLoss(nu=2.0),
     "nu: got 2.0 with loss_type 'plackett_luce', want None: it is of rao_kupper, davidson"),
    (lambda f: ListDPOLoss(loss_type="rao_kupper", nu=1.0), "nu: got 1.0, want more than 1 for loss_type 'rao_kupper'"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors(wrong, message):
    with pytest.raises(ValueError) as error:
        wrong(ListDPOLoss())
    assert str(error.value) == message


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_bits_every_time(backend, name):
    batch = list_batch(dtype=torch.float32)
    runs = []
    for _ in range(2):
        out = call(LOSSES[name], batch, sizes=SIZES, plan="pair", workspace_bytes=6 * VOCAB * 4)
        runs.append([*out, *torch.autograd.grad(out.loss, [batch.hidden, batch.weight])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_it_compiles_in_one_graph(backend):
    """With sizes the units are known while it is traced; without, the gradients are recomputed."""
    batch, loss_fn = list_batch(), LOSSES["davidson"]

    def loss(hidden, group, sizes):
        return call(loss_fn, batch._replace(hidden=hidden), group=group, sizes=sizes).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for group, sizes in ((GROUP, None), (None, SIZES), (GROUP, SIZES)):
        want = torch.autograd.grad(loss(batch.hidden, group, sizes), batch.hidden)
        got = torch.autograd.grad(compiled(batch.hidden, group, sizes), batch.hidden)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
