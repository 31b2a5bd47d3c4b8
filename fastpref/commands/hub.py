"""`fastpref hub FOLDER`: the Triton kernels as a kernel of the Hugging Face Hub.

The folder has what `kernels.get_kernel` loads (`build/torch-<backend>/`, pure Python: "noarch"). It also has what
Hugging Face's kernel-builder takes (`build.toml`, `torch-ext/`). Upload it with

    hf upload USER/fastpref-kernels FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpref import __version__
from fastpref.common import checks

NAME, PACKAGE = "fastpref-kernels", "fastpref_kernels"
VERSION = 1  # of the kernels' interface, as the Hub counts; raised when a function is taken away or changed
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
BUILD = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[torch-noarch]
"""
CARD = """---
license: apache-2.0
tags: [kernels]
---
The Triton kernels of fastpref {fastpref}: per-token log-probs, exact KL, and the losses of preference learning.

```python
from kernels import get_kernel

kernels = get_kernel("USER/{name}", version={version})
```
"""


def sources() -> list[Path]:
    """The kernels' Python files, and the files of tile sizes for GPUs."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None  # a part of fastpref
    folder = Path(spec.origin).parent
    return sorted([*folder.glob("*.py"), *folder.glob("configs/*.json")])


def _place(file: Path) -> Path:
    """Where a source file belongs in the package."""
    return Path(file.name) if file.suffix == ".py" else Path(file.parent.name, file.name)


def export(folder: str | Path, backends: Sequence[str] = BACKENDS[:3]) -> Path:
    """Writes the Hub's layout into `folder`, which must be new or empty. Returns it.

    The backend "cpu" is for Triton's interpreter.

    Raises:
        ValueError: a backend is unknown, or the folder has files in it.
    """
    for backend in backends:
        checks.choice("backends", backend, BACKENDS)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: got {str(folder)!r}, which has files in it, want a new or an empty one")
    files = sources()
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:7]
    for place in ("torch-ext/" + PACKAGE, *(f"build/torch-{backend}" for backend in backends)):
        (folder / place / "configs").mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, folder / place / _place(file))
    for backend in backends:
        metadata = {
            "id": f"_{PACKAGE}_{backend}_{digest}", "name": NAME, "version": VERSION, "license": "Apache-2.0",
            "backend": {"type": backend}, "python-depends": [],
        }  # fmt: skip
        (folder / f"build/torch-{backend}/metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    names = ", ".join(f'"{backend}"' for backend in backends)
    (folder / "build.toml").write_text(BUILD.format(name=NAME, version=VERSION, backends=names))
    (folder / "README.md").write_text(CARD.format(name=NAME, version=VERSION, fastpref=__version__))
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")


def run(args: argparse.Namespace) -> int:
    try:
        print(export(args.folder))
    except (ValueError, OSError) as error:
        print(f"fastpref hub: {error}", file=sys.stderr)
        return 2
    return 0
