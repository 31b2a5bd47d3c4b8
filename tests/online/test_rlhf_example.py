"""The example of RLHF beside DPO: what people like in its toy, and every option of every command in it."""

from __future__ import annotations

import re
from pathlib import Path

from support_online import options_of
from transformers import TrainingArguments

from fastpref.commands.train.job import METHODS
from fastpref.commands.train.options import OnlineOptions, RunOptions
from fastpref.online.judges import load_function

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_people_like_long_lists_up_to_a_point() -> None:
    liked = load_function(f"{EXAMPLES}/rlhf_toy.py:liked")
    assert liked("", [" figs" * n for n in (0, 5, 10, 20, 40)]) == [0.0, 0.5, 1.0, 1.0, 0.0]


def test_every_option_in_the_example_is_one_of_its_command() -> None:
    script = (EXAMPLES / "rlhf_and_dpo.sh").read_text().replace("\\\n", " ")
    script = re.sub(r"^#.*$", "", script, flags=re.MULTILINE)
    common = re.search(r'^common="(.*)"$', script, re.MULTILINE)
    assert common is not None
    found = re.findall(r"fastpref (generate|score|pairs|train (?:reward|rloo|dpo)) (--.*)$", script, re.MULTILINE)
    assert len(found) == 7
    for command, arguments in found:
        name, _, method = command.partition(" ")
        given = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", arguments.replace("$common", common[1])))
        if method:
            known = {f"--{n}" for kind in (OnlineOptions, RunOptions, TrainingArguments, METHODS[method].config)
                     for n in kind.__dataclass_fields__}  # fmt: skip
        else:
            known = options_of(name)
        assert given and given <= known, (command, given - known)
