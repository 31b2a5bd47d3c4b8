"""The demo end to end on a tiny model: it trains as `fastpref train dpo` does, and its comparison is an honest one."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from fastpref import models
from fastpref.commands import cli
from fastpref.commands.demo import comparison
from fastpref.commands.demo import run as demo
from fastpref.common import memory


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: None)


def pairs_file(path) -> str:
    lines = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}],
         "chosen": [{"role": "assistant", "content": f"Yes, {i}."}],
         "rejected": [{"role": "assistant", "content": f"No, not {i}."}]}
        for i in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_it_trains_saves_and_says_where_the_picture_is(tmp_path, capsys) -> None:
    output = tmp_path / "model"
    command = ["demo", "--quick", "--no-validate", "--no-compare", "--steps", "4", "--output", str(output)]
    assert cli.main([*command, "--data", pairs_file(tmp_path / "pairs.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "DPO on 11 pairs" in printed and "held out: 1 records" in printed
    assert f"as a picture: {output / 'summary.png'}" in printed
    assert (output / "summary.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((output / "training.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[-1] < 0.6  # the policy began as the reference
    assert AutoModelForCausalLM.from_pretrained(output).config.vocab_size > 0
    models.load(output)  # and `--model` takes it


def test_bad_data_stops_the_command_with_the_line(tmp_path, capsys) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": []}\n')
    options = ["demo", "--quick", "--no-validate", "--output", str(tmp_path / "model")]
    assert cli.main([*options, "--data", str(data)]) == 2
    assert "fastpref demo: " in capsys.readouterr().err
    assert cli.main([*options, "--data", str(tmp_path / "none")]) == 2
    assert cli.main([*options, "--model", str(tmp_path / "none")]) == 2
    assert "which is no folder" in capsys.readouterr().err


def test_wrong_numerics_stop_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "validate", lambda: False)
    assert cli.main(["demo", "--quick", "--output", str(tmp_path / "model")]) == 1
    assert not (tmp_path / "model" / "model.safetensors").exists()


RUN = comparison.Run("model", None, steps=3, batch_size=4, max_length=64, device="cpu")
TRL = comparison.Result([2.0, 2.0], 1.0, 400 << 20, 0.69)
FASTPREF = comparison.Result([0.5, 1.1], 1.0, 200 << 20, 0.69)


def test_the_table_by_hand(capsys) -> None:
    comparison.show({"trl": TRL, "fastpref": FASTPREF}, RUN)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["TRL", "2.000", "1.00", "x", "400", "MiB", "1.00", "x", "0.690000"],
        ["fastpref", "5.000", "2.50", "x", "200", "MiB", "0.50", "x", "0.690000"],
    ]


def test_another_loss_is_no_comparison(tmp_path, monkeypatch, capsys) -> None:
    """NaN is another loss too."""
    for loss in (0.6901, float("nan")):
        found = {"trl": TRL, "fastpref": replace(FASTPREF, loss=loss)}
        assert not comparison.same_loss(found, "cpu")
        comparison.show(found, RUN)
        assert "NOT the same" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_libraries_train_on_the_same(tmp_path) -> None:
    """In this process; the whole comparison, in processes of their own, is part of `make demo QUICK=1`."""
    pytest.importorskip("trl")
    model = tmp_path / "model"
    for part in models.tiny(["Question? Yes, no, not."]):
        part.save_pretrained(model)
    run = replace(RUN, model=str(model), data=[pairs_file(tmp_path / "pairs.jsonl")])
    found = {library: comparison.train(library, run, str(tmp_path / library)) for library in comparison.LIBRARIES}
    assert comparison.same_loss(found, "cpu")
    assert all(len(result.seconds) == 2 for result in found.values())


def test_a_library_that_stops_is_named_with_its_last_line(tmp_path, monkeypatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="Traceback\nImportError: no trl here\n")
    monkeypatch.setattr(comparison.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(comparison.Failed, match=r"^TRL: ImportError: no trl here$"):
        comparison.train_in_process("trl", RUN, str(tmp_path))
