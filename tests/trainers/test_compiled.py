"""`torch_compile=True` compiles the backbone, for every length at once, and leaves the head to us."""

from __future__ import annotations

import os

import pytest
import torch
from support_trainers import run
from support_zoo import tiny_model
from torch._dynamo.testing import CompileCounter

from fastpref import models
from fastpref.data.packing import Scored, in_order, pack
from fastpref.models import attention
from fastpref.trainers.forward import scored_hidden
from fastpref.trainers.layout import choose_layout

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """TrainingArguments with torch_compile write environment variables."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(number: int, layout: str, ours: bool):
    """Of other lengths, and as many sequences more."""
    groups = []
    for i in range(2 + number % 2):
        ids = [(7 * i + 5 * n + number) % 90 + 3 for n in range(12 + 4 * number)]
        groups.append([Scored(ids[: 7 + number], 4), Scored(ids[: 5 + number] + ids[9:], 4)])
    found = pack(in_order(groups), layout)
    if not ours:
        found.pop(attention.KWARG, None)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "stablelm"])
def test_five_lengths_are_compiled_once(architecture, checkpointing):
    model = tiny_model(architecture)
    layout, ours = choose_layout(model, "auto")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    wanted = [scored_hidden(model, batch(i, layout, ours)) for i in range(5)]
    counter = CompileCounter()
    models.backbone(model).compile(backend=counter, dynamic=True)
    frames = []
    for i in range(5):
        found = scored_hidden(model, batch(i, layout, ours))
        found.sum().backward()
        frames.append(counter.frame_count)
        torch.testing.assert_close(found, wanted[i], rtol=1e-5, atol=1e-5)
    assert frames[0] > 0 and frames[-1] <= frames[0] + 1


def test_trials_run_what_is_compiled_as_written():
    model = tiny_model("llama")
    counter = CompileCounter()
    models.backbone(model).compile(backend=counter, dynamic=True)
    assert choose_layout(model, "auto") == ("shared", True)
    models.output_head(model)
    assert counter.frame_count == 0
    scored_hidden(model, batch(0, "shared", True))
    assert counter.frame_count > 0


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_compiled_run_is_the_same_run(method, tmp_path):
    options = {"max_steps": 2, "gradient_checkpointing": method == "dpo"}
    want = run(method, tmp_path / "eager", **options)[1]
    trainer, found = run(method, tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **options)
    assert models.backbone(trainer.inner)._compiled_call_impl is not None
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in want], rel=1e-5)


def test_patched_too(tmp_path):
    pytest.importorskip("trl")
    import trl_hosts

    from fastpref.integrations import trl as fast_trl

    want = trl_hosts.train("dpo", tmp_path / "eager", fast_trl.patched, max_steps=2)
    found = trl_hosts.train(
        "dpo", tmp_path / "compiled", fast_trl.patched, max_steps=2, torch_compile=True, torch_compile_backend="eager"
    )
    trl_hosts.assert_same(found, want)
