"""The kernels as a Hub kernel: exported, and loaded back through Hugging Face's `kernels`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
import tomllib

import pytest
import torch
from support import DEVICE, IGNORE, relative_error

from fastpref import reference
from fastpref.commands import hub

BACKEND = "cpu" if DEVICE == "cpu" else ("rocm" if torch.version.hip else "cuda")


def test_export(tmp_path):
    folder = hub.export(tmp_path / "new")
    build = tomllib.loads((folder / "build.toml").read_text())
    assert build["general"]["backends"] == ["cuda", "rocm", "xpu"] and "torch-noarch" in build
    names = {file.name for file in hub.sources() if file.suffix == ".py"} | {"configs"}
    assert {file.name for file in (folder / "torch-ext/fastpref_kernels").iterdir()} == names
    for backend in build["general"]["backends"]:
        variant = folder / f"build/torch-{backend}"
        assert {file.name for file in variant.iterdir()} == names | {"metadata.json"}
        assert (variant / "configs/default.json").exists()
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend} and metadata["name"] == build["general"]["name"]
    with pytest.raises(ValueError, match=r"folder: got .*, which has files in it, want a new or an empty one"):
        hub.export(folder)
    with pytest.raises(ValueError, match="backends: got 'tpu', want one of cuda, rocm, xpu, cpu"):
        hub.export(tmp_path / "other", ["tpu"])


def test_imports_are_those_that_the_hub_allows():
    for file in (file for file in hub.sources() if file.suffix == ".py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "triton"} | sys.stdlib_module_names, file.name


def test_loaded_back_it_computes(tmp_path):
    # by name: in this repository `kernels` is a source root, and importing it is banned
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("Hugging Face's kernels is not installed")
    folder = hub.export(tmp_path / "kernel", [BACKEND])
    loaded = importlib.import_module("kernels").get_local_kernel(folder, backend=BACKEND)
    assert loaded.__file__ == str(folder / f"build/torch-{BACKEND}/__init__.py")
    logits = torch.randn(4, 61, device=DEVICE)
    labels = torch.tensor([3, IGNORE, 0, 60], device=DEVICE)
    found = loaded.row_logprob(
        logits, labels, transform=reference.LogitTransform(), ignore_index=IGNORE, statistics=("entropy",)
    )
    wanted = reference.token_statistics(logits.double(), labels)
    assert relative_error(found["logps"], wanted.logps) < 1e-6
    assert relative_error(found["entropy"], wanted.entropy) < 1e-6
