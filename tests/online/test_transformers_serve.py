"""A real server: `transformers serve` with a tiny model, in a process of its own."""

from __future__ import annotations

import pytest
from support_online import PROMPTS, tiny
from support_servers import transformers_serve

from fastpref.online import (
    Judging,
    Sampling,
    Server,
    ServerError,
    ServerSampler,
    generate_from_server,
    judge_file,
    read_records,
    sample_responses,
)

RECORDS = [*PROMPTS, {"prompt": "Once upon"}]


@pytest.fixture(scope="module")
def policy():
    model, tokenizer = tiny()
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def served(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in policy:
        part.save_pretrained(folder)
    with transformers_serve(folder) as url:
        yield Server(url, model=str(folder), kind="transformers", concurrency=4)


def test_it_samples(served, tmp_path) -> None:
    assert generate_from_server(served, RECORDS, tmp_path / "out.jsonl", Sampling(k=2, max_new_tokens=5)) == 8
    found = read_records(tmp_path / "out.jsonl")
    assert all(r["responses"][0] != r["responses"][1] for r in found)
    assert {n for r in found for n in r["response_tokens"]} <= set(range(1, 6))


def test_greedy_is_the_local_models(served, policy, tmp_path) -> None:
    greedy = Sampling(k=1, max_new_tokens=5, temperature=0)
    generate_from_server(served, RECORDS, tmp_path / "greedy.jsonl", greedy)
    wanted = [[r.text for r in row] for row in sample_responses(*policy, RECORDS, greedy)]
    assert [r["responses"] for r in read_records(tmp_path / "greedy.jsonl")] == wanted


def test_a_server_that_samples_as_the_model_says_was_taken_for_one_that_obeys(served, tmp_path, capsys) -> None:
    plain = Server(served.url, model=served.model)
    generate_from_server(plain, PROMPTS, tmp_path / "same.jsonl", Sampling(k=2, max_new_tokens=3))
    assert "the 2 responses to 7 of 7 prompts are all the same" in capsys.readouterr().err


def test_a_judge_is_the_local_models(served, policy, tmp_path) -> None:
    """Of random weights: no verdicts, and the report says so."""
    records, how = [{**PROMPTS[0], "responses": ["Red.", "Blue."]}], Judging(max_new_tokens=6)
    reports = [judge_file(judge, records, tmp_path / f"{i}.jsonl", how) for i, judge in enumerate((served, policy))]
    assert reports[0] == reports[1]
    assert reports[0]["unparsable"]["count"] == 2 and reports[0]["tokens"]["answers"] > 0
    assert read_records(tmp_path / "0.jsonl")[0]["scores"] == [None, None]


def test_what_it_cannot_give_is_refused(served, tmp_path) -> None:
    few = Sampling(k=1, max_new_tokens=2)
    with pytest.raises(ServerError, match=r"status 422: .*return_token_ids"):
        generate_from_server(served, PROMPTS, tmp_path / "ids.jsonl", few, save_ids=True)
    with pytest.raises(ServerError, match="got no logprobs"):
        ServerSampler(served, logps=True)(["Once"], few)
    with pytest.raises(ServerError, match=r"status 400: .*Server is pinned"):
        generate_from_server(Server(served.url, model="other", retries=0), PROMPTS, tmp_path / "other.jsonl", few)
