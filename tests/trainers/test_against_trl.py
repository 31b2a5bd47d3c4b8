"""Fifty steps beside TRL's own trainers: the same losses on the same data, in fp32."""

import importlib
import os
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from fastpref import models, trainers
from fastpref.data.pairs import sample_pairs

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed")

STEPS = 50
LOSS, DRIFT = 1e-4, 1e-5  # of one step; of the mean over all


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer on disk: TRL loads its reference from there."""
    pairs = sample_pairs()[0]
    model, tokenizer = models.tiny([m["content"] for pair in pairs for messages in pair for m in messages])
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    reward.save_pretrained(path / "reward")
    tokenizer.save_pretrained(path / "reward")
    return path


def pairs_dataset(plain: bool = False) -> Dataset:
    rows = [pair._asdict() for pair in sample_pairs()[0][:60]]
    if plain:
        rows = [{n: m[-1]["content"][:120] + (" " if n == "prompt" else "") for n, m in r.items()} for r in rows]
    return Dataset.from_list(rows)


def losses(trainer_class, config_class, model, tmp_path, dataset, **options) -> list[float]:
    from transformers import AutoTokenizer

    args = config_class(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=5e-4, logging_steps=1,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, max_length=160,
        gradient_checkpointing=False, seed=7, **options,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(model=load(model), args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load(path: str):
    from transformers import AutoModelForCausalLM

    kind = AutoModelForSequenceClassification if path.endswith("reward") else AutoModelForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32)


def theirs(method: str, kind: str):
    if hasattr(trl, f"{method}{kind}"):
        return getattr(trl, f"{method}{kind}")
    return getattr(importlib.import_module(f"trl.experimental.{method.lower()}"), f"{method}{kind}")


CASES = {
    "dpo": ("DPO", {}),
    "dpo online reference": ("DPO", {"precompute_ref_log_probs": False}),
    "dpo plain text": ("DPO", {}),
    "mpo": ("DPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.1]}),
    "ipo": ("DPO", {"loss_type": ["ipo"]}),
    "ld-dpo": ("DPO", {"ld_alpha": 0.5}),
    "kto": ("KTO", {}),
    "reward": ("Reward", {"center_rewards_coefficient": 0.01}),
    "orpo": ("ORPO", {}),
    "cpo": ("CPO", {}),
    "simpo": ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_trl(case, folder, tmp_path):
    method, options = CASES[case]
    model = str(folder / "reward") if method == "Reward" else str(folder)
    dataset = pairs_dataset(plain="plain" in case)
    run = {"model": model, "tmp_path": tmp_path, "dataset": dataset}
    wanted = losses(theirs(method, "Trainer"), theirs(method, "Config"), **run, **options)
    if method in ("DPO", "KTO"):
        options = options | {"reference_cache": str(tmp_path / "cache")}
    ours = [getattr(trainers, f"{method}{kind}") for kind in ("Trainer", "Config")]
    found = losses(*ours, **run, **options)
    unshared = losses(*ours, **run, **options, layout="padded")
    assert len(found) == len(wanted) == STEPS
    for one in (found, unshared):
        differences = torch.tensor(one) - torch.tensor(wanted)
        assert float(differences.abs().max()) <= LOSS
        assert abs(float(differences.mean())) <= DRIFT
    assert wanted[0] != pytest.approx(wanted[-1], abs=10 * LOSS), "nothing was learnt: the comparison says nothing"
