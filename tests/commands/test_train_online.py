"""`fastpref train rloo` and `grpo`: rewards by name, what is written, and when a run stops."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerControl, TrainerState

from fastpref import models
from fastpref.commands import cli
from fastpref.commands.train.plot import overoptimization
from fastpref.trainers import StopOveroptimization

SHORT = [
    "--model", "tiny", "--use_cpu", "true", "--max_steps", "2", "--per_device_train_batch_size", "4",
    "--num_generations", "2", "--max_completion_length", "6", "--save_strategy", "no", "--disable_tqdm", "true",
    "--learning_rate", "1e-2",
]  # fmt: skip


def test_a_run_by_two_kinds_of_functions(tmp_path, capsys) -> None:
    (tmp_path / "judge.py").write_text(
        "def brief(prompt, responses):\n    return [-len(r) for r in responses]\n"
        "def wordy(completions, **columns):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    out = tmp_path / "out"
    command = ["train", "rloo", *SHORT, "--output_dir", str(out), "--reward", f"{tmp_path}/judge.py:brief",
               f"{tmp_path}/judge.py:wordy", "--reward_weights", "1.0", "0.5", "--heldout_reward",
               f"{tmp_path}/judge.py:wordy", "--track_kl", "true", "--eval_split", "0.03",
               "--per_device_eval_batch_size", "4"]  # fmt: skip
    assert cli.main(command) == 0
    history = json.loads((out / "training.json").read_text())["history"]
    first = next(entry for entry in history if "reward" in entry)
    assert first["reward"] == pytest.approx(first["rewards/brief/mean"] + 0.5 * first["rewards/wordy/mean"], rel=1e-4)
    assert first["heldout/wordy/mean"] == pytest.approx(first["rewards/wordy/mean"])
    assert first["kl/exact"] == pytest.approx(0, abs=1e-5)
    ends = json.loads((out / "training.json").read_text())["evaluations"]
    assert ends["before"]["eval_kl/exact"] < 1e-4 < ends["after"]["eval_kl/exact"]
    assert {"model.safetensors", "summary.png", "reward-kl.png"} <= {path.name for path in out.iterdir()}
    assert cli.main(["train", "grpo", *SHORT, "--output_dir", str(tmp_path / "no")]) == 2
    assert "--reward: got none" in capsys.readouterr().err


def test_a_language_model_is_no_reward_model_and_a_file_is_no_function(tmp_path, capsys) -> None:
    """A head of random weights was made for the language model, and trained on."""
    for part in models.tiny(["Some words to learn from."]):
        part.save_pretrained(tmp_path / "policy")
    wanted = {
        f"{tmp_path}/policy": f"got {tmp_path}/policy with 2 labels, want 1, as a reward model has",
        "judge.py": "got 'judge.py', want module:name or file.py:name",
    }
    for reward, message in wanted.items():
        assert cli.main(["train", "rloo", *SHORT, "--output_dir", str(tmp_path / "out"), "--reward", reward]) == 2
        assert message in capsys.readouterr().err


def served(url: str, out, *more: str) -> list[str]:
    (out.parent / "brief.py").write_text("def brief(prompt, responses):\n    return [-len(r) for r in responses]\n")
    (out.parent / "prompts.jsonl").write_text("".join(f'{{"prompt": "Say {n}"}}\n' for n in range(8)))
    return ["train", "rloo", *SHORT, "--output_dir", str(out), "--reward", f"{out.parent / 'brief.py'}:brief",
            "--data", f"{out.parent / 'prompts.jsonl'}",
            "--server", url, "--server-retries", "0", *more]  # fmt: skip


def test_responses_from_a_server(scripted, tmp_path, capsys) -> None:
    """It goes on from a checkpoint, and says what a server cannot promise."""
    url, saved = scripted.url("vllm"), ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "3"]
    with pytest.warns(UserWarning, match="weights that it holds.* its log-probs correct for that") as said:
        assert cli.main(served(url, tmp_path / "out", *saved)) == 0
    assert sum("weights that it holds" in str(w.message) for w in said) == 1
    assert not any("does not repeat itself" in str(w.message) for w in said)
    assert f"Responses from {url}, model scripted, kind vllm" in capsys.readouterr().out
    got = scripted.got(url)
    assert len(got) == 8 and all(body["return_token_ids"] and body["logprobs"] == 1 for body in got)
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    first, asked = found["history"][0], {n: v for n, v in found["changed"].items() if n.startswith("server")}
    assert asked == {"server": url, "server_retries": 0}, "0 was none, and what nobody changed was listed"
    assert first["sampling/sampling_logp_difference/mean"] > 0.5
    go_on = ["--max_steps", "3", "--resume", str(tmp_path / "out" / "checkpoint-2")]
    with pytest.warns(UserWarning, match="does not repeat itself.* not to the bit") as said:
        assert cli.main(served(url, tmp_path / "out", *saved, *go_on)) == 0
    assert sum("does not repeat itself" in str(w.message) for w in said) == 1
    assert len(scripted.got(url)) == 12, "a step that is done is not sampled again"


def test_a_server_without_log_probs_is_for_those_who_say_so(scripted, tmp_path, capsys) -> None:
    url, uncorrected = scripted.url("vllm-ids"), ["--vllm_importance_sampling_correction", "false"]
    with pytest.warns(UserWarning, match="weights that it holds"):
        assert cli.main(served(url, tmp_path / "out")) == 1
    assert "got no logprobs of the response's tokens, which were asked for; --resume" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="nothing corrects for that, and its responses are taken for the policy's"):
        assert cli.main(served(url, tmp_path / "out", *uncorrected, "--max_steps", "1")) == 0
    assert "logprobs" not in scripted.got(url)[-1]


def test_a_judge_from_a_file(scripted, tmp_path, capsys) -> None:
    url, file = scripted.url("judge-right"), tmp_path / "shorter.json"
    file.write_text(json.dumps({"server": {"url": url, "retries": 0}, "how": "grades", "rubric": "Count letters."}))
    command = served(scripted.url("vllm"), tmp_path / "out", "--reward", f"judge:{file}", "--max_steps", "1")
    with pytest.warns(UserWarning, match="weights that it holds"):
        assert cli.main(command) == 0
    (first, *_) = json.loads((tmp_path / "out" / "training.json").read_text())["history"]
    assert 1 <= first["rewards/shorter/mean"] <= 10
    questions = [body["messages"][-1]["content"] for body in scripted.got(url)]
    assert len(questions) == 4 and all("Count letters." in question for question in questions)
    for wrong, message in (
        ({"server": url, "rubrics": "x"}, "rubrics: no such setting of a judge"),
        ({"how": "pairs"}, "got neither of server and model"),
        ({"server": url, "dtype": "float32"}, "dtype: got it with a server"),
        ({"server": {"address": url}}, "address: no such setting of its server"),
        ({"server": url, "how": "votes"}, "how: got 'votes'"),
        ([], "got list, want an object"),
    ):
        file.write_text(json.dumps(wrong))
        assert cli.main(command) == 2
        assert f"--reward judge:{file}: {message}" in capsys.readouterr().err


REFUSED_SERVERS = {
    "two models": (["--server", "many"], "it lists a, b; want a model's name"),
    "no such kind": (["--server-kind", "mine"], "server_kind"),
    "extra body": (["--server-extra-body", "[]"], "--server_extra_body: got '[]', want a JSON object"),
    "no server": (["--server-model", "x"], "--server_model: got it without --server"),
}


@pytest.mark.parametrize("case", REFUSED_SERVERS)
def test_a_server_is_refused_before_anything_is_loaded(case, scripted, tmp_path, capsys) -> None:
    options, message = REFUSED_SERVERS[case]
    command = served(scripted.url("vllm"), tmp_path / "out", *options)
    if case == "two models":
        command[command.index("many")] = scripted.url("many")
    if case == "no server":
        command[command.index("--server") : command.index("--server") + 2] = []
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def logged(rule: StopOveroptimization, entries: list[dict[str, float]]) -> int | None:
    """The step at which a rule stops."""
    control, state = TrainerControl(), TrainerState()
    for step, entry in enumerate(entries, 1):
        state.global_step = step
        rule.on_log(None, state, control, logs=entry)
        if control.should_training_stop:
            return step
    return None


def test_stops_by_kl(capsys) -> None:
    entries = [{"reward": 0.0, "kl/exact": kl} for kl in (0.1, 0.5, 2.5)]
    assert logged(StopOveroptimization(max_kl=2.0), entries) == 3
    assert "stopped at step 3: kl/exact is 2.5 nats a response, and max_kl is 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="track_kl=True"):
        logged(StopOveroptimization(max_kl=2.0), [{"reward": 0.0}])


def test_stops_by_a_heldout_scorer(capsys) -> None:
    """Not while both fall: that is a bad step, and nothing that is exploited."""
    rule = {"patience": 2, "smoothing": 0.0}
    rising = [{"reward": r, "heldout/b/mean": h} for r, h in ((0, 0), (1, 1), (2, 0.5), (3, 0.4), (4, 0.3))]
    assert logged(StopOveroptimization(**rule), rising) == 4
    assert "since step 2 heldout/b/mean went from 1 to 0.4 while the reward went from 1 to 3" in capsys.readouterr().out
    falling = [{"reward": -x, "heldout/b/mean": -x} for x in range(6)]
    assert logged(StopOveroptimization(**rule), falling) is None
    half = StopOveroptimization(**rule)
    logged(half, rising[:3])
    other = StopOveroptimization.from_state(half.state())
    assert logged(other, rising[3:]) == 1, "it goes on from a checkpoint"


def test_runs_are_drawn_beside_each_other(tmp_path) -> None:
    measured = {"heldout/x/mean": -1.0, "completions/mean_length": 5.0}
    run = [{"step": i, "reward": i, "kl/exact": i / 2, **measured} for i in (1, 2)]
    overoptimization({"a": run, "b": run}, tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 1000
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.axes.Axes.plot", lambda self, *_, label, **__: drawn.append(label))
        overoptimization({str(i): run for i in range(5)}, tmp_path / "five.png")
    assert drawn == 3 * ["0", "1", "2", "3", "4"], "the fifth run was left out"
    with pytest.raises(ValueError, match="track_kl"):
        overoptimization({"a": [{"step": 1, "reward": 0.0}]}, tmp_path / "none.png")
