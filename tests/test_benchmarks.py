"""The benchmarks run, refuse wrong gradients, and compute their rates and memory right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpref
from benchmarks import experiments, head, measure, peers, record

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
MIB = measure.MIB


@pytest.fixture(scope="module")
def quick_record() -> record.Record:
    return head.run([head.CASES["quick"]], CPU, 3, ["fastpref", "eager"], "head-cpu-quick", heads=[True])


def test_record_has_every_field(quick_record, tmp_path):
    path = record.write(quick_record, tmp_path)
    assert path.name == record.file_name(quick_record)
    assert path.name.startswith(quick_record["date"][:10]) and "head-cpu-quick" in path.name
    found = record.read(path)
    assert found == json.loads(json.dumps(quick_record))
    assert set(found) == {
        "schema", "suite", "date", "commit", "dirty", "machine", "versions", "settings", "gate", "rows", "targets",
        "absent",
    }  # fmt: skip
    assert {"cpu", "cores", "threads", "memory_bytes", "load_average", "system", "python"} <= set(found["machine"])
    assert found["versions"]["torch"] == torch.__version__ and set(record.PACKAGES) <= set(found["versions"])
    assert {(row["case"], row["provider"]) for row in found["rows"]} == {
        ("quick, trainable head", provider) for provider in ("products", "products_in_place", "fastpref", "eager")
    }
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in found["rows"])
    assert all(row["peak_bytes"] >= 0 for row in found["rows"])
    assert [row["flops"] for row in found["rows"] if row["provider"] == "products"] == [7_864_320]
    assert len(found["gate"]) == 2 and all(check["passed"] for check in found["gate"])


def test_wrong_schema_is_refused(quick_record, tmp_path):
    path = record.write(quick_record | {"schema": 0}, tmp_path / "old.json")
    with pytest.raises(ValueError, match=r"old.json: got schema 0, want 1"):
        record.read(path)


def row(provider: str, seconds: list[float], peak_mib: int) -> record.Row:
    label = head.CASES["smollm2-fp32"].label
    return {"case": label, "provider": provider, "seconds": seconds, "peak_bytes": peak_mib * MIB}


ROWS = [
    row("products", [1.0, 2.0, 1.0], 360) | {"flops": 2e12},
    row("fastpref", [1.1, 2.2, 1.3], 340),
    row("eager", [4.4, 4.4, 3.9], 2000),
]


def test_targets_come_from_rounds_next_to_each_other():
    verdicts = head.judge(head.CASES["smollm2-fp32"], ROWS)
    assert [(v["quantity"], v["met"]) for v in verdicts] == [
        ("time / products time", True),
        ("eager time / time", True),
        ("memory / eager memory", False),
    ]
    assert [v["value"] for v in verdicts] == pytest.approx([1.1, 3.0, 0.17])
    assert [v["best"] for v in verdicts] == pytest.approx([1.1, 3.9 / 1.1, 0.17])
    missing = head.judge(head.CASES["llama-8b"], [])
    assert len(missing) == 3 and all(v["met"] is None for v in missing)


def test_table_from_a_record_file(quick_record, tmp_path, capsys):
    label = head.CASES["smollm2-fp32"].label
    made = quick_record | {
        "rows": ROWS,
        "gate": [{"case": label, "provider": "fastpref", "errors": {"loss": 1e-7, "d_hidden": 2.5e-6}}],
        "targets": head.judge(head.CASES["smollm2-fp32"], ROWS),
        "absent": {"trl": "cannot import trl"},
    }
    path = record.write(made, tmp_path / "made.json")
    assert record.main(["table", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| case | what | median, ms | p20 to p80 | best | time / products | eager time / time | peak, MiB "
        "| peak / eager | TFLOP/s | gradient error |"
    )
    prefix = f"| {label} |"
    assert (
        lines[2] == f"{prefix} products | 1000 | 1000 to 1600 | 1000 | 1.00 (1.00) | 3.90 (3.90) | 360 | 0.180 | 2 |  |"
    )
    assert lines[3] == (
        f"{prefix} fastpref | 1300 | 1180 to 1840 | 1100 | 1.10 (1.10) | 3.00 (3.55) | 340 | 0.170 |  | 2.5e-06 |"
    )
    assert f"- met: {label}: time / products time at most 1.2; 1.100 (best of each 1.100)" in lines
    assert f"- NOT met: {label}: memory / eager memory at most 0.15; 0.170 (best of each 0.170)" in lines
    assert "- absent: trl: cannot import trl" in lines
    assert lines[-1].startswith(made["date"][:10])


def test_red_gate_reports_nothing(monkeypatch, tmp_path, capsys):
    right = peers._fastpref
    monkeypatch.setattr(peers, "_fastpref", lambda batch: 1.001 * right(batch))
    path = tmp_path / "record.json"
    assert head.main(["--quick", "--providers", "fastpref,eager", "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert "the gate is red, nothing is reported: fastpref" in printed.err
    assert printed.out == "" and not path.exists()


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("fault", ["scaled", "nan", "one row lost", "refuses"])
def test_a_wrong_peer_is_not_timed(fault, trainable):
    batch = head.make_batch(head.CASES["quick"]._replace(trainable=trainable), CPU)
    (eager,), _ = peers.load(["eager"], CPU)

    def loss(given: peers.Batch) -> torch.Tensor:
        if fault == "refuses":
            raise NotImplementedError("not this case")
        if fault == "one row lost":
            labels = given.labels.clone()
            labels.view(-1)[labels.view(-1).ne(peers.IGNORE).nonzero()[0]] = peers.IGNORE
            given = given._replace(labels=labels)
        factor = {"scaled": 1.01, "nan": float("nan")}.get(fault, 1.0)
        return factor * eager.loss(given)

    good, bad = head.gate([eager, peers.Provider("peer", "", loss, peer=True)], batch)
    assert good["passed"] and not bad["passed"]
    assert bad.get("why") == ("NotImplementedError: not this case" if fault == "refuses" else None)


def test_truth_is_the_gradient_of_eager_in_fp64():
    batch = head.make_batch(head.CASES["quick"], CPU)
    wanted = head.truth(batch)
    wide = peers.Batch(*(t.detach().double() if t.is_floating_point() else t for t in batch[:4]), None)
    wide.hidden.requires_grad_()
    wide.weight.requires_grad_()
    logps = torch.nn.functional.linear(wide.hidden, wide.weight).log_softmax(-1)
    picked = logps.gather(-1, wide.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~wide.scored, 0)
    loss = peers.dpo(picked.sum(1), wide.ref_logps)
    loss.backward()
    for got, want in ((wanted.loss, loss), (wanted.d_hidden, wide.hidden.grad), (wanted.d_weight, wide.weight.grad)):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-15)
    assert 0.05 < float(wanted.loss) < 5, "a saturated loss has no gradient to compare"


def test_peers_that_are_not_installed_are_listed(monkeypatch):
    for name in ("trl.trainer.utils", "trl.kernels", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    found, absent = peers.load(["fastpref", "trl", "trl_compacted", "liger"], CPU)
    assert [p.name for p in found] == ["fastpref"]
    assert set(absent) == {"trl", "trl_compacted", "liger"}
    assert absent["liger"].startswith("cannot import liger_kernel.chunked_loss")


@pytest.mark.parametrize("name", head.CASES)
def test_completions_have_the_rows_they_promise(name):
    case = head.CASES[name]
    lengths = head.completion_lengths(case)
    assert len(lengths) == 2 * case.pairs and sum(lengths) == case.scored
    assert min(lengths) > 0 and max(lengths) <= case.seq_len


def test_batch_scores_one_run_of_tokens_a_sequence():
    batch = head.make_batch(head.CASES["quick"], CPU)
    assert int(batch.scored.sum()) == 40
    starts = batch.scored.int().diff(dim=1, prepend=torch.zeros(4, 1, dtype=torch.int)).eq(1).sum(1)
    assert starts.tolist() == [1, 1, 1, 1] and not batch.scored[:, 0].any()


def test_formulas_against_hand_numbers():
    assert measure.matmul_flops(2, 3, 5, 4) == 240
    assert head.CASES["smollm2-fp32"].flops(3) == 326_318_948_352  # 2 x 1921 x 576 x 49152 x 3
    assert measure.row_bytes(8192, 128256, 2, 1) == 2_101_346_304
    assert measure.row_bytes(3, 7, 4, 3) == 252
    assert measure.quantile([5.0, 1.0, 3.0], 0.5) == 3.0
    assert measure.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert measure.paired_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == (3.0, 2.0)


def test_rounds_are_interleaved_and_rotate():
    order: list[str] = []
    samples = measure.interleave({name: lambda n=name: order.append(n) for name in "abc"}, 3, CPU)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # the first is the warm-up


def test_peak_memory_counts_transients_and_kept_buffers():
    kept: list[torch.Tensor] = []

    def run() -> None:
        if not kept:
            kept.append(torch.ones(32 * MIB // 4))
        torch.ones(64 * MIB // 4).sum()

    assert 94 <= measure.peak_bytes(run, CPU) / MIB <= 104


def test_every_experiment_runs_and_the_sweep_sets_the_block():
    sizes = experiments.Sizes(2, 4, 32, (1, 2), 1 << 16)
    fastpref.set_backend("triton")
    try:
        found = experiments.run(list(experiments.EXPERIMENTS), sizes, CPU, torch.float32, 1)
    finally:
        fastpref.set_backend("auto")
    assert found["absent"] == {}
    swept = [r["provider"] for r in found["rows"] if r["case"] == "rows"]
    assert len(swept) == 3 * (1 + len(experiments.BLOCKS) * len(experiments.WARPS))
    assert {r["case"] for r in found["rows"]} == set(experiments.EXPERIMENTS)
    (copy,) = (r for r in found["rows"] if r["provider"] == "copy")
    assert copy["bytes"] == 1 << 16


def gpu_script(out: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), str(out), *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable} | variables
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_gpu_script_without_a_gpu(tmp_path):
    done = gpu_script(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "benchmarks/gpu.sh: PyTorch finds no CUDA device on this machine, so nothing was run.\n"
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_gpu_script_goes_on_after_a_failure(tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\ncase "$*" in *benchmarks.experiments*) exit 3 ;; *llama-8b*) exit 124 ;; esac\n')
    stub.chmod(0o755)
    done = gpu_script(tmp_path / "out", PYTHON=str(stub))
    assert done.returncode == 1
    summary = done.stdout.split("\n\n")[-1].splitlines()
    assert [line.split(",")[0] for line in summary] == [
        "ok      validate",
        "ok      tests",
        "FAILED  experiments: exit status 3",
        "FAILED  head-llama-8b: took longer than 190 s",
        "ok      head-smollm2",
        "ok      head-qwen-0.5b",
        "ok      head-gemma-2b",
    ]


def test_gpu_script_rehearsal_leaves_a_record(tmp_path):
    done = gpu_script(tmp_path, "experiments", REHEARSE="1", OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-experiments-cpu-*.json")
    assert {r["case"] for r in record.read(path)["rows"]} == set(experiments.EXPERIMENTS)


def test_gpu_script_explains_its_arguments(tmp_path):
    done = gpu_script(tmp_path, "nonsense")
    assert done.returncode == 64 and "bash benchmarks/gpu.sh OUTDIR" in done.stderr
