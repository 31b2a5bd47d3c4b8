"""RLOO and GRPO beside TRL 1.16's on the same responses: losses, gradients and metrics of two updates."""

from __future__ import annotations

import itertools
import os
import warnings

import pytest
import torch
from support_rl import QUIET, Gradients, Script, length_reward, prompts, scripted, train, vowel_reward
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import models, trainers
from fastpref.data.pairs import sample_pairs

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
trl = pytest.importorskip("trl", reason="TRL is not installed")

LOSS, GRADIENT = 1e-6, 1e-5
TERMS = {"vespo": 7.0, "cispo": 7.0}  # their losses are sums of log-probs, of this size here; of others, of ratios
OLD = {"num_iterations": 2, "beta": 0.04}  # the second update is off-policy
CASES = {
    "rloo": ("RLOO", {"num_iterations": 2}),
    "rloo clipped, normalised": ("RLOO", {"num_iterations": 2, "epsilon": 0.01, "normalize_advantages": True,
                                          "reward_clip_range": (0.0, 2.0), "beta": 0.0}),
    "dapo": ("GRPO", OLD),
    "dapo, accumulated": ("GRPO", {"beta": 0.04, "gradient_accumulation_steps": 2, "steps_per_generation": 2}),
    "grpo": ("GRPO", OLD | {"loss_type": "grpo", "use_bias_correction_kl": False,
                             "temperature": 1.7}),
    "bnpo": ("GRPO", OLD | {"loss_type": "bnpo", "scale_rewards": "batch", "reward_weights": None,
                             "entropy_coef": 0.01}),
    "dr_grpo": ("GRPO", {"num_iterations": 2, "loss_type": "dr_grpo", "scale_rewards": False, "delta": 1.01}),
    "gspo": ("GRPO", OLD | {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 1e-4}),
    "cispo": ("GRPO", OLD | {"loss_type": "cispo", "epsilon_high": 1.0}),
    "sapo": ("GRPO", OLD | {"loss_type": "sapo", "multi_objective_aggregation": "normalize_then_sum"}),
    "luspo": ("GRPO", OLD | {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "vespo": ("GRPO", OLD | {"loss_type": "vespo", "mask_truncated_completions": True}),
    "most uncertain tokens": ("GRPO", OLD | {"top_entropy_quantile": 0.3, "off_policy_mask_threshold": 0.001}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and its tokenizer on disk: TRL loads its reference from there."""
    model, tokenizer = models.tiny([m["content"] for pair in sample_pairs()[0] for ms in pair for m in ms])
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def theirs(method, folder, tmp_path, options, monkeypatch):
    rounds = itertools.count()

    def generated(self, prompt_ids, *args, **kwargs):
        k, first = self.num_generations, next(rounds) * len(prompt_ids) // self.num_generations
        found = [scripted((first + i // k, i % k), self._tokenizer.eos_token_id, self.max_completion_length).ids
                 for i in range(len(prompt_ids))]  # fmt: skip
        return (found, None) if method == "GRPO" else found

    trainer_class = getattr(trl, f"{method}Trainer")
    monkeypatch.setattr(trainer_class, "_generate_single_turn", generated)
    module = __import__(trainer_class.__module__, fromlist=["shuffle_sequence_dict"])
    monkeypatch.setattr(module, "shuffle_sequence_dict", lambda batch: batch)
    return run(trainer_class, getattr(trl, f"{method}Config"), folder, tmp_path, options)


def run(trainer_class, config_class, folder, tmp_path, options, **more):
    options = {
        "reward_weights": [1.0, 0.5],
        "seed": 7,
        "disable_dropout": True,
        "optim": "sgd",
        "learning_rate": 1e-3 if "RLOO" in config_class.__name__ else 3e-2,
    } | options
    functions = [length_reward] if options["reward_weights"] is None else [length_reward, vowel_reward]
    gradients = Gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), functions,
            args=config_class(output_dir=str(tmp_path / "out"), **(QUIET | options)), train_dataset=prompts(),
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[gradients], **more,
        )  # fmt: skip
    return train(trainer), gradients.found


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_trl(case, folder, tmp_path, monkeypatch):
    method, options = CASES[case]
    wanted, wanted_gradients = theirs(method, folder, tmp_path, options, monkeypatch)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    found, gradients = run(
        getattr(trainers, f"{method}Trainer"), getattr(trainers, f"{method}Config"), folder, tmp_path,
        options | {"vllm_importance_sampling_correction": False}, sampler=Script(end),
    )  # fmt: skip
    assert {"reward", "reward_std", "completions/mean_length", "entropy"} <= found[0].keys()
    for one, other in zip(found, wanted, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=LOSS * TERMS.get(case, 1.0), rel=0)
        shared = one.keys() & other.keys() - {"step_time", "loss", "epoch"}
        assert not {n for n in other if n not in one}, "a metric of TRL is missing"
        for name in shared:
            assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-4), name
    largest = max(float(g.abs().max()) for update in wanted_gradients for g in update.values())
    assert largest > 1e-4, "nothing was learnt: the comparison says nothing"
    for one, other in zip(gradients, wanted_gradients, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.allclose(one[name], other[name], atol=GRADIENT * largest, rtol=GRADIENT), name
