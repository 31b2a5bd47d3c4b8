"""An evaluation's loss and metrics are those of all its data as one batch, however it is cut into batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from support_trainers import METHODS, config, data_of, pairs, tiny, train

from fastpref import trainers
from fastpref.data.pairs import sample_pairs

CASES = {
    **{name: METHODS[name] for name in ("dpo", "ipo", "kto", "orpo", "cpo", "simpo", "mpo")},
    "apo": (trainers.KTOTrainer, trainers.KTOConfig, {"loss_type": "apo_zero_unpaired"}),
    "simpo-nll": (trainers.CPOTrainer, trainers.CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.5}),
    "aot": (trainers.DPOTrainer, trainers.DPOConfig, {"loss_type": ["aot", "sft"], "loss_weights": [1.0, 0.3]}),
    "ld-mpo": (
        trainers.DPOTrainer, trainers.DPOConfig,
        {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "statistics": "never"},
    ),
    "reward": (trainers.RewardTrainer, trainers.RewardConfig, {"center_rewards_coefficient": 0.1}),
    "prm": (trainers.PRMTrainer, trainers.PRMConfig, {}),
}  # fmt: skip
HEADS = {"reward": ("SequenceClassification", 1), "prm": ("TokenClassification", 2)}


def classifier(case: str):
    auto, labels = HEADS[case]
    model, tokenizer = tiny()
    model.config.num_labels = labels
    torch.manual_seed(1)
    return getattr(transformers, f"AutoModelFor{auto}").from_config(model.config), tokenizer


def solutions(number: int) -> Dataset:
    rows = []
    for i, pair in enumerate(sample_pairs()[0][:number]):
        steps = [message["content"] for message in pair.chosen + pair.rejected][: 1 + i % 2]
        rows.append({"prompt": "What?", "completions": steps, "labels": [j % 2 == 0 for j in range(len(steps))]})
    return Dataset.from_list(rows)


def build(case: str, tmp_path, data=None, **options):
    trainer_class, config_class, more = CASES[case]
    model, tokenizer = classifier(case) if case in HEADS else tiny()
    data = data or (solutions(12) if case == "prm" else data_of(case).select(range(12)))
    if case == "apo":
        data = data_of("kto").select(range(12))
    extra = {}
    if issubclass(config_class, trainers.config.ReferenceConfig):
        extra = {"ref_model": tiny(5)[0]}
        more = more | {"beta": 0.5}
    args = config(config_class, tmp_path, **{**more, "max_length": None if case == "reward" else 120, **options})
    return trainer_class(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **extra
    )


@pytest.mark.parametrize("case", CASES)
def test_evaluation_does_not_depend_on_the_batch_size(case, tmp_path):
    """NLL terms were means of batches' token means; KTO's z0 and the sorted losses were each batch's own."""
    whole = build(case, tmp_path, per_device_eval_batch_size=12).evaluate()
    cut = build(case, tmp_path, per_device_eval_batch_size=5).evaluate()
    skipped = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}
    assert whole.keys() == cut.keys() and "eval_loss" in whole
    for key in whole.keys() - skipped:
        assert cut[key] == pytest.approx(whole[key], rel=2e-6, abs=2e-6), key
    assert math.isfinite(whole["eval_loss"])


@pytest.mark.parametrize("case", ["orpo", "mpo"])
def test_the_loss_of_an_evaluation_is_that_of_training_on_all_of_it(case, tmp_path):
    trainer = build(case, tmp_path, per_device_train_batch_size=12, learning_rate=0.0, max_steps=1, token_budget=200)
    wanted = train(trainer)[0]["loss"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("case", ["dpo", "kto", "reward"])
def test_an_interrupted_evaluation_was_counted_in_the_next(case, tmp_path):
    """Its batches were: means of other weights, and more rewards than records for `compute_metrics`."""

    class Interrupt(transformers.TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = build(case, tmp_path, per_device_eval_batch_size=5)
    wanted = trainer.evaluate()
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    trainer.remove_callback(Interrupt)
    assert {k: v for k, v in trainer.evaluate().items() if "time" not in k and "second" not in k} == {
        k: v for k, v in wanted.items() if "time" not in k and "second" not in k
    }
    if case == "reward":
        assert trainer.predict(pairs(12)).predictions.shape == (12, 2)


def test_rewards_of_an_evaluation_go_to_compute_metrics(tmp_path):
    def compute_metrics(prediction):
        assert prediction.predictions.shape == (12, 2) and not prediction.label_ids.any()
        return {"gap": float(np.mean(prediction.predictions[:, 0] - prediction.predictions[:, 1]))}

    trainer = build("reward", tmp_path, per_device_eval_batch_size=5)
    trainer.compute_metrics = compute_metrics
    found = trainer.evaluate()
    assert found["eval_gap"] == pytest.approx(found["eval_margin"], abs=1e-6)
    scores = trainer.predict(pairs(12)).predictions
    assert scores.shape == (12, 2) and scores.mean() == pytest.approx(found["eval_mean_reward"], abs=1e-6)
