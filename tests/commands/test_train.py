"""`fastpref train`: every method from data to a model that loads, a summary, options from files, resuming."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification
from transformers import AutoTokenizer as Tokenizer

from fastpref.commands import cli
from fastpref.commands.train import plot, summary
from fastpref.commands.train.job import METHODS, prepare
from fastpref.commands.train.options import RunOptions
from fastpref.common import memory
from tests.support_trainers import pairs, responses, tiny

CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
QUICK = [
    "--per_device_train_batch_size", "4", "--max_steps", "2", "--max-length", "192", "--no-gradient-checkpointing",
    "--use_cpu", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _machine_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    for part in tiny():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    steps = [{"prompt": f"{i} + {i}?", "completions": ["Add.", f"It is {2 * i}."], "labels": [True, i % 2 == 0]}
             for i in range(8)]  # fmt: skip
    data = {"pairs": pairs(12), "responses": responses(12), "steps": Dataset.from_list(steps)}
    for name, dataset in data.items():
        dataset.to_json(folder / f"{name}.jsonl")
    return {name: str(folder / f"{name}.jsonl") for name in data}


@pytest.fixture
def without_plots(monkeypatch):
    monkeypatch.setattr(summary, "training_curves", lambda *_: None)


def data_of(method, files):
    return files[{"prm": "steps", "kto": "responses"}.get(method, "pairs")]


def train(method, out, *options):
    return cli.main(["train", method, "--output_dir", str(out), *QUICK, *map(str, options)])


def refused(capsys, *argv):
    assert cli.main(["train", *map(str, argv)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# those that sample have tests of their own
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"rloo", "grpo", "distill"}))
def test_every_method_leaves_a_model_and_a_summary(method, base, files, tmp_path, capsys, monkeypatch):
    if method in ("ipo", "orpo", "cpo", "simpo"):  # with DPO's panels: drawing them would be most of the time
        monkeypatch.setattr(summary, "training_curves", lambda history, path, title: path.write_bytes(b"\x89PNG"))
    out = tmp_path / "out"
    options = ["--model", base, "--data", data_of(method, files), "--eval-split", "0.25", "--save_strategy", "no"]
    if method == "reward":  # leaves out what is longer
        options += ["--max_length", "1024"]
    assert train(method, out, *options) == 0
    model = CLASSES[METHODS[method].task].from_pretrained(out)
    assert Tokenizer.from_pretrained(out).chat_template
    before = CLASSES[METHODS[method].task].from_pretrained(base, num_labels=getattr(model, "num_labels", 2))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert all(moved)

    found = json.loads((out / "training.json").read_text())
    assert found["steps"] == 2 and found["settings"]["learning_rate"] == 1e-3 and found["tokens_per_second"] > 0
    losses = [e for e in found["history"] if "loss" in e]
    assert [e["step"] for e in losses] == [1, 2]
    assert method != "kto" or all("kl" in e for e in losses)  # right after an evaluation, too
    ends = found["evaluations"]
    assert ends["before"]["eval_loss"] != ends["after"]["eval_loss"]
    assert f"{ends['after']['eval_loss']:.4f}" in capsys.readouterr().out
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "summary.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)=\"(?!data:)|https?://", page)
    assert f"{ends['before']['eval_loss']:.4f}" in page


def test_a_file_of_options_and_those_that_win_over_it(base, files, tmp_path, without_plots):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {base}\ndata: [{files['pairs']}]\neval_data: {files['pairs']}\nbeta: 2e-1\nlearning-rate: 1e-4\n"
        "max_steps: 5\nloss_type: [sigmoid, sft]\nsave_strategy: no\nld_alpha: null\nlr_scheduler_kwargs: {}\n"
    )
    assert train("dpo", tmp_path / "out", "--config", config) == 0
    settings = json.loads((tmp_path / "out" / "training.json").read_text())["settings"]
    assert (settings["beta"], settings["loss_type"]) == (0.2, ["sigmoid", "sft"])
    assert (settings["max_steps"], settings["learning_rate"]) == (2, 1e-3)


def test_adapters(base, files, tmp_path, without_plots):
    from peft import AutoPeftModelForCausalLM

    options = ["--model", base, "--data", files["pairs"], "--save_strategy", "no"]
    assert train("dpo", tmp_path / "out", *options, "--lora-r", 2, "--lora-target-modules", "q_proj", "v_proj") == 0
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    adapter = model.peft_config["default"]
    assert (adapter.r, adapter.lora_alpha, set(adapter.target_modules)) == (2, 4, {"q_proj", "v_proj"})
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert not found["evaluations"]
    own = {field.name for field in dataclasses.fields(RunOptions)}
    assert found["changed"].keys() & own == {"lora_r", "lora_target_modules"}, "what nobody changed was listed"


def test_resuming_gives_the_same_weights(base, files, tmp_path, without_plots):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    options = ["--model", base, "--data", files["pairs"], "--lr_scheduler_type", "constant", "--save_steps", 1]
    assert train("dpo", whole, *options) == 0
    assert train("dpo", parted, *options, "--max_steps", 1) == 0
    (parted / "checkpoint-9").mkdir()  # a run was killed while writing it
    assert train("dpo", parted, *options, "--resume") == 0
    one, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, parted))
    assert all(torch.equal(one[name], other[name]) for name in one)
    history = json.loads((parted / "training.json").read_text())["history"]
    assert [e["step"] for e in history if "loss" in e] == [1, 2]


def test_bars_of_datasets_were_printed_before_an_error(base, files, tmp_path, capsys, monkeypatch):
    new = tmp_path / "steps.jsonl"  # not in the cache of `datasets`, which reads it with a bar
    new.write_text(Path(files["steps"]).read_text())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    datasets.enable_progress_bars()
    assert "want one of" in refused(capsys, "dpo", "--model", base, "--data", new, "--use_cpu")


def test_errors_are_one_line(base, files, tmp_path, capsys, monkeypatch):
    out = ["--output_dir", tmp_path / "out"]
    assert "--bata: no such option, want --data or --beta" in refused(capsys, "dpo", "--bata", "0.2", *out)
    assert "--reward: an option of rloo, grpo, not of" in refused(capsys, "dpo", "--reward", "judge.py:score", *out)
    assert "--simpo-gamma: an option of cpo, simpo, not" in refused(capsys, "dpo", "--simpo-gamma=1", *out)
    assert "max_steps" in refused(capsys, "dpo", "--max_steps", "many", *out)
    assert "'l', want" in refused(capsys, "dpo", "--model", base, "--loss_type", "l", "--data", files["pairs"], *out)
    assert "nowhere.jsonl: no such file" in refused(capsys, "dpo", "--data", tmp_path / "nowhere.jsonl", *out)
    line = refused(capsys, "dpo", "--model", base, "--data", files["steps"], "--use_cpu", *out)
    assert "got columns completions, labels, prompt; want one of" in line
    assert "no folder" in refused(capsys, "dpo", "--model", tmp_path / "none", "--data", files["pairs"], *out)
    assert "solutions" in refused(capsys, "prm", *out)
    assert "no checkpoint" in refused(capsys, "dpo", "--model", base, "--resume", *out)
    assert "eval_split: got 1.5" in refused(capsys, "dpo", "--eval-split", "1.5", *out)
    assert "lora_r: got none" in refused(capsys, "dpo", "--lora-alpha", "8", *out)

    config = tmp_path / "run.yaml"
    config.write_text("modle: tiny\n")
    assert "run.yaml: modle: no such option, want model" in refused(capsys, "dpo", "--config", config, *out)
    config.write_text("num_generations: 4\n")
    assert "run.yaml: num_generations: an option of distill, rloo, grpo" in refused(
        capsys, "dpo", "--config", config, *out
    )
    config.write_text("learning_rate: fast\n")
    assert "run.yaml: argument --learning_rate" in refused(capsys, "dpo", "--config", config, *out)
    config.write_text("- a\n")
    assert "got list" in refused(capsys, "dpo", "--config", config, *out)

    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert "an earlier run" in refused(capsys, "dpo", "--model", base, "--data", files["pairs"], *out)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    line = refused(capsys, "dpo", "--model", base, "--lora-r", "2", "--output_dir", tmp_path / "other")
    assert "pip install 'fastpref[peft]'" in line


def test_without_matplotlib_only_the_plots_are_missing(base, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    options = ["--model", base, "--data", files["pairs"], "--save_strategy", "no"]
    assert train("simpo", tmp_path / "out", *options) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out" / "summary.png").exists() and (tmp_path / "out" / "summary.html").exists()


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "kto", "--help"])
    text = capsys.readouterr().out
    assert "--lora-target-modules" in text and "--desirable_weight" in text and "--no-padding-free" in text


@pytest.mark.parametrize("method", ["reward", "prm"])
def test_adapters_leave_the_score_head_whole(method, base, files, tmp_path, without_plots):
    options = ["--model", base, "--data", data_of(method, files), "--save_strategy", "no", "--max_length", "1024"]
    assert train(method, tmp_path / "out", *options, "--lora-r", 2, "--max_steps", 1) == 0
    names = [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "score" in name]
    assert names and not any("lora" in name for name in names)


def test_smoothing_keeps_level_and_length():
    assert plot.smooth([2.0] * 50) == pytest.approx([2.0] * 50)
    ramp = plot.smooth([float(i) for i in range(41)])
    assert ramp[20] == pytest.approx(20) and len(ramp) == 41 and ramp[0] == pytest.approx(1.0)
    steps, values = plot.points([{"step": 1, "kl": float("nan")}, {"step": 2, "kl": 0.5}, {"step": 3}], "kl")
    assert (steps, values) == ([2], [0.5])


def test_dropout_of_the_adapters_was_turned_off(base, files, tmp_path, capsys):
    options = ["--model", base, "--data", files["pairs"], "--use_cpu", "--output_dir", str(tmp_path / "out")]
    assert "lora_r: got none beside other LoRA options" in refused(capsys, "dpo", "--lora_dropout", "0.1", *options)
    job = prepare("dpo", [*options, "--lora_r", "2", "--lora_dropout", "0.25"])
    rates = {m.p for name, m in job.trainer.model.named_modules() if "lora_dropout" in name and hasattr(m, "p")}
    assert rates == {0.25}


def test_the_precision_that_is_printed_is_the_one_that_runs(base, files, tmp_path, capsys) -> None:
    for given, printed in (([], "fp32"), (["--bf16"], "bf16"), (["--fp16"], "fp32")):
        argv = ["--model", base, "--data", files["pairs"], "--output_dir", str(tmp_path / "out"), *QUICK, *given]
        trainer = prepare("cpo", argv).trainer
        with trainer.accelerator.autocast():
            autocast = torch.is_autocast_enabled("cpu")
        assert f"Training on the CPU in {printed}\n" in capsys.readouterr().out
        assert autocast == (printed == "bf16")


def test_a_loss_of_nan_was_logged_as_0_in_a_run_that_ended_well(base, files, tmp_path, capsys, without_plots):
    out = tmp_path / "out"
    options = ("--data", files["pairs"], "--model", base, "--learning_rate", "1e30", "--max_steps", "6")
    assert train("orpo", out, *options, "--warmup_steps", "0") == 1
    captured = capsys.readouterr()
    assert re.search(r"the loss is NaN at step [23] ", captured.err) and "loss nan" in captured.out
    assert not list(out.glob("*.safetensors")) and not (out / "training.json").exists()


def test_nan_is_no_number_in_what_a_run_leaves():
    assert summary._finite({"a": [1.0, float("nan")], "b": float("inf")}) == {"a": [1.0, None], "b": None}
    assert summary._number(float("nan")) == "nan"
    assert plot.points([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}], "loss") == ([2], [1.0])
