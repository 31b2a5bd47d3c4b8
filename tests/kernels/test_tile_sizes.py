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
    _launch.tile_sizes.cache_clear()
    yield tmp_path
    _launch.tile_sizes.cache_clear()


def sweep(gpu: bool = True, **times: float) -> record.Record:
    """A record of made-up times, `forward_4096_8=1.0` and the like."""
    names = {"forward": "forward", "u": "forward + U", "gradient": "gradient"}
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


def test_a_gpu_takes_what_was_fastest_there(h100, capsys):
    times = {"forward_4096_8": 1.0, "forward_8192_16": 0.5, "u_4096_8": 2.0, "u_8192_16": 3.0, "gradient_4096_8": 1.0}
    found = sweep(**times, gradient_8192_16=0.9)
    (h100 / "record.json").write_text(json.dumps(found | {"schema": record.SCHEMA}))
    assert tune.main([str(h100 / "record.json"), "--out", str(h100)]) == 0
    assert capsys.readouterr().out.strip() == str(h100 / "nvidia-h100-80gb-hbm3.json")
    gpu = torch.device("cuda", 0)
    assert _launch.row_block(151665, "row_logprob", gpu) == (4096, 8)  # 3.0 with both, not 3.5
    assert _launch.row_block(151665, "row_gradient", gpu) == (8192, 16)
    assert _launch.row_block(300, "row_gradient", gpu) == (512, 2)
    assert _launch.row_block(151665, "token_kl", gpu) == (4096, 8)
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
