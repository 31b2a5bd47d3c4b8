"""The README's Python runs as it stands, block after block, and its figures come from a record."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fastpref
from benchmarks import report
from fastpref.objectives.paired import DPO_LOSS_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
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


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_every_file_it_links_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(links) >= 12
    for link in links:
        assert (ROOT / link).exists(), link


def test_figures_outside_of_the_measured_block_are_no_times():
    """Seconds and ratios come from records, between the markers (tests/benchmarks holds them to these)."""
    before, after = README.split(report.BEGIN)[0], README.split(report.END)[1]
    assert not re.search(r"\d(\.\d+)? ?(s|ms|\u00d7|x|MiB|GiB)\b", before + after)
