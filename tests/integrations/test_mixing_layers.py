"""Models whose layers carry something from token to token beside attention: patched and in our own trainers, the losses
are TRL's own, which pads."""

from __future__ import annotations

import warnings

import pytest
from support_zoo import tiny_model

pytest.importorskip("trl")

import trl_hosts
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import trainers
from fastpref.integrations import trl as fast_trl


def model(architecture):
    vocab = len(AutoTokenizer.from_pretrained(trl_hosts.checkpoint()))
    return tiny_model(architecture, 6.0, vocab_size=vocab)


def train_ours(folder, architecture):
    args = trainers.DPOConfig(
        str(folder), max_steps=2, per_device_train_batch_size=2, optim="sgd", learning_rate=0.05, use_cpu=True,
        lr_scheduler_type="constant", report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
        bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trainers.DPOTrainer(
        model(architecture), AutoModelForCausalLM.from_pretrained(trl_hosts.checkpoint(seed=1)), args=args,
        train_dataset=trl_hosts.dataset("dpo"),
        processing_class=AutoTokenizer.from_pretrained(trl_hosts.checkpoint()),
    )  # fmt: skip
    assert trainer.data_collator.layout == "padded"
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ["falcon_h1", "lfm2", "mamba2"])
def test_losses_are_those_of_sequences_alone(architecture, tmp_path):
    want = trl_hosts.train("dpo", tmp_path / "own", model=model(architecture), max_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without fastpref")
        found = trl_hosts.train("dpo", tmp_path / "patch", fast_trl.patched, model=model(architecture), max_steps=2)
    trl_hosts.assert_same(found, want)
    assert train_ours(tmp_path / "ours", architecture) == pytest.approx(want.losses, rel=1e-5)
