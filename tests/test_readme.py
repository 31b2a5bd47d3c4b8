"""The README's Python runs as it stands, block after block, and its figures come from a record."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import fastpref
from benchmarks import record, trainers, training_table
from fastpref.objectives.paired import DPO_LOSS_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert torch.is_tensor(scope["kl"]) and scope["out"].loss.isfinite()


def test_every_objective_has_its_paper():
    papers = (Path(fastpref.__file__).parent / "papers.md").read_text()
    objectives = [name for name in fastpref.__all__ if name.endswith("Loss") and name != "PairedLoss"]
    assert len(objectives) >= 10
    for name in objectives + [f'"{loss}"' for loss in DPO_LOSS_TYPES]:
        assert name in papers, name


def test_training_table_is_its_record():
    name = re.search(r"`(benchmarks/results/[^`]+-trainers-[^`]+\.json)`", README)[1]
    found = record.read(ROOT / name)
    rows = [line for line in trainers.table(found).splitlines() if line.startswith("|")]
    assert len(rows) == 6
    for row in rows:
        assert row in README, row


def test_hosts_table_is_its_record():
    pytest.importorskip("transformers")
    from benchmarks import hosts

    name = re.search(r"`(benchmarks/results/[^`]+-hosts-cpu-[^`]+\.json)`", README)[1]
    rows = [line for line in hosts.table(record.read(ROOT / name)).splitlines() if line.startswith("|")]
    assert len(rows) >= 2 + 2
    for row in rows:
        assert row in README, row


def test_table_of_trained_models_is_their_records():
    rows = training_table.table().splitlines()
    assert len(rows) == 2 + len(training_table.METHODS) and "\n".join(rows) in README
    for method in training_table.METHODS:
        assert (ROOT / f"benchmarks/results/training/{method}/summary.png").exists()


def test_measured_table_is_the_record():
    """Each row's four figures are the medians (s) and peaks (MiB) of the record that the section names."""
    section = README.split("## Measured")[1].split("\n## ")[0]
    name = re.search(r"`(benchmarks/results/[^`]+\.json)`", section)[1]
    record = json.loads((ROOT / name).read_text())
    found = {}
    for row in (r for r in record["rows"] if r["case"].startswith("smollm2-fp32, ")):
        head = "frozen" if "frozen" in row["case"] else "trainable"
        figures = f"{statistics.median(row['seconds']):.2f} s", f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        found.setdefault(row["provider"], {})[head] = figures
    rows = re.findall(r"^\| .*\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert len(rows) >= 5
    for provider, cells in rows:
        assert tuple(cells.split(" | ")) == found[provider]["trainable"] + found[provider]["frozen"], provider
