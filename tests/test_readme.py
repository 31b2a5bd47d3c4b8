"""The README's Python runs as it stands, block after block, and its figures come from a record."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import fastpref
from fastpref.losses import DPO_LOSS_TYPES

README = (Path(__file__).parent.parent / "README.md").read_text()


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
