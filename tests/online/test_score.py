"""Scores of reward models, implicit rewards and judges; judges that fail lose nothing."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from support_online import PROMPTS, PowerCut, stop_at, tiny, write_lines
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpref import RewardHead
from fastpref.commands import cli
from fastpref.online import (
    function_scorer,
    implicit_reward_scorer,
    load_reward_model,
    read_records,
    reward_model_scorer,
    score_file,
    score_records,
)
from fastpref.online.judges import load_function
from fastpref.online.sequences import sequence_ids

RESPONSES = (["Red.", "A long way to say blue, is it not?"], ["Four."], ["Up", "Down, and then some more.", "Red."])
RECORDS = [{**PROMPTS[i % 3], "responses": RESPONSES[i % 3], "index": i} for i in range(7)]


@pytest.fixture(scope="module")
def policy():
    return tiny()


@pytest.fixture(scope="module")
def reward_model(policy):
    torch.manual_seed(1)
    return RewardHead.from_causal_lm(tiny(seed=1)[0]).eval()


def lengths(prompt, responses) -> list[float]:
    return [float(len(r)) for r in responses]


SCORED = [{**r, "scores": lengths(None, r["responses"])} for r in RECORDS]


def test_rewards_are_those_of_each_conversation_alone(policy, reward_model, monkeypatch) -> None:
    tokenizer = policy[1]
    monkeypatch.setattr("fastpref.online.judges.WINDOW_BATCHES", 1)
    found = list(reward_model_scorer(reward_model, tokenizer, batch_size=3)(RECORDS))
    for record, scores in zip(RECORDS, found, strict=True):
        for response, score in zip(record["responses"], scores, strict=True):
            messages = [*record["prompt"], {"role": "assistant", "content": response}]
            ids = torch.tensor([tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]])
            with torch.no_grad():
                wanted = float(reward_model.score(reward_model.backbone(ids).last_hidden_state[0, -1]))
            assert score == pytest.approx(wanted, rel=1e-9)
    for start in range(len(RECORDS)):
        assert list(reward_model_scorer(reward_model, tokenizer, batch_size=3)(RECORDS, start)) == found[start:]


def test_text_ends_with_one_end_token(policy) -> None:
    tokenizer = policy[1]
    plain, closed = (sequence_ids({"prompt": "Two and"}, text, tokenizer) for text in (" two", " two<|im_end|>"))
    assert plain == closed and plain.response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(plain.prompt + plain.response) == "Two and two<|im_end|>"


def test_sequences_are_cut(policy, reward_model) -> None:
    long = [{**PROMPTS[1], "responses": ["word " * 50, "word " * 60]}]
    (scores,) = reward_model_scorer(reward_model, policy[1], max_length=12)(long)
    assert scores[0] == scores[1]
    (scores,) = reward_model_scorer(reward_model, policy[1])(long)
    assert scores[0] != scores[1]


def test_implicit_rewards(policy) -> None:
    model, tokenizer = policy
    reference = tiny(seed=2)[0]
    found = list(implicit_reward_scorer(model, reference, tokenizer, beta=0.5, batch_size=4)(RECORDS[:2]))

    def logp(which, record, response) -> float:
        head, tail, _ = sequence_ids(record, response, tokenizer)
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            logps = which(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(-1, ids[0, 1:, None])[len(head) - 1 :].sum())

    for record, scores in zip(RECORDS[:2], found, strict=True):
        wanted = [0.5 * (logp(model, record, r) - logp(reference, record, r)) for r in record["responses"]]
        assert scores == pytest.approx(wanted, rel=1e-9) and abs(wanted[0]) > 1e-3


@pytest.mark.parametrize("workers", [1, 3])
def test_a_judge_is_asked_once_a_prompt_in_order(workers) -> None:
    calls = []

    def judge(prompt, responses):
        time.sleep(0.002 * (len(calls) % 3))
        calls.append(prompt)
        return lengths(prompt, responses)

    assert list(score_records(RECORDS, function_scorer(judge, workers))) == SCORED
    assert len(calls) == len(RECORDS)


FAILURES = {
    "too few": (lambda p, r: [1.0], "the judge gave 1 scores, want 2, one per response"),
    "nan": (lambda p, r: [0.0, math.nan], "the judge gave nan to response 2, want a finite number or None"),
    "infinite": (lambda p, r: [math.inf, 0], "the judge gave inf to response 1, want a finite number or None"),
    "no numbers": (lambda p, r: ["good", "bad"], "the judge gave ['good', 'bad'], want 2 numbers"),
    "one number": (lambda p, r: 1.0, "the judge gave 1.0, want 2 numbers"),
    "raises": (lambda p, r: 1 / 0, "the judge raised ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("failure, message", FAILURES.values(), ids=FAILURES)
def test_a_failing_judge_is_named_and_loses_nothing(failure, message, workers, tmp_path) -> None:
    out = tmp_path / "out.jsonl"

    records = [{**r, "prompt": list(r["prompt"])} for r in RECORDS]
    bad = records[3]["prompt"]

    def judge(prompt, responses):
        return failure(prompt, responses) if prompt is bad else lengths(prompt, responses)

    with pytest.raises(ValueError) as caught:
        score_file(records, out, function_scorer(judge, workers), {"judge": "v1"})
    assert str(caught.value) == f"record 4: {message}"
    assert read_records(out) == SCORED[:3]
    bad = None  # repaired
    assert score_file(records, out, function_scorer(judge, workers), {"judge": "v1"}) == 4
    assert read_records(out) == SCORED


@pytest.mark.parametrize("bad", [[1.0], None], ids=["wrong scores", "a full disk"])
def test_a_failing_run_closes_its_scorer_at_once(bad, tmp_path, monkeypatch) -> None:
    """It may hold threads. Closed by the garbage collector in a thread that was just starting, it never returned."""
    closed = []

    def scorer(records, start=0):
        try:
            for record in records[start:]:
                yield bad or lengths(record["prompt"], record["responses"])
        finally:
            closed.append(True)

    if bad is None:
        stop_at(monkeypatch, 1)
    with pytest.raises((ValueError, PowerCut)):
        score_file(RECORDS, tmp_path / "out.jsonl", scorer)
    assert closed == [True]


def test_a_judge_may_have_no_opinion() -> None:
    (found,) = score_records(RECORDS[:1], function_scorer(lambda p, r: [None, 1]))
    assert found["scores"] == [None, 1.0]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch) -> None:
    out, scorer = tmp_path / "out.jsonl", function_scorer(lengths)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(PowerCut):
            score_file(RECORDS, out, scorer)
    assert score_file(RECORDS, out, scorer) == 3 and read_records(out) == SCORED
    assert score_file(RECORDS, out, scorer) == 0
    with pytest.raises(ValueError, match=r"got responses '[0-9a-f]{32}', want responses '[0-9a-f]{32}' as it was"):
        score_file([*RECORDS[:6], RECORDS[0]], out, scorer)


def test_judges_by_name_go_together() -> None:
    first = list(score_records(RECORDS, function_scorer(lengths), name="length"))
    both = list(score_records(first, function_scorer(lambda p, r: [0] * len(r)), name="nothing"))
    assert both[0]["scores"] == {"length": [4.0, 34.0], "nothing": [0.0, 0.0]}
    for records, name, message in (
        (first, "length", "record 1: got scores named 'length' already, want another name"),
        (first, None, "record 1: got scores already, want a name (--name) for scores beside them"),
        (SCORED, "x", "record 1: got scores without a name, want named ones to put 'x' beside"),
    ):
        with pytest.raises(ValueError) as caught:
            list(score_records(records, function_scorer(lengths), name=name))
        assert str(caught.value) == message


def test_functions_by_name(tmp_path) -> None:
    (tmp_path / "judge.py").write_text("def score(prompt, responses):\n    return [1.0 for _ in responses]\n")
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    assert load_function(f"{tmp_path}/judge.py:score")("x", ["a", "b"]) == [1, 1]
    assert load_function("math:sqrt") is math.sqrt
    for spec, message in (
        ("judge", "want module:name or file.py:name"),
        (f"{tmp_path}/none.py:score", "there is no file"),
        (f"{tmp_path}/judge.py:other", "has no function 'other'"),
        ("no.such.module:score", "No module named 'no'"),
        (f"{tmp_path}/needy.py:score", "No module named 'no_such_package'"),
    ):
        with pytest.raises(ValueError, match="^function: got .*" + message):
            load_function(spec)


def test_the_command_with_a_reward_model(policy, reward_model, tmp_path, capsys) -> None:
    folder = tmp_path / "reward"
    reward_model.save_pretrained(folder)
    policy[1].save_pretrained(folder)
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1
    responses = write_lines(tmp_path / "in.jsonl", RECORDS)
    command = ["score", "--responses", str(responses), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main([*command, "--reward-model", str(folder), "--batch-size", "4"]) == 0
    assert "7 prompts scored now, 7 in all" in capsys.readouterr().out
    model, tokenizer = load_reward_model(folder)
    wanted = list(reward_model_scorer(model, tokenizer, batch_size=4)(RECORDS))
    assert [json.loads(line)["scores"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == wanted
    assert cli.main([*command, "--function", "math:sqrt"]) == 2
    assert "function 'math:sqrt', want reward_model '" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--function", "math:sqrt"]) == 2
    assert "record 1: the judge raised TypeError" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--implicit"]) == 2
    assert "--implicit: got no --model or no --reference, want both" in capsys.readouterr().err


def test_scores_of_another_template_were_taken_for_these(policy, reward_model, tmp_path, capsys) -> None:
    folder = tmp_path / "reward"
    reward_model.save_pretrained(folder)
    policy[1].save_pretrained(folder)
    responses = write_lines(tmp_path / "in.jsonl", RECORDS)
    command = ["score", "--responses", str(responses), "--output", str(tmp_path / "out.jsonl")]
    command += ["--reward-model", str(folder)]
    assert cli.main(command) == 0 and cli.main(command) == 0
    assert "0 prompts scored now" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>the ")
    tokenizer.save_pretrained(folder)
    assert cli.main(command) == 2
    assert "tokens '" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"responses": ["a"]},
            'record 1: got no prompt, want text or a list of messages {"role": "...", "content": "..."}',
        ),
        ({"prompt": "a"}, "record 1: got responses of NoneType, want a list of strings"),
        ({"prompt": "a", "responses": [1]}, "record 1: got responses of list, want a list of strings"),
    ],
)
def test_records_that_are_none(record, message) -> None:
    with pytest.raises(ValueError) as caught:
        list(score_records([record], function_scorer(lengths)))
    assert str(caught.value) == message
