"""An online trainer whose samples and whose rewards come from servers."""

from __future__ import annotations

import json
import warnings

import pytest
from support_rl import QUIET, prompts, train
from support_trainers import tiny

from fastpref.online import Server, ServerError, ServerSampler, judge_scorer, reward_function
from fastpref.online.served import request_seed
from fastpref.trainers import RLOOConfig, RLOOTrainer


def trainer(sampler, reward, folder):
    model, tokenizer = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RLOOTrainer(
            model, reward, RLOOConfig(output_dir=str(folder), **(QUIET | {"seed": 5})), prompts(),
            processing_class=tokenizer, sampler=sampler,
        )  # fmt: skip


def test_samples_and_rewards_from_servers(scripted, tmp_path) -> None:
    url, judge = scripted.url("vllm"), scripted.url("judge-right")
    reward = reward_function(judge_scorer(Server(judge, retries=0)), "judge")
    own = trainer(ServerSampler(Server(url, retries=0), ids=True, logps=True), reward, tmp_path)
    logs = train(own)
    assert [log["rewards/judge/mean"] for log in logs] == pytest.approx([0.5, 0.5])  # win rates within a group
    assert all(log["rewards/judge/std"] > 0 for log in logs)
    got = scripted.got(url)
    assert len(got) == 2 * QUIET["per_device_train_batch_size"]
    rows = {json.dumps(own.train_dataset[i]["prompt_ids"]) for i in range(len(own.train_dataset))}
    assert {json.dumps(body["prompt"]) for body in got} <= rows
    assert sorted(b["seed"] for b in got) == sorted(request_seed(5, i, j) for i in range(4) for j in range(4))
    assert {(b["max_tokens"], b["temperature"], b["logprobs"]) for b in got} == {(12, 1.0, 1)}
    questions = scripted.got(judge)
    assert len(questions) == 4 * 12  # of each group's four different responses every two, in both orders


def test_a_server_that_dies_ends_the_run_with_its_name(scripted, tmp_path) -> None:
    sampler = ServerSampler(Server(scripted.url("die@3"), retries=0), ids=True)
    with pytest.raises(ServerError, match=r"http://127.0.0.1:\d+/\d+\.die@3/v1/completions: "):
        train(trainer(sampler, lambda completions, **_: [0.0] * len(completions), tmp_path))
