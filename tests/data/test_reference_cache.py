import pytest
import torch
from safetensors.torch import save_file

from fastpref.data import reference_cache
from fastpref.data.reference_cache import Fingerprint, ReferenceCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "SHARD", 4)
    return ReferenceCache(tmp_path, "abc", examples=10, columns=2)


VALUES = torch.arange(20.0).view(10, 2)


def fill(cache: ReferenceCache) -> list[int]:
    done = []
    for shard, rows in cache.missing():
        cache.write(shard, VALUES[rows.start : rows.stop])
        done.append(shard)
    return done


def test_what_is_there_is_not_computed_again(cache):
    assert fill(cache) == [0, 1, 2]
    assert fill(cache) == []
    assert torch.equal(cache.load(), VALUES)
    assert not list(cache.folder.glob("*.part"))


def test_an_interrupted_run_continues(cache):
    shard, rows = next(iter(cache.missing()))
    cache.write(shard, VALUES[rows.start : rows.stop])
    with pytest.raises(FileNotFoundError, match="2 of 3 shards are missing"):
        cache.load()
    assert fill(cache) == [1, 2]
    assert torch.equal(cache.load(), VALUES)


@pytest.mark.parametrize("keep", [0, 7, -1, -9])
def test_a_truncated_shard_is_computed_again(cache, keep):
    fill(cache)
    path = cache.folder / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=r"000001.safetensors: damaged .*computed again"):
        assert fill(cache) == [1]
    assert torch.equal(cache.load(), VALUES)


def test_one_flipped_bit_is_found(cache):
    fill(cache)
    path = cache.folder / "000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="checksum"):
        assert fill(cache) == [2]


def test_a_shard_of_another_job_is_not_used(cache):
    fill(cache)
    path = cache.folder / "000000.safetensors"
    values = torch.zeros(4, 2)
    metadata = {"fingerprint": "other", "checksum": Fingerprint().weights([("values", values)]).hexdigest()}
    save_file({"values": values}, path, metadata=metadata)
    with pytest.warns(UserWarning, match="damaged"):
        assert fill(cache) == [0]


def test_fingerprints_tell_apart():
    def of(rows, weight=1.0, **kwargs):
        found = Fingerprint().weights([("w", torch.tensor([weight]))]).text(*kwargs.items())
        return found.rows(rows, ["a", "b"]).hexdigest()

    base = of([{"a": [1], "b": [2]}])
    assert base == of([{"a": [1], "b": [2], "c": [3]}])
    others = [
        of([{"a": [1, 2], "b": []}]),
        of([{"a": [], "b": [1, 2]}]),
        of([{"a": [1], "b": [2]}, {"a": [], "b": []}]),
        of([{"a": [1], "b": [2]}], weight=1.0000001),
        of([{"a": [1], "b": [2]}], ld_alpha=0.5),
    ]
    assert len({base, *others}) == 6


def test_half_precision_weights_have_a_fingerprint():
    weights = torch.randn(3, 5).to(torch.bfloat16)
    one, other = (Fingerprint().weights([("w", w)]).hexdigest() for w in (weights, weights.t().contiguous().t()))
    assert one == other
