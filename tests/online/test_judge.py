"""Judges: what is asked, what counts as a verdict, what the report says of a judge, and that no failure loses one."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import scripted_server
from support_online import PROMPTS, PowerCut, server, stop_at, tiny, write_lines

from fastpref.commands import cli
from fastpref.online import (
    Judging,
    PairRules,
    ServerError,
    generate_from_server,
    judge_file,
    judge_scorer,
    make_pairs,
    read_records,
    reward_function,
)
from fastpref.online.prompts import read_responses
from fastpref.online.verdicts import questions, scores

RESPONSES = (["tree", "eel", "box"], ["bee", "sky", "sky"], ["he", "me"], ["cat"])
RECORDS = [{**PROMPTS[i], "responses": RESPONSES[i]} for i in range(4)]
WINS = [[0.75, 0.75, 0.0], [1.0, 0.25, 0.25], [0.5, 0.5], [None]]  # by the letters e
SCORED = [{**record, "scores": wins} for record, wins in zip(RECORDS, WINS, strict=True)]
ANSWERS = 6 + 4 + 2 + 0


VERDICTS = {
    "Because.\nVerdict: A": 1.0, "verdict: b\n\n": 0.0, "Fine.\n**Verdict: tie**": 0.5, "Verdict: **A**.": 1.0,
    "Verdict: A\nVerdict: A": 1.0, "<think>Verdict: B</think>\nVerdict: A": 1.0,
    "A": None, "": None, "Verdict: C": None, "Verdict: A or B": None, "Verdict: A\nVerdict: B": None,
    "Verdict: A\nBut who knows.": None, "The verdict: A": None, "Verdict: A or B\nVerdict: A": None, "Verdict:": None,
    "[[A]]": None, "Verdict: response A": None, "Verdict:\nA": None,
}  # fmt: skip
GRADES = {
    "Good.\nGrade: 7": 7.0, "Grade: 7.5": 7.5, "**Grade:** 10": 10.0, "Grade: 11": None, "Grade: 0": None, "7": None,
    "Grade: 7/10": None, "Grade: seven": None, "Grade: 7\nGrade: 8": None, "Grade: -3": None, "Grade: 1e1": None,
}  # fmt: skip


@pytest.mark.parametrize("how, answers", [("pairs", VERDICTS), ("grades", GRADES)])
def test_what_is_a_verdict(how, answers) -> None:
    assert {answer: Judging(how).read(answer) for answer in answers} == answers


def test_each_two_are_asked_about_in_both_orders() -> None:
    assert questions(["a", "b", "a"], Judging()) == [(0, 1), (1, 0), (1, 2), (2, 1)]
    sampled = Judging(samples=2, temperature=1.0)
    assert questions(["a", "b"], sampled) == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert questions(["a", "b"], Judging("grades")) == [(0,), (1,)]


SCORES = {
    "right": ([1.0, 0.0], [1.0, 0.0]),
    "the first, whichever": ([1.0, 1.0], [0.5, 0.5]),
    "a tie in one order": ([1.0, 0.5], [0.75, 0.25]),
    "no verdict in one order": ([1.0, None], [None, None]),
}


@pytest.mark.parametrize("verdicts, wanted", SCORES.values(), ids=SCORES)
def test_scores_of_a_pair(verdicts, wanted) -> None:
    assert scores(["a", "b"], Judging(), verdicts) == wanted


def test_scores_of_samples_and_of_equal_responses() -> None:
    sampled = Judging(samples=2, temperature=1.0)
    assert scores(["a", "b"], sampled, [1.0, None, 0.0, 1.0]) == [0.75, 0.25]
    assert scores(["a", "a"], Judging(), []) == [0.5, 0.5] and scores(["a"], Judging(), []) == [None]
    assert scores(["a", "b", "c"], Judging(), [1.0, 0.0, None, 0.0, 1.0, 0.0]) == [None, 0.5, None]
    assert scores(["a", "b"], Judging("grades", 2, 1.0), [4.0, 6.0, None, None]) == [5.0, None]


def test_templates() -> None:
    own = Judging(template="{prompt}|{response_a}|{response_b}|{rubric}", rubric="short")
    assert own.message("{response_b}", ["{rubric} {x}", "b"]) == "{response_b}|{rubric} {x}|b|short"
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert "<prompt>\nsystem: Be kind.\n\nuser: Hi\n</prompt>" in Judging().message(talk, ["a", "b"])
    assert "from 0 (worst) to 4 (best)" in Judging("grades", low=0, high=4).message("x", ["a"])
    for changes, message in (
        ({"template": "{prompt} {response_a}"}, "template: got none of {response_b}, want all of {prompt}, "),
        ({"template": "{prompt} {response_a} {response_b} {score}"}, "template: got {score}, want only {prompt}, "),
        (
            {"template": "{prompt} {response_a} {response_b}", "rubric": "x"},
            "template: got no {rubric} beside a rubric",
        ),
        ({"samples": 2}, "samples: got 2 with temperature 0, want 1"),
        ({"how": "grades", "low": 3, "high": 3}, "low, high: got 3 and 3, want low < high"),
    ):
        with pytest.raises(ValueError) as caught:
            Judging(**changes)
        assert str(caught.value).startswith(message)


def test_a_right_judge(scripted, tmp_path) -> None:
    url, out = scripted.url("judge-right"), tmp_path / "out.jsonl"
    found = judge_file(server(url), RECORDS, out)
    assert read_records(out) == SCORED
    assert (found["answers"], found["unparsable"]["count"], found["responses_without_a_score"]) == (ANSWERS, 0, 1)
    position = found["position"]
    assert (position["first"]["share"], position["same"]["share"], position["ties"]["share"]) == (0.5, 1.0, 1 / 3)
    assert found["tokens"] == {"prompts": 10 * ANSWERS, "answers": 3 * ANSWERS, "unknown": 0}
    assert (found["agreement"], found["samples"], found["grades"]) == (None, None, None)
    got = scripted.got(url)
    assert {body["temperature"] for body in got} == {0.0} and len({body["seed"] for body in got}) == ANSWERS
    assert judge_file(server(url), RECORDS, out) == found and len(scripted.got(url)) == ANSWERS
    pairs, _ = make_pairs(read_records(out), PairRules(how="all"))
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [
        ("tree", "box"), ("eel", "box"), ("bee", "sky"),
    ]  # fmt: skip


def test_a_judge_that_likes_what_stands_first(scripted, tmp_path) -> None:
    found = judge_file(server(scripted.url("judge-first")), RECORDS, tmp_path / "out.jsonl")
    assert [r["scores"] for r in read_records(tmp_path / "out.jsonl")] == [[0.5] * 3, [0.5] * 3, [0.5] * 2, [None]]
    position = found["position"]
    assert (position["first"]["share"], position["same"]["share"]) == (1.0, 0.0)
    assert (position["first_in_both"], position["second_in_both"], position["tie_in_one"]) == (ANSWERS / 2, 0, 0)


def test_answers_without_a_verdict_are_counted_and_never_guessed_at(scripted, tmp_path) -> None:
    records = [*RECORDS[:2], {**PROMPTS[2], "responses": ["zebra", "bee"]}]
    found = judge_file(server(scripted.url("judge-half")), records, tmp_path / "half.jsonl")
    assert [r["scores"] for r in read_records(tmp_path / "half.jsonl")] == [*WINS[:2], [None, None]]
    assert found["unparsable"] == {"count": 1, "cut": 0, "examples": ["Verdict: A or maybe B"]}
    assert found["position"]["in_both_orders"] == 5
    nothing = judge_file(server(scripted.url("judge-nonsense")), RECORDS, tmp_path / "nothing.jsonl")
    assert all(s is None for r in read_records(tmp_path / "nothing.jsonl") for s in r["scores"])
    assert nothing["unparsable"]["count"] == ANSWERS and nothing["position"]["first"]["share"] is None
    cut = judge_file(server(scripted.url("cut")), RECORDS[:1], tmp_path / "cut.jsonl")
    assert (cut["unparsable"]["count"], cut["unparsable"]["cut"]) == (6, 6)


def test_grades(scripted, tmp_path) -> None:
    found = judge_file(server(scripted.url("judge-right")), RECORDS, tmp_path / "out.jsonl", Judging("grades"))
    assert [r["scores"] for r in read_records(tmp_path / "out.jsonl")] == [[3, 3, 1], [3, 1, 1], [2, 2], [1]]
    assert found["grades"]["mean"] == pytest.approx(17 / 9) and found["position"] is None


def test_several_judges_and_people(scripted, tmp_path) -> None:
    """On pairs whose labels are people's: the judges are right, wrong, and without a preference."""
    people = [("bee", "cat"), ("eel", "fox"), ("sky", "tree"), ("he", "it")]  # the third is no matter of e
    pairs = [{"prompt": f"Word {i}?", "chosen": c, "rejected": r, "id": i} for i, (c, r) in enumerate(people)]
    source = tmp_path / "0.jsonl"
    write_lines(source, pairs)
    records = read_responses(source)
    assert records[2] == {"prompt": "Word 2?", "responses": ["sky", "tree"], "scores": {"human": [1.0, 0.0]}, "id": 2}
    for i, name in enumerate(("right", "wrong", "first")):
        out = tmp_path / f"{i + 1}.jsonl"
        found = judge_file(server(scripted.url(f"judge-{name}")), records, out, name=name)
        records = read_records(out)
    assert records[0]["scores"] == {"human": [1, 0], "right": [1, 0], "wrong": [0, 1], "first": [0.5, 0.5]}
    agreement = found["agreement"]
    shares = {name: (beside["right"]["share"], beside["right"]["count"]) for name, beside in agreement["human"].items()}
    assert shares == {"right": (0.75, 4), "wrong": (0.25, 4), "first": (None, 0)}
    kappas = {tuple(two["judges"]): two["cohen_kappa"] for two in agreement["pairs"]}
    assert kappas["right", "wrong"] == pytest.approx((0 - 6 / 16) / (1 - 6 / 16))
    made, report = make_pairs(records, PairRules(min_agreement=0.5))
    assert [p["chosen"] for p in made] == ["bee", "eel", "sky", "he"] and report["agreement"] == 0.5


FAILURES = ("stall@3", "die@3", "truncated@3", "html@3")


@pytest.mark.parametrize("script", FAILURES)
def test_a_server_that_fails_loses_no_verdict(scripted, script, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ServerError, match=r"^request \(\d, \d\): http://127.0.0.1:\d+/.*, after 1 try"):
        judge_file(server(scripted.url(script), timeout=0.4, retries=0), RECORDS, out)
    assert len((tmp_path / "out.jsonl.answers.jsonl").read_text().splitlines()) == 3
    url = scripted.url("judge-right")
    judge_file(server(url), RECORDS, out)
    assert len(scripted.got(url)) == ANSWERS - 3 and len(read_records(out)) == len(RECORDS)


def test_a_killed_judging_asks_only_again_what_was_under_way(scripted, tmp_path) -> None:
    url, out = scripted.url("slow@150"), tmp_path / "out.jsonl"
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    command = ["judge", "--responses", str(source), "--output", str(out), "--concurrency", "2"]
    scripted.killed_after(7, url, *command)
    judge_file(server(url), RECORDS, out)
    assert [r["prompt"] for r in read_records(out)] == [r["prompt"] for r in RECORDS]
    assert len(scripted.got(url)) - ANSWERS == scripted_server.repeated(scripted.got(url)) <= 2


def test_a_crash_and_other_settings(scripted, tmp_path, monkeypatch) -> None:
    url, out = scripted.url("judge-right"), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(PowerCut):
            judge_file(server(url), RECORDS, out)
    with pytest.raises(ValueError, match="got seed 1, want seed 0 as it was begun with"):
        judge_file(server(url), RECORDS, out, Judging(seed=1))
    judge_file(server(url), RECORDS, out)
    assert read_records(out) == SCORED


def test_images_were_left_out_of_what_a_judge_sees(scripted, tmp_path) -> None:
    url = scripted.url("judge-right")
    with pytest.raises(ValueError, match="record 2: got 1 images, want none: servers and judges get texts only"):
        judge_file(server(url), [RECORDS[0], {**RECORDS[1], "images": ["a.png"]}], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"prompts\[0\]: got 2 images, want none"):
        generate_from_server(server(url), [{**PROMPTS[0], "images": ["a.png", "b.png"]}], tmp_path / "out.jsonl")
    assert scripted.got(url) == []


def test_as_a_scorer_and_a_reward(scripted) -> None:
    scorer = judge_scorer(server(scripted.url("judge-right")))
    assert list(scorer(RECORDS)) == WINS and list(scorer(RECORDS, 2)) == WINS[2:]
    reward = reward_function(scorer, "judge")
    said = [[{"role": "assistant", "content": text}] for text in ("tree", "box", "cat", "bee")]
    prompts = [PROMPTS[0]["prompt"], PROMPTS[0]["prompt"], PROMPTS[1]["prompt"], PROMPTS[1]["prompt"]]
    assert reward(prompts, said, source=[0, 0, 1, 1]) == [1.0, 0.0, 0.0, 1.0] and reward.__name__ == "judge"
    with pytest.warns(UserWarning, match="judge: got answers without a verdict"):
        assert list(judge_scorer(server(scripted.url("judge-nonsense")))(RECORDS[2:3])) == [[None, None]]


def test_a_judge_on_this_machine_goes_on_to_the_same_file(tmp_path, monkeypatch) -> None:
    """Random weights give no verdict: what counts is that the samples are the same."""
    judge, how = tiny(), Judging(samples=2, temperature=1.0, max_new_tokens=4)
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    found = judge_file(judge, RECORDS[:3], whole, how, batch_size=2)
    said = [json.loads(line)["text"] for line in (tmp_path / "whole.jsonl.answers.jsonl").read_text().splitlines()]
    assert found["unparsable"]["count"] == len(said) == 2 * ANSWERS and len(set(said)) > ANSWERS
    assert found["tokens"]["answers"] > ANSWERS and found["tokens"]["unknown"] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(PowerCut):
            judge_file(judge, RECORDS[:3], torn, how, batch_size=2)
    assert judge_file(judge, RECORDS[:3], torn, how, batch_size=2) == found
    for suffix in ("", ".answers.jsonl"):
        names = [path.with_name(path.name + suffix) for path in (whole, torn)]
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairwise(names))


def test_the_command(scripted, tmp_path, capsys) -> None:
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    rubric, template = tmp_path / "rubric.txt", tmp_path / "template.txt"
    rubric.write_text("Count the e.\n")
    template.write_text(
        "{rubric} {prompt}\n<response_a>\n{response_a}\n</response_a>\n<response_b>\n{response_b}\n</response_b>"
    )
    url, out = scripted.url("judge-right"), tmp_path / "out.jsonl"
    command = ["judge", "--responses", str(source), "--output", str(out), "--server", url, "--rubric", str(rubric)]
    command += ["--template", str(template), "--json", str(tmp_path / "report.json"), "--name", "e"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "the same in both orders              100.0%" in printed and "120 of prompts, 36 of answers" in printed
    assert scripted.got(url)[0]["messages"][0]["content"].startswith("Count the e. Name a colour.\n")
    assert read_records(out)[0]["scores"] == {"e": WINS[0]}
    assert json.loads((tmp_path / "report.json").read_text())["answers"] == ANSWERS
    nonsense = ["judge", "--responses", str(source), "--output", str(tmp_path / "nonsense.jsonl")]
    assert cli.main([*nonsense, "--server", scripted.url("judge-nonsense")]) == 2
    assert f"got no verdict in {ANSWERS} answers, want a judge that ends as asked" in capsys.readouterr().err
    assert cli.main([*command[:3], "--output", str(tmp_path / "b.jsonl")]) == 2
    assert "--model: got none, want one, or a --server" in capsys.readouterr().err
    assert cli.main(["judge", "--responses", str(out), "--output", str(tmp_path / "b.jsonl"), "--server", url]) == 2
    assert "record 1: got scores already, want a name (--name)" in capsys.readouterr().err
