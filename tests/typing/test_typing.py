"""Type checkers read fastpref's types: user.py, which `make lint` checks as `mypy --strict` would, uses them all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import fastpref
from fastpref import trainers

ROOT = Path(__file__).parents[2]
USER = (Path(__file__).parent / "user.py").read_text()


@pytest.mark.parametrize("name", [*fastpref.__all__, *trainers.__all__])
def test_every_public_name_is_used(name):
    if name != "PreferenceConfig":  # what the others have in common
        assert f"fastpref.{name}" in USER or f"{name}(" in USER


def test_lint_checks_the_users_file():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert "tests/typing/user.py" in config["files"]
    (strict,) = (o for o in config["overrides"] if o["module"] == "tests.typing.user")
    assert strict["disallow_untyped_calls"] and strict["disallow_any_generics"] and strict["warn_return_any"]


def test_both_packages_say_that_they_are_typed():
    assert (ROOT / "fastpref" / "py.typed").exists() and (ROOT / "kernels" / "fastpref_kernels" / "py.typed").exists()
