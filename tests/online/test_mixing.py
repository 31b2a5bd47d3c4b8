"""Human and judged pairs in one file, with weights, as they are trained on."""

from __future__ import annotations

import json

import pytest
from support_online import PROMPTS, write_lines

from fastpref.commands import cli
from fastpref.commands.train.job import load_data
from fastpref.commands.train.options import RunOptions
from fastpref.online import read_records
from fastpref.online.mixing import mix_pairs


def message(text):
    return [{"role": "assistant", "content": text}]


def judged(n):
    return [{**PROMPTS[i], "responses": ["good one", "bad one"], "scores": {"judge": [1.0, 0.0]}} for i in range(n)]


def human(n):
    return [{"prompt": PROMPTS[i]["prompt"], "chosen": message("right"), "rejected": message("wrong"), "who": i}
            for i in range(n)]  # fmt: skip


def test_weights_multiply_and_columns_that_not_all_have_go() -> None:
    one = [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0, "id": 1}]
    two = [{"prompt": "d", "chosen": "e", "rejected": "f", "weight": 0.5, "id": 2}]
    assert mix_pairs({"one": (one, 3.0), "two": (two, 4.0)}) == (
        [{"prompt": "a", "chosen": "b", "rejected": "c", "id": 1, "weight": 3.0},
         {"prompt": "d", "chosen": "e", "rejected": "f", "weight": 2.0, "id": 2}],
        ["margin"],
    )  # fmt: skip
    for pair, message_ in (
        (
            two[0] | {"chosen": [{"role": "assistant", "content": "e"}]},
            "two: record 1: got chosen as messages, want text as",
        ),
        (two[0] | {"weight": -1}, "two: record 1: got a weight of -1, want"),
    ):
        with pytest.raises(ValueError, match=message_):
            mix_pairs({"one": (one, 1.0), "two": ([pair], 1.0)})


def test_from_judged_and_human_data_to_training(tmp_path, capsys) -> None:
    scores = write_lines(tmp_path / "judged.jsonl", judged(6))
    people = write_lines(tmp_path / "human.jsonl", human(4))
    out = tmp_path / "pairs.jsonl"
    command = ["pairs", "--scores", str(scores), "--output", str(out), "--json", str(tmp_path / "report.json")]
    assert cli.main([*command, "--weight", "0.5", "--mix", f"{people}=2"]) == 0
    printed = capsys.readouterr().out
    assert "weight 0.5                           6 pairs of scores" in printed
    assert f"weight 2                             4 pairs of {people}" in printed
    left_out = "chosen_score, margin, rejected_score, source, who"
    assert f"left out: {left_out}" in printed
    records = read_records(out)
    assert [r["weight"] for r in records] == [0.5] * 6 + [2.0] * 4
    assert {tuple(r) for r in records} == {("prompt", "chosen", "rejected", "weight")}
    assert json.loads((tmp_path / "report.json").read_text())["mixed"]["scores"] == {"pairs": 6, "weight": 0.5}

    for method, number in (("dpo", 1), ("kto", 2)):  # of ten records six are halves, of which three stay by the seed
        data, heldout = load_data(method, RunOptions(data=[str(out)]))
        assert len(data) == number * (3 + 4 * 2) and "weight" not in data.column_names and heldout is None
    data, heldout = load_data("dpo", RunOptions(data=[str(out)], eval_split=0.3))
    assert len(heldout) == 3 and not {str(r["prompt"]) + str(r["chosen"]) for r in heldout} & {
        str(r["prompt"]) + str(r["chosen"]) for r in data
    }
