"""What the example runs exists: its judge, and every option of every command in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support_online import options_of

from fastpref.online.judges import load_function

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = ("generate", "score", "pairs", "evaluate")


def test_the_judge_prefers_concise_answers_that_end_properly() -> None:
    score = load_function(f"{EXAMPLES}/concise_judge.py:score")
    short, long = "It is blue.", "It is blue. " * 30
    assert score("What colour is it?", [short, short[:-1], long, "", short + "\n"]) == pytest.approx(
        [0.97, -0.03, 0.1, -2.0, 0.97]
    )


def test_every_option_in_the_example_is_one_of_its_command() -> None:
    script = (EXAMPLES / "iterative_dpo.sh").read_text().replace("\\\n", " ")
    found = re.findall(r"^\s*fastpref (\w+)(.*)$", script, re.MULTILINE)
    assert [name for name, _ in found] == ["generate", "score", "pairs", "train", "evaluate"]
    for name, arguments in found:
        if name in OWN:
            options = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments))
            assert options and options <= options_of(name), name
    assert "--limit" in script
