"""What is installed, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastpref

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SOURCES = {"fastpref": ROOT / "fastpref", "fastpref_kernels": ROOT / "kernels" / "fastpref_kernels"}


def installed_names(pattern: str) -> set[str]:
    """Files of both packages as their paths in an installation."""
    found = ((top, path) for top, folder in SOURCES.items() for path in folder.rglob(pattern) if path.is_file())
    return {f"{top}/{p.relative_to(SOURCES[top]).as_posix()}" for top, p in found if p.parent.name != "__pycache__"}


def run_python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_the_folder_of_the_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's `kernels`


def test_every_package_of_the_tree_is_listed():
    tree = {path.removesuffix("/__init__.py").replace("/", ".") for path in installed_names("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == tree


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """Names in a wheel built from a copy of the sources, since a build writes beside them."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("fastpref", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w"]
    run = subprocess.run([*command, target, source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = target.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(wheel):
    assert {"fastpref/data/sample_train.jsonl", "fastpref/data/sample_heldout.jsonl"} <= wheel
    assert "fastpref_kernels/configs/default.json" in wheel
    assert wheel == installed_names("*")


def test_importing_fastpref_imports_no_framework():
    loaded = run_python("import sys, fastpref; print(*sys.modules)").split()
    assert not {"torch", "numpy", "triton", "transformers", "fastpref.objectives", "fastpref_kernels"} & set(loaded)


def test_losses_on_a_cpu_import_neither_kernels_nor_transformers():
    code = """
        import sys, torch, fastpref
        fastpref.DPOLoss()
        print(*sys.modules)
        fastpref.token_logprobs(torch.zeros(1, 3), torch.zeros(1, dtype=torch.long))
        print(*sys.modules)
    """
    built, called = (set(line.split()) for line in run_python(code).splitlines())
    assert "fastpref.objectives.paired" in built
    assert not {"triton", "transformers", "fastpref_kernels"} & built
    assert not {"transformers", "fastpref_kernels"} & called  # PyTorch itself imports Triton in the first call


def test_fastpref_works_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None  # importing it raises ImportError
        import torch, fastpref
        hidden, weight = torch.ones(2, 1, 3, requires_grad=True), torch.zeros(4, 3)
        labels = torch.ones(2, 1, dtype=torch.long)
        out = fastpref.DPOLoss().from_hidden(hidden, weight, labels, ref_logps=torch.zeros(2))
        out.loss.backward()
        print(round(float(fastpref.token_logprobs(hidden @ weight.T, labels)[0, 0]), 6), round(float(out.loss), 6))
    """
    assert run_python(code) == "-1.386294 0.693147"


def imported_modules(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


def test_kernels_import_only_torch_triton_and_themselves():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    imports = {path.name: imported_modules(path) for path in SOURCES["fastpref_kernels"].rglob("*.py")}
    assert "row_logprob.py" in imports
    assert {name: found - allowed for name, found in imports.items() if found - allowed} == {}


@pytest.mark.parametrize("name", [n for n in fastpref.__all__ if n != "__version__"])
def test_public_names_are_documented(name):
    value = getattr(fastpref, name)
    assert value.__module__.startswith("fastpref")
    own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert own and not own.startswith(f"{name}("), f"fastpref.{name} has no docstring of its own"


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="module 'fastpref' has no attribute 'dpo_loss'"):
        _ = fastpref.dpo_loss
