"""What rewards are compared with: KTO's z0 and BCO's running delta."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import DEVICE, assert_exact_or_rounded, paired_batch
from support_unpaired import LABELLED, assert_output, call, expected, products, rows_of

from fastpref import BCOLoss, kto_kl, mismatched_indices, mismatched_kl_from_hidden, reference


def test_kto_kl(backend):
    logps = torch.tensor([-3.0, -5.0, -4.0], device=DEVICE, requires_grad=True)
    ref = torch.tensor([-4.0, -5.5, -4.75], device=DEVICE)
    assert kto_kl(logps, ref).item() == 0.75 and not kto_kl(logps, ref).requires_grad
    assert kto_kl(logps, ref + 2).item() == 0  # the mean of one-sample estimates may be negative, a KL may not
    assert reference.kto_kl(logps, ref).item() == 0.75


@pytest.mark.parametrize("layout", ["padded", "packed32"])
def test_mismatched_kl_from_hidden(backend, layout):
    batch = paired_batch(layout=layout, bias=True)
    ref = batch.ref_logps - 20
    got = mismatched_kl_from_hidden(
        batch.hidden, batch.weight, batch.labels, ref, batch.bias, batch.cu_seqlens, softcap=3.0
    )
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels, batch.bias, softcap=3.0)
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens)
    assert_exact_or_rounded(got, reference.kto_kl(sums, ref))
    assert got > 0 and got.ndim == 0 and not got.requires_grad


def test_mismatched_indices_are_trls_rotation():
    """TRL 1.16, kto_trainer.py, `add_kl_completion_ids`, mapped over blocks of the batch size."""
    completions = list(range(11))
    blocks = [completions[i : i + 4] for i in range(0, 11, 4)]
    want = [c for block in blocks for c in [block[-1], *block[:-1]]]
    assert mismatched_indices(11, 4) == want == [3, 0, 1, 2, 7, 4, 5, 6, 10, 8, 9]
    assert mismatched_indices(5, 2) == [1, 0, 3, 2, 4]
    assert mismatched_indices(0, 2) == []


# BCO's running shift


REWARDS = [[1.0, 3.0, -2.0], [0.5, -1.0, -3.0], [4.0, 2.0, 1.0]]
CLASSES = [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def run_batches(loss_fn, batches=range(3), dtype=torch.float64) -> list[float]:
    """Each batch's delta; beta = 1 and a reference of zeros, so that log-probs are rewards."""
    rewards, classes = (torch.tensor(x, device=DEVICE) for x in (REWARDS, CLASSES))
    zeros = torch.zeros(3, device=DEVICE, dtype=dtype)
    return [loss_fn(rewards[i].to(dtype), classes[i].bool(), zeros).shift.item() for i in batches]


def test_ema_by_hand():
    """Class means: desirable 2, 0.5, 7/3; undesirable -2, -2, none."""
    desirable = [2.0, 0.8 * 2 + 0.2 * 0.5, 0.8 * 1.7 + 0.2 * 7 / 3]
    want = [(2.0 - 2.0) / 2, (desirable[1] - 2.0) / 2, (desirable[2] - 2.0) / 2]
    assert run_batches(BCOLoss(1.0, decay=0.8)) == pytest.approx(want, abs=1e-14)


def test_running_mean_by_hand():
    """TRL 1.13's RunningMoments: the mean of everything seen."""
    flat = [r for batch in REWARDS for r in batch]
    want = [sum(flat[:n]) / n for n in (3, 6, 9)]
    assert run_batches(BCOLoss(1.0, shift="mean")) == pytest.approx(want, abs=1e-14)


def test_the_first_batch_may_have_one_class():
    loss_fn = BCOLoss(1.0)
    assert loss_fn.delta.item() == 0
    assert run_batches(loss_fn, [2]) == pytest.approx([7 / 3])
    assert run_batches(loss_fn, [0]) == pytest.approx([(0.9 * 7 / 3 + 0.1 * 2 - 2) / 2])


@pytest.mark.parametrize("shift", ["ema", "mean"])
def test_state_dict_round_trip(shift):
    loss_fn, other = BCOLoss(1.0, shift=shift), BCOLoss(1.0, shift=shift)
    run_batches(loss_fn, [0, 1], torch.float32)
    assert set(loss_fn.state_dict()) == {"class_means", "class_counts"}
    other.load_state_dict(loss_fn.state_dict())
    assert other.delta.item() == loss_fn.delta.item() != 0
    assert run_batches(other, [2], torch.float32) == run_batches(loss_fn, [2], torch.float32)


def test_updates_follow_the_mode_unless_told():
    logps, zeros = torch.tensor([1.0, -3.0], device=DEVICE), torch.zeros(2, device=DEVICE)
    desirable = torch.tensor([True, False], device=DEVICE)
    loss_fn = BCOLoss(1.0)
    assert loss_fn(logps, desirable, zeros, update=False).shift == 0
    assert loss_fn.eval()(logps, desirable, zeros).shift == 0
    assert loss_fn(logps, desirable, zeros, update=True).shift == -1
    assert loss_fn.class_counts.tolist() == [1, 1]
    loss_fn.train()(logps, desirable, zeros)
    assert loss_fn.class_counts.tolist() == [2, 2]


@pytest.mark.parametrize("entry", ["logits", "store", "recompute", "frozen"])
@pytest.mark.parametrize("layout", ["padded", "packed64"])
def test_bco_updates_from_its_batch_before_the_loss(backend, layout, entry):
    batch, loss_fn = paired_batch(layout=layout, frozen=entry == "frozen"), BCOLoss(0.3)
    logps = reference.linear_token_logprobs(batch.hidden, batch.weight, batch.labels)
    sums = reference.sequence_logprobs(logps, batch.labels, cu_seqlens=batch.cu_seqlens).detach()
    rewards = 0.3 * (sums - batch.ref_logps)
    delta = (rewards[LABELLED].mean() + rewards[~LABELLED].mean()) / 2
    if entry == "logits":
        out = loss_fn.from_logits(batch.logits(), batch.labels, LABELLED, batch.ref_logps, batch.cu_seqlens)
    else:
        out = call(loss_fn, batch, plan=entry)
    assert_exact_or_rounded(out.shift, delta)
    assert_output(out, expected(loss_fn, logps, batch, shift=delta))


def test_bco_with_the_shift_of_the_batch_before(backend):
    """Three products in bounded memory: the loss first, the update from its rewards."""
    batch, loss_fn = paired_batch(), BCOLoss(0.3)
    assert products(lambda: call(loss_fn, batch, update=True, plan="recompute").loss.backward(), rows_of(batch)) == 4
    before = loss_fn.delta.clone()
    out = call(loss_fn, batch, update=False, plan="pair")
    assert_exact_or_rounded(out.shift, before.double())
    loss_fn.update_shift(out.rewards, out.desirable)
    assert loss_fn.class_counts.tolist() == [6, 6]


RANK = """
import sys, torch, torch.distributed as dist
from fastpref import BCOLoss, kto_kl
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
logps = [torch.tensor([1.0, 2.0]), torch.tensor([-6.0, 5.0, 4.0, 7.0])][rank]
desirable = [torch.tensor([True, True]), torch.tensor([False, True, True, True])][rank]
loss_fn = BCOLoss(1.0)
out = loss_fn(logps, desirable, torch.zeros_like(logps))
print(kto_kl(logps, torch.zeros_like(logps)).item(), kto_kl(-logps, torch.zeros_like(logps)).item(),
      out.shift.item(), *loss_fn.class_counts.tolist())
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks(tmp_path):
    """z0: the mean of the ranks' means 1.5 and 2.5; delta: between 19 / 5 and -6, wherever the sequences are."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(r), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for r in range(2)
    ]
    results = [rank.communicate(timeout=100)[0].split() for rank in ranks]
    for result in results:
        assert [float(x) for x in result] == pytest.approx([2.0, 0.0, (3.8 - 6) / 2, 5, 1])
