"""Pairs from scores and rankings, and the report, against answers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support_online import PROMPTS, tiny, write_lines

from fastpref.commands import cli
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import read_pairs
from fastpref.online import PairRules, make_pairs

PROMPT = PROMPTS[0]["prompt"]


def record(scores, responses=("a", "bb", "ccc", "dddd"), **more):
    return {"prompt": PROMPT, "responses": list(responses)[: _count(scores)], "scores": scores, **more}


def _count(scores) -> int:
    rows = list(scores.values()) if isinstance(scores, dict) else scores
    return len(rows[0]) if isinstance(rows[0], list) else len(rows)


def made(records, **rules) -> list[tuple[str, str]]:
    pairs, _ = make_pairs(records if isinstance(records, list) else [records], PairRules(**rules))
    return [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]


A, B, C, D = "a", "bb", "ccc", "dddd"
CASES = {
    "best and worst": ([2, 9, 5, 1], {}, [(B, D)]),
    "ties at the ends: the first": ([9, 9, 1, 1], {}, [(A, D)]),
    "best against the rest": ([2, 9, 5, 1], {"how": "best-rest"}, [(B, D), (B, A), (B, C)]),
    "all": ([2, 9, 5], {"how": "all"}, [(B, A), (B, C), (C, A)]),
    "all with a margin": ([2, 9, 5], {"how": "all", "min_margin": 4}, [(B, A), (B, C)]),
    "equal scores are no pair": ([3, 3, 1], {"how": "all"}, [(A, C), (B, C)]),
    "at most two": ([2, 9, 5, 1], {"how": "all", "max_pairs_per_prompt": 2}, [(B, D), (B, A)]),
    "one response": ([1], {}, []),
    "nothing to choose": ([4, 4], {}, []),
    "no opinion": ([None, 9, 5, 1], {"how": "best-rest"}, [(B, D), (B, C)]),
    "two judges": ([[1, 2], [5, 0]], {}, [(A, B)]),
    "two judges on one scale each": ([[1, 2, 0], [300, 100, 200]], {"combine": "rank"}, [(A, C)]),
    "two judges that disagree": ([[1, 2], [5, 0]], {"min_agreement": 1}, []),
    "half of the judges will do": ([[1, 2], [5, 0]], {"min_agreement": 0.5}, [(A, B)]),
    "a tie is no agreement": ([[1, 1], [5, 0]], {"min_agreement": 1}, []),
    "judges by name": ({"x": [1, 2, 3], "y": [4, 5, 9]}, {"how": "all", "min_agreement": 1}, [(C, A), (C, B), (B, A)]),
    "a judge without an opinion": ([[1, None, 3], [4, 5, 9]], {"how": "all"}, [(C, A)]),
}


@pytest.mark.parametrize("scores, rules, wanted", CASES.values(), ids=CASES)
def test_which_pairs(scores, rules, wanted) -> None:
    assert made(record(scores), **rules) == wanted


LISTS = {
    "best first, with ranks": ([2, 9, 5, 1], {}, [B, C, A, D], [0, 1, 2, 3]),
    "ties": ([3, 3, 1], {}, [A, B, C], [0, 0, 1]),
    "closer than the margin: a tie": ([3, 2.5, 2, 1.9], {"min_margin": 1.0}, [A, B, C, D], [0, 0, 1, 1]),
    "no opinion": ([None, 9, 5, 1], {}, [B, C, D], [0, 1, 2]),
    "judges' ranks": ([[1, 2, 0], [300, 100, 200]], {"combine": "rank"}, [A, B, C], [0, 1, 2]),
}


@pytest.mark.parametrize("scores, rules, responses, ranks", LISTS.values(), ids=LISTS)
def test_lists(scores, rules, responses, ranks) -> None:
    (found,), report = make_pairs([record(scores, source="x")], PairRules(how="list", **rules))
    assert (found["responses"], found["ranks"], found["source"]) == (responses, ranks, "x")
    assert found["scores"] == sorted(found["scores"], reverse=True) and report["pairs"] == 1


def test_a_list_has_two_responses_and_no_rules_of_pairs() -> None:
    lists, report = make_pairs([record([1]), record([1, 2], responses=("a", " a"))], PairRules(how="list"))
    assert lists == [] and report["prompts_with_pairs"] == 0 and report["dropped"] == {"duplicate responses": 1}
    with pytest.raises(ValueError, match=r"min_agreement: got 0\.5 with how 'list', want it with pairs"):
        PairRules(how="list", min_agreement=0.5)


def test_ranks_are_better_when_lower() -> None:
    ranked = {"prompt": PROMPT, "responses": [A, B, C], "ranks": [2, 1, 3]}
    assert made(ranked, how="all") == [(B, C), (B, A), (A, C)]
    pairs, _ = make_pairs([ranked])
    assert (pairs[0]["margin"], pairs[0]["chosen_score"], pairs[0]["rejected_score"]) == (2, -1, -3)


def test_duplicates_are_never_a_pair() -> None:
    responses = ["Red.", " Red. ", "Red.\n", "Dark  red.", "Dark red."]
    pairs, report = make_pairs([record([1, 9, 2, 5, 0], responses)], PairRules(how="all"))
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [("Dark  red.", "Red.")]
    assert report["dropped"] == {"duplicate responses": 3}
    assert made(record([5, 1], ["same", "same "])) == []


def test_code_that_differs_in_indentation_was_a_duplicate() -> None:
    responses = ["if a:\n    b()\nc()", "if a:\n    b()\n    c()", "if  a:\n    b()\n\nc() \n"]
    pairs, report = make_pairs([record([2, 1, 0], responses)], PairRules(how="all"))
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [tuple(responses[:2])]
    assert report["dropped"] == {"duplicate responses": 1}
    assert made(record([2, 1], ["    return 1", "return 1"])) == [("    return 1", "return 1")]


@pytest.mark.parametrize(
    "columns, got",
    [({"finished": [True]}, "finished of 1 values"), ({"finished": False}, "finished of False"),
     ({"response_ids": [[1], [2], [3], [4]]}, "response_ids of 4 values")],
)  # fmt: skip
def test_what_is_not_said_of_each_response_was_an_index_error(columns, got) -> None:
    with pytest.raises(ValueError, match=f"record 2: got {got}, want 3, one per response"):
        make_pairs([record([1, 2, 3]), record([1, 2, 3], **columns)], PairRules(only_finished=True))


def test_unfinished_responses_can_be_left_out() -> None:
    cut = record([1, 9, 5], finished=[True, False, True])
    assert made(cut) == [(B, A)] and made(cut, only_finished=True) == [(C, A)]


def test_what_a_pair_holds() -> None:
    source = record([[1, 2], [5, 0]], index=3, source="web", finished=[True, True], response_tokens=[1, 1])
    (pair,), _ = make_pairs([source])
    assert pair == {
        "prompt": PROMPT, "chosen": [{"role": "assistant", "content": A}],
        "rejected": [{"role": "assistant", "content": B}], "margin": 2.0, "chosen_score": 3.0, "rejected_score": 1.0,
        "agreement": 0.5, "index": 3, "source": "web",
    }  # fmt: skip
    (plain,), _ = make_pairs([{"prompt": "Once", "responses": [" upon", " more"], "scores": [1, 0]}])
    assert (plain["prompt"], plain["chosen"], plain["rejected"]) == ("Once", " upon", " more")


def test_report_by_hand() -> None:
    records = [
        record([3, 1, 2], ["x" * 10, "y" * 4, "z" * 6]),  # pairs: +4 by 1, +6 by 2, +2 by 1
        record([0, 5, 5], ["x" * 9, "y" * 3, "y" * 3]),  # one duplicate; -6 by 5
        record([1, 1, None], ["p", "q", "r"]),
    ]
    _, report = make_pairs(records, PairRules(how="all", min_margin=1.5))
    assert {k: report[k] for k in ("prompts", "prompts_with_pairs", "responses", "pairs", "agreement")} == {
        "prompts": 3, "prompts_with_pairs": 2, "responses": 9, "pairs": 2, "agreement": None,
    }  # fmt: skip
    assert report["dropped"] == {
        "duplicate responses": 1, "pairs below the margin": 2, "pairs with equal scores": 1,
        "responses without a score": 1,
    }  # fmt: skip
    assert report["margins"]["mean"] == 3.5 and report["margins"]["quantiles"]["0.5"] == 3.5
    length = report["length"]
    assert length["chosen_longer"] == 0.5 and length["mean_difference"] == 0
    assert (length["longer_wins"]["share"], length["longer_wins"]["count"]) == (0.5, 2)
    assert length["margin_correlation"] == pytest.approx(-1)
    within = np.array([[1, 10 - 20 / 3], [-1, 4 - 20 / 3], [0, 6 - 20 / 3], [-2.5, 3], [2.5, -3], [0, 0], [0, 0]])
    assert length["score_correlation"] == pytest.approx(np.corrcoef(within.T)[0, 1])


def test_a_report_without_pairs_is_json() -> None:
    for records in ([record([4, 4])], [record([None, None])], []):
        pairs, report = make_pairs(records)
        assert pairs == [] and json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": [1, 2, 3]}, r"record 1: got scores \[1, 2, 3\], want 2 numbers, one per response, of each judge"),
        ({"scores": [[1, 2], [3]]}, "record 1: got scores .*, want 2 numbers"),
        ({"scores": ["a", "b"]}, "record 1: got scores .*, want 2 numbers"),
        ({"scores": [1, float("inf")]}, "record 1: got scores .*, want 2 numbers"),
        ({"scores": None}, "record 1: got no scores and no ranks, want one of them"),
        ({"prompt": []}, "record 1: got no prompt"),
    ],
)
def test_records_that_are_none(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_pairs([record([1, 2]) | changes])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"how": "some"}, "how: got 'some', want one of best-worst, best-rest, all, list"),
        ({"min_margin": -1}, "min_margin: got -1, want a number in [0, inf)"),
        ({"min_agreement": 2}, "min_agreement: got 2, want a number in [0, 1]"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt: got 0, want a finite number greater than 0"),
    ],
)
def test_rules_that_make_no_sense(changes, message) -> None:
    with pytest.raises(ValueError) as caught:
        PairRules(**changes)
    assert str(caught.value) == message


def test_the_command_writes_what_fastpref_and_trl_read(tmp_path, capsys) -> None:
    scored = write_lines(tmp_path / "in.jsonl", [record([2, 9, 5, 1], index=0), record([1, 3], index=1)])
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    command = ["pairs", "--scores", str(scored), "--output", str(out), "--json", str(report)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "2, 2 of them with pairs" in printed and "'the longer wins' is right" in printed
    assert json.loads(report.read_text())["pairs"] == 2
    pairs = read_pairs(out)
    assert [p.chosen[0]["content"] for p in pairs] == [B, B]
    tokenizer = tiny()[1]
    ours = tokenize_pairs(pairs, tokenizer, 512)
    data_utils = pytest.importorskip("trl.data_utils")
    for pair, line in zip(ours, out.read_text().splitlines(), strict=True):
        example = json.loads(line)
        assert data_utils.is_conversational(example)
        text = data_utils.apply_chat_template({k: example[k] for k in ("prompt", "chosen", "rejected")}, tokenizer)
        for side in ("chosen", "rejected"):
            assert tokenizer(text["prompt"] + text[side])["input_ids"] == pair.prompt + getattr(pair, side)
    write_lines(scored, [record([1, 1])])
    assert cli.main(command) == 2
    assert "got no pairs that pass" in capsys.readouterr().err
