"""Says which machine and which versions a result comes from."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import fastpref


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, if fastpref runs from one. An installed copy may lie inside another project's checkout."""
    root = Path(fastpref.__file__).resolve().parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if not git("ls-files", "fastpref/__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: torch.device) -> dict[str, str | int | None]:
    """The machine and the versions, as JSON values."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "fastpref": fastpref.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": gpu or f"the CPU ({_cpu()})",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if gpu else None,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
