"""Cells of two ranks, all in one pair of processes: starting them takes longer than running them.

As a program (under torchrun): `python -m tests.matrix.ranks FOLDER`, with the cells in `FOLDER/cells.pt`; rank 0 leaves
what it found in `FOLDER/found.pt`.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as the tests' conftest does

from tests.matrix import models, run
from tests.matrix.table import Cell

PATIENCE = 240  # seconds a cell


def launch(cells: list[Cell]) -> dict[Cell, run.Found]:
    with tempfile.TemporaryDirectory() as folder:
        torch.save([tuple(cell) for cell in cells], Path(folder) / "cells.pt")
        environment = {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1",
            models.FOLDERS: os.pathsep.join(models.folder(seed) for seed in (0, 1)),
        }  # fmt: skip
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", __name__]
        done = subprocess.run(
            [*command, folder], env=os.environ | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def main(folder: str) -> None:
    gc.freeze()  # as in conftest.py
    torch.distributed.init_process_group("gloo")
    found = {}
    for i, cell in enumerate(Cell(*values) for values in torch.load(Path(folder) / "cells.pt", weights_only=False)):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a rank that waits for the other shows where
        print(cell, flush=True)  # the last one is where it failed
        found[cell] = run.attempt(cell, Path(folder) / str(i))
        torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
