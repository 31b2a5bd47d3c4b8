"""benchmarks/gpu.sh: its parts, what is left when one fails, takes too long or is killed. Rehearsed without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import suite

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks/gpu.sh"
SECONDS = 540  # a part's steps, all together


def start(out: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "0"} | variables
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(out), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(out: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    process = start(out, *arguments, **variables)
    stdout, stderr = process.communicate(timeout=240)
    return process.returncode, stdout, stderr


def unpacked(out: Path, part: str) -> dict[str, str]:
    """Name -> text of the archive that a part left, its only file."""
    assert [path.name for path in out.iterdir() if path.suffix != ".partial"] == [f"{part}.tar.gz"]
    with tarfile.open(out / f"{part}.tar.gz") as archive:
        return {
            Path(member.name).name: archive.extractfile(member).read().decode(errors="replace")
            for member in archive
            if member.isfile()
        }


def stub(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_gpu_nothing_is_run(tmp_path):
    status, stdout, stderr = run(tmp_path, "validate")
    assert status == 2 and stdout == "" and list(tmp_path.iterdir()) == []
    assert stderr == "benchmarks/gpu.sh: PyTorch finds no CUDA device on this machine, so nothing was run.\n"


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("validate", "head")])
def test_wrong_arguments_are_explained(arguments, tmp_path):
    status, _, stderr = run(tmp_path, *arguments)
    assert status == 64 and "bash benchmarks/gpu.sh OUTDIR PART" in stderr


def test_parts_take_at_most_nine_minutes():
    """Every limit in the text, added up within its part; what rehearses stands beside what runs, and counts once."""
    text = SCRIPT.read_text()
    parts = re.findall(r"^    ([\w.-]+)\)(.*?);;", text[text.index("case $part in") :], re.MULTILINE | re.DOTALL)
    assert [name for name, _ in parts] and set(dict(parts)) == set(re.search(r'PARTS="(.*)"', text)[1].split())
    for name, steps in parts:
        limits = re.findall(r"(?:step|bench|trainers) ([\w.-]+) (\d+)", steps) + re.findall(r"(\w+):(\d+)", steps)
        assert 0 < sum(int(limit) for limit in dict(limits).values()) <= SECONDS, name


def test_a_failed_step_does_not_stop_the_others(tmp_path):
    out = tmp_path / "out"
    python = stub(tmp_path, 'case "$*" in *"benchmarks kl"*) exit 3 ;; *"benchmarks logits"*) exit 124 ;; esac')
    status, stdout, _ = run(out, "suites", PYTHON=python)
    assert status == 1
    summary = unpacked(out, "suites")["summary.txt"].splitlines()
    assert [line.split(",")[0] for line in summary] == [
        "FAILED  kl: exit status 3", "FAILED  logits: took longer than 120 s", "ok      scale", "ok      reward",
        "ok      losses",
    ]  # fmt: skip
    assert stdout.endswith("\n".join(summary) + "\n")


def test_a_rehearsal_leaves_its_records_in_one_archive(tmp_path):
    status, stdout, stderr = run(tmp_path, "experiments", REHEARSE="1")
    assert status == 0, stdout + stderr
    files = unpacked(tmp_path, "experiments")
    (name,) = (name for name in files if "-experiments-cpu-" in name)
    assert json.loads(files[name])["rows"] and "ok      experiments" in files["summary.txt"]
    assert "report.html" in files


def test_a_step_that_takes_too_long_writes_what_it_measured(tmp_path):
    """Interrupted, not killed: the record has the cases before, and says what is missing."""
    status, stdout, _ = run(tmp_path, "head", REHEARSE="1", LIMIT="20", REPEATS="2000")
    assert status == 1, stdout
    files = unpacked(tmp_path, "head")
    assert "FAILED  head: took longer than 20 s" in files["summary.txt"]
    (name,) = (name for name in files if "-head-cpu-" in name)
    assert "interrupted" in json.loads(files[name])["absent"].values()


def test_a_part_that_is_killed_keeps_what_it_had(tmp_path):
    """SIGKILL, as of a machine that is taken away in the middle of a step: the archive of some seconds ago is there,
    whole, with what the step had written."""
    writes = 'for last; do :; done; mkdir -p "$last"; echo kept >"$last/case-1.json"; exec sleep 600'
    python = stub(tmp_path, f'case "$*" in *"benchmarks head"*) {writes} ;; esac')
    out = tmp_path / "out"
    process = start(out, "head", PYTHON=python)
    try:
        deadline = time.monotonic() + 60
        while not (out / "head.tar.gz").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert unpacked(out, "head")["case-1.json"] == "kept\n"


def test_a_record_is_saved_after_every_case(monkeypatch):
    """And an interrupt in the second of three loses neither the first nor the names of the others."""
    small = suite.load("losses")
    cases = [case._replace(pairs=pairs) for case in small.cases["small"][:1] for pairs in (2, 3, 4)]
    measured, saved = suite.run_case, []

    def interrupted(of, case, options):
        if case == cases[1]:
            raise KeyboardInterrupt
        return measured(of, case, options)

    monkeypatch.setattr(suite, "run_case", interrupted)
    options = suite.Options(torch.device("cpu"), 1, quick=True, memory=False, save=saved.append)
    found = suite.run(small, cases, options)
    assert len(saved) == 1 and {row["case"] for row in saved[0]["rows"]} == {cases[0].label}
    assert found["rows"] == saved[0]["rows"]
    assert found["absent"] == saved[0]["absent"] | {case.label: suite.INTERRUPTED for case in cases[1:]}
