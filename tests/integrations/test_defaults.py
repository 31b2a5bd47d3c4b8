"""What a newcomer runs first: a trainer of TRL under the patch, a subclass of it or one of ours, with nothing set but
the CPU: bf16, gradient checkpointing. Then once more, and a second trainer on the same model object."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings

import pytest
import torch

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)

import transformers
import trl_hosts
from trl_hosts import checkpoint, dataset, reward

from fastpref import trainers
from fastpref.integrations import trl as fast_trl

SAMPLED = {"max_completion_length": 6}  # on the tiny model, of random tokens, 256 are seconds
PATCHED = {
    "dpo": {}, "kto": {}, "reward": {}, "cpo": {}, "orpo": {}, "sft": {}, "grpo": SAMPLED, "rloo": SAMPLED,
    "online_dpo": {"max_new_tokens": 6},
}  # fmt: skip
OURS = ("DPO", "IPO", "KTO", "CPO", "SimPO", "ORPO", "Reward", "PRM")


@pytest.fixture(autouse=True)
def _left_as_it_was():
    with warnings.catch_warnings():
        # transformers' of its own names; of a trainer that fell back to TRL's code there must be none
        for category in (FutureWarning, DeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("error", message=".*(as TRL does|as without fastpref|is not packed)")
        yield
    fast_trl.unpatch()


def model_for(method: str) -> torch.nn.Module:
    kind = {
        "reward": transformers.AutoModelForSequenceClassification,
        "prm": transformers.AutoModelForTokenClassification,
    }.get(method, transformers.AutoModelForCausalLM)
    options = {"reward": {"num_labels": 1}, "prm": {"num_labels": 2}}.get(method, {})
    return kind.from_pretrained(checkpoint(), **options)


def trains_again_and_again(trainer_class, config_class, method, folder, options) -> list:
    """The two trainers, after two runs of each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint())
    extra = {"reward_funcs": reward} if method in ("grpo", "rloo", "online_dpo") else {}
    data = dataset(method).select(range(1 if method == "grpo" else 4))
    model, found = model_for(method), []
    for _ in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        args = config_class(str(folder), use_cpu=True, **options)
        assert args.bf16 and args.gradient_checkpointing
        trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer, **extra)
        for _ in range(2):
            assert math.isfinite(trainer.train().training_loss)
        assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        found.append(trainer)
    return found


@pytest.mark.parametrize("method", PATCHED)
def test_trl_under_the_patch(method, tmp_path) -> None:
    fast_trl.patch()
    for trainer in trains_again_and_again(*trl_hosts.trainer_class(method), method, tmp_path, PATCHED[method]):
        if method in ("dpo", "kto"):
            assert trainer.packing is not None
        elif method in ("cpo", "orpo", "online_dpo"):
            assert trainer._fastpref


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward"])
def test_subclasses_of_trls(name, tmp_path) -> None:
    config_class = trl_hosts.trainer_class(name.lower())[1]
    found = trains_again_and_again(getattr(fast_trl, f"{name}Trainer"), config_class, name.lower(), tmp_path, {})
    assert all(trainer.packing is not None for trainer in found)


@pytest.mark.parametrize("name", OURS)
def test_our_trainers(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainer_class, config_class = (getattr(trainers, f"{name}{what}") for what in ("Trainer", "Config"))
    trains_again_and_again(trainer_class, config_class, name.lower(), tmp_path / "out", {})
