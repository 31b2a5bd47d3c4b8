"""Reward normalisation: the statistics, their merging, and what is done with them."""

from __future__ import annotations

import io
import statistics

import pytest
import torch
import torch.distributed as dist
from support import DEVICE

from fastpref import RewardNormalizer

VALUES = [[1.0, 2.0, 4.0], [8.0], [-3.0, 0.5]]


def batch(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def normalizer(*args, **kwargs) -> RewardNormalizer:
    return RewardNormalizer(*args, **kwargs).to(DEVICE)


def test_running_is_the_mean_and_deviation_of_everything():
    norm = normalizer()
    for values in VALUES:
        norm.update(batch(values))
    seen = [v for values in VALUES for v in values]
    mean, std = statistics.mean(seen), statistics.stdev(seen)
    assert norm.mean.item() == pytest.approx(mean, rel=1e-14) and norm.std.item() == pytest.approx(std, rel=1e-14)
    assert norm.normalize(batch([3.0])).item() == pytest.approx((3 - mean) / std, rel=1e-14)


def test_running_is_exact_far_from_zero():
    """A sum of squares would cancel to nothing here."""
    norm = normalizer()
    for values in VALUES:
        norm.update(batch(values) + 1e9)
    assert norm.std.item() == pytest.approx(statistics.stdev([v for values in VALUES for v in values]), rel=1e-6)


def test_batch_is_the_batch():
    norm = normalizer("batch")
    values = batch(VALUES[0])
    want = (values - statistics.mean(VALUES[0])) / statistics.stdev(VALUES[0])
    torch.testing.assert_close(norm.normalize(values), want, rtol=1e-14, atol=1e-15)
    norm(batch([100.0, 200.0]))
    torch.testing.assert_close(norm.eval()(values), want, rtol=1e-14, atol=1e-15)


def test_ema_weighs_batches_by_age():
    norm = normalizer("ema", decay=0.5)
    for values in VALUES:
        norm.update(batch(values))
    weights = [0.25 / 1.75, 0.5 / 1.75, 1 / 1.75]
    means = [statistics.mean(v) for v in VALUES]
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    second = sum(w * statistics.mean([x * x for x in v]) for w, v in zip(weights, VALUES, strict=True))
    assert norm.mean.item() == pytest.approx(mean, rel=1e-13)
    assert norm.std.item() == pytest.approx((second - mean**2) ** 0.5, rel=1e-12)


def test_percentile_divides_by_the_averaged_range():
    norm = normalizer("percentile", decay=0.5, percentiles=(25, 75))
    norm.update(batch([0.0, 2.0, 4.0, 6.0, 8.0]))  # 2 to 6
    norm.update(batch([0.0, 10.0, 20.0, 30.0, 40.0]))  # 10 to 30
    spread = (0.5 * 4 + 1 * 20) / 1.5
    assert norm.std.item() == pytest.approx(spread, rel=1e-14)
    assert norm.normalize(batch([22.0])).item() == pytest.approx(22 / spread, rel=1e-14)


def test_percentile_does_not_magnify():
    norm = normalizer("percentile")
    assert norm(batch([0.1, 0.2])).tolist() == [0.1, 0.2]


@pytest.mark.parametrize("method", ["running", "batch", "ema", "percentile"])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e9])
def test_constant_rewards(method, value):
    norm = normalizer(method)
    for _ in range(3):
        out = norm(batch([value] * 7))
    assert out.tolist() == pytest.approx([value if method == "percentile" else 0.0] * 7, abs=1e-6)
    assert norm(batch([value])).isfinite().all()


@pytest.mark.parametrize("method", ["running", "batch", "ema", "percentile"])
def test_nothing_seen(method):
    norm = normalizer(method)
    assert norm.normalize(batch([3.0])).tolist() == ([0.0] if method == "batch" else [3.0])
    assert norm(batch([])).shape == (0,)
    norm.update(batch([1.0]))
    assert norm.normalize(batch([5.0])).isfinite().all()


def test_clip_shape_and_dtype():
    norm = normalizer(clip=0.5)
    out = norm(torch.randn(4, 5, device=DEVICE, dtype=torch.float16))
    assert out.shape == (4, 5) and out.dtype == torch.float32 and out.abs().max() == 0.5
    assert norm.normalize(batch([1e9])).dtype == torch.float64


def test_evaluation_changes_nothing():
    norm = normalizer()
    norm(batch(VALUES[0]))
    before = norm.state_dict()
    norm.eval()(batch([99.0]))
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("method", ["running", "batch", "ema", "percentile"])
def test_a_checkpoint_continues_to_the_bit(method):
    norm, fresh, file = normalizer(method), normalizer(method), io.BytesIO()
    norm(batch(VALUES[0]))
    torch.save(norm.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, map_location=DEVICE))
    assert torch.equal(norm(batch(VALUES[2])), fresh(batch(VALUES[2])))


def test_casting_a_model_leaves_the_statistics_in_fp64():
    norm = normalizer()
    norm.update(batch([1e8, 1e8 + 1]))
    mean = norm.mean.item()
    holder = torch.nn.Sequential(norm).to(torch.bfloat16)
    assert norm.mean.dtype == torch.float64 and norm.mean.item() == mean
    holder.half()
    assert norm.mean.item() == mean


def test_merge_equals_having_seen_both():
    one, other, both = normalizer(), normalizer(), normalizer()
    one.update(batch(VALUES[0]))
    for values in VALUES[1:]:
        other.update(batch(values))
    one.merge(other)
    for values in VALUES:
        both.update(batch(values))
    assert one.mean.item() == pytest.approx(both.mean.item(), rel=1e-14)
    assert one.std.item() == pytest.approx(both.std.item(), rel=1e-14)
    one.merge(normalizer())  # which has seen nothing
    assert one.std.item() == pytest.approx(both.std.item(), rel=1e-14)


METHODS = ("running", "batch", "ema")


def _rank(rank: int, address: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    for method in METHODS:
        norm = RewardNormalizer(method)
        for step in range(3):  # repeated calls must not count anything twice
            norm.update(_shard(step, rank))
            norm.all_reduce()
        results.put((method, rank, norm.mean.item(), norm.std.item(), norm.state_dict()["merged"].tolist()))
    dist.destroy_process_group()


def _shard(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(6, generator=generator, dtype=torch.float64) * (1 + rank) + 5 * step


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Method -> what each rank found; starting the ranks takes longer than all they do."""
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    context = torch.multiprocessing.get_context("spawn")
    results, store = context.SimpleQueue(), str(tmp_path_factory.mktemp("ranks") / "store")
    workers = [context.Process(target=_rank, args=(rank, store, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(90)
        assert worker.exitcode == 0
    found = sorted(results.get() for _ in range(2 * len(METHODS)))
    return {method: [entry[2:] for entry in found if entry[0] == method] for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method, two_processes):
    (mean, std, state), same = two_processes[method]
    assert same == (mean, std, state)  # to the bit
    single = RewardNormalizer(method)
    for step in range(3):
        single.update(torch.cat([_shard(step, rank) for rank in range(2)]))
    assert mean == pytest.approx(single.mean.item(), rel=1e-13)
    assert std == pytest.approx(single.std.item(), rel=1e-13)


ERRORS = [
    (lambda: RewardNormalizer("mean"), ValueError, "method: got 'mean', want one of running, batch, ema, percentile"),
    (lambda: RewardNormalizer(clip=0), ValueError, "clip: got 0, want a finite number greater than 0"),
    (lambda: RewardNormalizer("ema", decay=1.0), ValueError, "decay: got 1.0, want a number in [0.0, 1.0)"),
    (
        lambda: RewardNormalizer("percentile", percentiles=(95, 5)),
        ValueError,
        "percentiles: got (95, 5), want two ascending numbers in [0, 100]",
    ),
    (lambda: RewardNormalizer().update([1.0]), TypeError, "rewards: got list, want a torch.Tensor"),
    (
        lambda: RewardNormalizer().update(torch.tensor([1.0, float("nan")])),
        ValueError,
        "rewards: got 1 NaN, want numbers",
    ),
    (
        lambda: RewardNormalizer().merge(RewardNormalizer("ema")),
        ValueError,
        "other: got method 'ema', want 'running'",
    ),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS, ids=[message.split(",")[0] for *_, message in ERRORS])
def test_errors(wrong, kind, message):
    with pytest.raises(kind) as error:
        wrong()
    assert str(error.value) == message
