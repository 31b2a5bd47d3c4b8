"""Tile sizes come from a GPU's file, written from a recorded sweep; elsewhere they are the default's."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")
from fastpref_kernels import _launch

from benchmarks import record, tune

CPU = torch.device("cpu")


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A machine with a GPU, as far as the launchers can tell, and a folder for its file."""
    (tmp_path / "default.json").write_text((_launch.CONFIGS / "default.json").read_text())
    monkeypatch.setattr(_launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(_launch, "warp_size", lambda device: 32)
    _launch.tile_sizes.cache_clear()
    yield tmp_path
    _launch.tile_sizes.cache_clear()


def sweep(gpu: bool = True, **times: float) -> record.Record:
    """A record of made-up times, `forward_4096_8=1.0` and the like."""
    names = {"forward": "forward", "u": "forward + U", "gradient": "gradient", "kl": "exact KL"}
    rows = []
    for key, seconds in times.items():
        kind, block, warps = key.split("_")
        provider = f"{names[kind]}, BLOCK {block} warps {warps}"
        rows.append({"case": "rows", "provider": provider, "seconds": [seconds, seconds, 9.0]})
    rows.append({"case": "rows", "provider": "forward, as launched", "seconds": [0.1]})
    machine = {"cores": 2, "cpu": "x"} | ({"gpu": {"name": "NVIDIA H100 80GB HBM3"}} if gpu else {})
    return {"rows": rows, "machine": machine, "settings": {"device": "cuda"}, "suite": "experiments-cuda",
            "date": "2026-01-02T00:00:00", "commit": "a" * 40, "dirty": False}  # fmt: skip


def test_default_sizes():
    sizes = {columns: _launch.row_block(columns, "row_logprob", CPU) for columns in (1, 61, 1000, 4096, 151665)}
    assert sizes == {1: (128, 1), 61: (128, 1), 1000: (1024, 4), 4096: (4096, 8), 151665: (4096, 8)}


def _meta(columns: int, dtype: torch.dtype, stride: int | None = None) -> torch.Tensor:
    return torch.empty(3, stride or columns, dtype=dtype, device="meta")[:, :columns]


@pytest.mark.parametrize(
    "dtype, stride, tile",
    [
        (torch.bfloat16, 151680, (4096, 256, 8, 8)),  # 8 elements of 2 bytes, or 4 of 4, are one load
        (torch.float32, 151680, (4096, 256, 4, 8)),
        (torch.float64, 151680, (4096, 256, 2, 8)),
        (torch.bfloat16, 151665, (4096, 256, 1, 8)),  # rows that begin anywhere are read one by one
    ],
)
def test_a_lane_holds_what_one_load_brings(dtype, stride, tile):
    assert _launch.row_tile("row_logprob", _meta(151665, dtype, stride)) == tile


def test_a_wavefront_of_64_has_as_many_lanes(monkeypatch):
    monkeypatch.setattr(_launch, "warp_size", lambda device: 64)
    rows = _meta(49152, torch.bfloat16)
    assert _launch.row_tile("row_logprob", rows) == (4096, 512, 8, 8)
    assert _launch.row_tile("row_logprob_u", rows) == (16384, 1024, 8, 16)  # 1024 threads are the most
    assert _launch.row_tile("token_kl_k", _meta(151680, torch.bfloat16), rows.new_empty(3, 151680)) == (2048, 256, 8, 4)


def test_rows_swept_twice_are_few_enough_for_the_l2_cache():
    """132 SMs of an H100, each with at most 2,048 threads: 28 MB of its 50, which is in two halves."""
    for columns in (32000, 49152, 50257, 65024):
        rows = _meta(columns, torch.bfloat16)
        tile = _launch.row_tile("row_logprob_u", rows)
        programs = 2048 // (32 * tile.num_warps) if tile.block <= 16384 else 1  # 32 values a thread take 33 registers
        assert _launch.stays_in_cache(rows) and 132 * programs * _launch.row_bytes(rows) < 28e6
    assert not _launch.stays_in_cache(_meta(128256, torch.bfloat16))
    assert not _launch.stays_in_cache(_meta(65024, torch.float32))
    assert not _launch.stays_in_cache(_meta(50257, torch.bfloat16), _meta(50257, torch.bfloat16))


def test_a_gpu_takes_what_was_fastest_there(h100, capsys):
    times = {
        "forward_4096_8": 1.0,
        "forward_8192_16": 0.5,
        "u_4096_8": 2.0,
        "u_8192_16": 3.0,
        "gradient_4096_8": 1.0,
        "kl_4096_8": 2.0,
        "kl_2048_4": 1.0,
    }
    found = sweep(**times, gradient_8192_16=0.9)
    (h100 / "record.json").write_text(json.dumps(found | {"schema": record.SCHEMA}))
    assert tune.main([str(h100 / "record.json"), "--out", str(h100)]) == 0
    assert capsys.readouterr().out.strip() == str(h100 / "nvidia-h100-80gb-hbm3.json")
    gpu = torch.device("cuda", 0)
    assert _launch.row_block(151665, "row_logprob", gpu) == (8192, 16)
    assert _launch.row_block(151665, "row_logprob_u", gpu) == (4096, 8)
    assert _launch.row_block(50257, "row_logprob_u", gpu) == (16384, 32)  # short rows keep the default
    assert _launch.row_block(151665, "row_gradient", gpu) == (8192, 16)
    assert _launch.row_block(300, "row_gradient", gpu) == (512, 2)
    assert _launch.row_block(151665, "token_kl", gpu) == (2048, 4)
    assert _launch.row_block(151665, "token_kl_k", gpu) == (2048, 8)
    assert _launch.row_block(151665, "row_gradient", CPU) == (4096, 8)


def test_rows_of_a_table_are_by_columns(h100):
    contents = {"row_logprob": [[32768, 2048, 4], [None, 8192, 8]]}
    (h100 / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps(contents))
    sizes = [_launch.row_block(columns, "row_logprob", torch.device("cuda", 0)) for columns in (32768, 32769)]
    assert sizes == [(2048, 4), (8192, 8)]


def test_noise_does_not_change_the_default(h100):
    assert tune.table(sweep(gradient_4096_8=1.0, gradient_2048_4=0.99))["row_gradient"] == [[None, 4096, 8]]
    assert tune.table(sweep(gradient_4096_8=1.0, gradient_2048_4=0.97))["row_gradient"] == [[None, 2048, 4]]


@pytest.mark.parametrize("found", [sweep(), sweep(gpu=False, gradient_4096_8=1.0)], ids=["no sweep", "no GPU"])
def test_a_record_without_a_sweep_is_refused(found):
    with pytest.raises(ValueError, match="record: got one without a sweep of row kernels on a GPU, want one of"):
        tune.table(found)
