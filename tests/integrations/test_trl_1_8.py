"""`patch()` on TRL 1.8's DPOTrainer and KTOTrainer: for real where FASTPREF_TRL_1_8 names a folder with it, and always
on those of TRL 1.16, which have the methods of 1.8 that the patch replaces."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)

from trl_hosts import Record, assert_same, build, train

from fastpref.integrations import trl as fast_trl
from fastpref.integrations import trl_trainers

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
TRAIN = """
import contextlib, sys, torch, warnings
import trl_hosts, trl
from fastpref.integrations import trl as fast_trl
from datasets import load_from_disk
assert trl.__version__.startswith("1.8.")
warnings.filterwarnings("error", message=".*without fastpref")
method, options, folder = sys.argv[1], eval(sys.argv[2]), sys.argv[3]
for name, patch in (("own", contextlib.nullcontext), ("patched", fast_trl.patched)):
    if "lora" in options:
        import peft
        options["peft"] = peft.LoraConfig(task_type="CAUSAL_LM", **options.pop("lora"))
    trl_hosts.dataset(method).save_to_disk(f"{folder}/{name}-data")  # 1.8 finds no cache of a data set in memory
    data = load_from_disk(f"{folder}/{name}-data")
    trl_hosts.dataset = lambda method: data
    record = trl_hosts.train(method, f"{folder}/{name}", patch=patch, **options)
    torch.save(tuple(record), f"{folder}/{name}.pt")
"""
LORA = {"lora": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}, "learning_rate": 1.0}


def without_logits(record: Record) -> Record:
    """TRL 1.8's KTO sums the logits of prompts and padding, too, whose mean would be another number."""
    return record._replace(logs=[{k: v for k, v in log.items() if "logits/" not in k} for log in record.logs])


@pytest.mark.skipif("FASTPREF_TRL_1_8" not in os.environ, reason="FASTPREF_TRL_1_8 names no folder with TRL 1.8")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "gradient_accumulation_steps": 2}),
        ("dpo", {"precompute_ref_log_probs": True, "use_weighting": True}),
        ("dpo", LORA),
        ("kto", {}),
        ("kto", {"precompute_ref_log_probs": True, "loss_type": "apo_zero_unpaired"}),
    ],
    ids=str,
)
def test_training_is_the_same(method, options, tmp_path):
    here = Path(__file__).parents[1]
    path = os.pathsep.join([os.environ["FASTPREF_TRL_1_8"], str(here), str(here.parent)])
    command = [sys.executable, "-c", TRAIN, method, repr(options), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got, want = (Record(*torch.load(tmp_path / f"{name}.pt")) for name in ("patched", "own"))
    if method == "kto":
        got, want = without_logits(got), without_logits(want)
    assert_same(got, want)


@pytest.fixture
def as_1_8(monkeypatch):
    """TRL 1.16 is taken for 1.8, whose patches make its trainers pack their batches."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.8.0")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_patch_on_a_later_trl(method, tmp_path, as_1_8):
    want = train(method, tmp_path / "own", logging_steps=2, max_steps=4)
    got = train(method, tmp_path / "patched", patch=fast_trl.patched, logging_steps=2, max_steps=4)
    assert_same(got, want)


def test_trainers_of_a_derived_class(tmp_path, as_1_8, monkeypatch):
    """As Axolotl has them: derived before the patch."""
    import trl
    import trl_hosts

    class Derived(trl.DPOTrainer):
        pass

    monkeypatch.setattr(trl_hosts, "trainer_class", lambda method: (Derived, trl.DPOConfig))
    with fast_trl.patched():
        trainer = build("dpo", tmp_path)
        assert type(trainer).__name__ == "Derived" and isinstance(trainer, (Derived, trl_trainers.PackedDPO))
        batch = next(iter(trainer.get_train_dataloader()))
        found = trainer.compute_ref_log_probs(batch)  # 1.8 gives no model
    plain = {name: value for name, value in batch.items() if name != trl_trainers.KEY}
    wanted = trl.DPOTrainer.compute_ref_log_probs(trainer, trainer.ref_model, plain)
    assert len(found) == 2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not isinstance(build("dpo", tmp_path), trl_trainers.PackedDPO)


def test_divergences_without_their_constants_were_divided_by_lengths(monkeypatch):
    """TRL 1.8 leaves out 1 and log 2, which cancel in a difference, but not divided by two lengths."""

    def prepared(version: str, divergence: str) -> None:
        monkeypatch.setattr(trl_trainers.trl, "__version__", version)
        given = types.SimpleNamespace(loss_types=["ipo"], label_smoothing=0.0, f_divergence_type=divergence)
        given._reverse_kl = lambda: trl_trainers.PackedDPO._reverse_kl(given)
        trl_trainers.PackedDPO._prepare_loss(given)

    with pytest.raises(ValueError, match=r"f_divergence_type: got forward_kl with loss_type \['ipo'\]"):
        prepared("1.8.0", "forward_kl")
    for version, divergence in (("1.8.0", "reverse_kl"), ("1.16.0", "forward_kl")):
        with pytest.raises(AttributeError, match="args"):  # further on
            prepared(version, divergence)
