"""`fastpref train` with adapters: LoRA's options, quantised weights, rounds, and every command that takes a model."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from fastpref.commands import cli
from fastpref.commands.train import summary
from fastpref.common import memory
from tests.support_trainers import pairs, tiny

peft = pytest.importorskip("peft")
QUICK = [
    "--per_device_train_batch_size", "4", "--max_steps", "2", "--max-length", "192", "--use_cpu",
    "--learning_rate", "1e-2", "--save_strategy", "no", "--lr_scheduler_type", "constant",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _machine_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(summary, "training_curves", lambda *_: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    for part in tiny():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    pairs(8).to_json(path)
    return str(path)


def train(method, out, *options):
    return cli.main(["train", method, "--output_dir", str(out), *QUICK, *map(str, options)])


def refused(capsys, *options):
    assert train("dpo", "never", *options) == 2
    return capsys.readouterr().err


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def losses(folder):
    return [e["loss"] for e in json.loads((folder / "training.json").read_text())["history"] if "loss" in e]


def logps(folder):
    """The mean log-probs of the first batch by the policy before its first update."""
    history = json.loads((folder / "training.json").read_text())["history"]
    return next(e["logps/chosen"] for e in history if "logps/chosen" in e)


OPTIONS = {
    "dora": (["--lora_r", 2, "--use_dora"], {"use_dora": True, "r": 2}),
    "rslora": (["--use_peft", "--use_rslora", "--lora_alpha", 4], {"use_rslora": True, "r": 16, "lora_alpha": 4}),
    "all-linear": (["--lora_r", 2, "--lora_target_modules", "all-linear"], {"lora_alpha": 4}),
    "list": (["--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj"], {"target_modules": {"q_proj", "v_proj"}}),
    "saved": (["--lora_r", 2, "--modules_to_save", "lm_head", "--lora_dropout", 0.1],
              {"modules_to_save": {"lm_head"}, "lora_dropout": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_lora(case, base, data, tmp_path):
    options, wanted = OPTIONS[case]
    assert train("dpo", tmp_path, "--model", base, "--data", data, *options) == 0
    found = settings(tmp_path)
    assert {n: set(found[n]) if isinstance(wanted[n], set) else found[n] for n in wanted} == wanted
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names - {"weight", "lm_head"} >= (wanted.get("target_modules") or linear)


QUANTISED = {
    "nf4": (["--load_in_4bit", "--use_bnb_nested_quant", "--lora_r", 2], "Linear4bit"),
    "int8": (["--load_in_8bit", "--lora_r", 2], "Linear8bitLt"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights(case, base, data, tmp_path):
    """One step each way: the loss begins at log 2, and the adapter that is left goes on, quantised or not."""
    pytest.importorskip("bitsandbytes")
    from fastpref.commands.train.job import prepare

    options, layer = QUANTISED[case]
    common = ["--model", base, "--data", data, *options]
    assert train("dpo", tmp_path / "out", *common, "--precompute_ref_log_probs", "false") == 0
    found = losses(tmp_path / "out")
    assert found[0] == pytest.approx(0.6931472, abs=1e-5) and found[1] < 0.693
    arguments = [*QUICK, "--output_dir", tmp_path / "again", "--model", tmp_path / "out", "--data", data, *options]
    job = prepare("dpo", [str(a) for a in arguments])
    layers = [type(m).__name__ for m in job.trainer.inner.modules() if "bitsandbytes" in type(m).__module__]
    assert layers.count(layer) == 14
    assert type(job.trainer.inner.lm_head).__name__ == "Linear"
    assert sum(p.requires_grad for p in job.trainer.model.parameters()) == 28
    assert cli.main(["evaluate", "--model", str(tmp_path / "out"), "--reference", base, "--data", data]) == 0


def test_a_quantised_reward_model(base, data, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--model", base, "--data", data, "--load_in_4bit", "--lora_r", 2, "--max_length", 1024]
    assert train("reward", tmp_path, *options) == 0
    assert losses(tmp_path)[1] != losses(tmp_path)[0]


def test_rounds_go_on_from_the_adapter_of_the_one_before(base, data, tmp_path, capsys):
    """The second began at the base model again, with --lora_r, and trained nothing, without."""
    common = ["--data", data, "--precompute_ref_log_probs", "false"]
    first, second, third = (tmp_path / name for name in ("1", "2", "3"))
    assert train("dpo", first, "--model", base, "--lora_r", 2, *common) == 0
    capsys.readouterr()
    assert train("dpo", second, "--model", first, "--lora_r", 2, "--max_steps", 1, *common) == 0
    said = f"Going on with the adapter in {first} (LORA, r = 2) of {base}; the reference is the policy as it is now"
    assert capsys.readouterr().out.count(said) == 1
    assert train("simpo", third, "--model", second, "--data", data, "--max_steps", 1) == 0
    assert "reference" not in capsys.readouterr().out.partition("Going on")[2].splitlines()[0]
    assert losses(first)[1] < 0.69 and losses(second)[0] == pytest.approx(0.6931472, abs=1e-5)
    assert logps(second) != pytest.approx(logps(first), abs=1e-3)
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (first, second, third)]
    for a, b in itertools.pairwise(weights):
        assert all(not torch.equal(a[name], b[name]) for name in a)
        assert all((a[name] - b[name]).abs().max() < 0.03 for name in a)  # a step from there, not from the beginning
    assert settings(third)["base_model_name_or_path"] == base


def test_options_that_would_be_of_another_adapter_are_refused(base, data, tmp_path, capsys):
    assert train("dpo", tmp_path / "1", "--model", base, "--data", data, "--lora_r", 2, "--max_steps", 1) == 0
    model = ["--model", tmp_path / "1", "--data", data]
    assert "lora_r: got 4 with a model that is an adapter with 2, which goes on" in refused(
        capsys, *model, "--lora_r", 4
    )
    assert "use_dora: got True with a model" in refused(capsys, *model, "--use_dora")
    assert "lora_target_modules: got ['q_proj']" in refused(capsys, *model, "--lora_target_modules", "q_proj")
    base = ["--model", base, "--data", data]
    assert "lora_r: got none beside other LoRA options (use_dora)" in refused(capsys, *base, "--use_dora")
    assert "load_in_4bit: got it without adapters, want lora_r" in refused(capsys, *base, "--load_in_4bit")
    assert "load_in_4bit: got none beside" in refused(capsys, *base, "--use_bnb_nested_quant", "--lora_r", 2)
    assert "one of them" in refused(capsys, *base, "--load_in_4bit", "--load_in_8bit", "--lora_r", 2)


def test_a_files_options_by_any_of_their_names(base, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("modules_to_save: [lm_head]\nlora-target-modules: [q_proj]\nlora_r: 2\nmax_steps: 1\n")
    assert train("dpo", tmp_path / "out", "--model", base, "--data", data, "--config", config) == 0
    assert settings(tmp_path / "out")["modules_to_save"] == ["lm_head"]


def test_a_reward_adapter_could_not_be_read_by_any_command(base, data, tmp_path):
    """Unrecognized model: its folder has no config.json. Scores are those of training, to rounding."""
    from fastpref.data.files import load_records
    from fastpref.data.formats import paired
    from fastpref.online import evaluation, loading

    folder = tmp_path / "reward"
    options = ["--model", base, "--data", data, "--lora_r", 2, "--max_length", 1024, "--eval_data", data]
    assert train("reward", folder, *options) == 0
    responses = tmp_path / "responses.jsonl"
    record = {"prompt": [{"role": "user", "content": "Why?"}], "responses": ["Because.", "It is late, I think."]}
    responses.write_text(json.dumps(record) + "\n")
    scored = ["score", "--responses", str(responses), "--output", str(tmp_path / "scores.jsonl")]
    assert cli.main([*scored, "--reward-model", str(folder)]) == 0
    scores = json.loads((tmp_path / "scores.jsonl").read_text())["scores"]
    assert len(scores) == 2 and scores[0] != scores[1]

    report = tmp_path / "report.json"
    assert cli.main(["evaluate", "--reward-model", str(folder), "--data", data, "--json", str(report)]) == 0
    ends = json.loads((folder / "training.json").read_text())["evaluations"]["after"]
    assert json.loads(report.read_text())["margins"]["mean"] == pytest.approx(ends["eval_margin"], abs=1e-5)

    model, tokenizer = loading.load_reward_model(folder)
    merged = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    whole = loading.load_reward_model(tmp_path / "merged")[0]
    records = paired(load_records([data])).to_list()
    found, wanted = (evaluation.evaluate_reward_model(m, tokenizer, records)["rewards"] for m in (model, whole))
    assert found == {side: pytest.approx(value, abs=1e-5) for side, value in wanted.items()}
    with pytest.raises(ValueError, match="got adapters in its layers, want them merged"):
        model.save_pretrained(tmp_path / "no")
    assert train("reward", tmp_path / "on", "--model", folder, *options[2:4], "--max_length", 1024) == 0  # goes on


def test_a_policys_adapter_in_every_command(base, data, tmp_path):
    folder = tmp_path / "policy"
    assert train("dpo", folder, "--model", base, "--data", data, "--lora_r", 2) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)  # PEFT's own save_pretrained leaves none: the base model's is taken
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": [{"role": "user", "content": "Why?"}]}) + "\n")
    responses = tmp_path / "responses.jsonl"
    generate = ["generate", "--model", str(folder), "--prompts", str(prompts), "--output", str(responses), "-k", "2"]
    assert cli.main([*generate, "--max-new-tokens", "3"]) == 0
    implicit = ["--implicit", "--model", str(folder), "--reference", base]
    score = ["score", "--responses", str(responses), "--output", str(tmp_path / "scores.jsonl"), *implicit]
    assert cli.main(score) == 0
    assert any(json.loads((tmp_path / "scores.jsonl").read_text())["scores"])
    assert cli.main(["evaluate", "--model", base, "--reference", str(folder), "--data", data]) == 0
