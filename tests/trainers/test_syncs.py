"""No training step waits for the device because of fastpref: counted over forward, backward and optimizer."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import warnings

import pytest
import torch
from accelerate.utils import send_to_device
from counting import Operators, Watch
from support_rl import QUIET, length_reward, prompts
from support_trainers import METHODS, config, data_of, pairs, tiny, train
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, TrainerCallback

import fastpref
from fastpref import trainers
from fastpref.common import memory
from fastpref.trainers import rollouts

TRL = importlib.util.find_spec("trl") is not None and importlib.metadata.version("trl").startswith("1.16.")
HOSTS = {
    ("to", "transformers/trainer.py"): "_prepare_input, of batches that are on the device",
    ("to", "transformers/models/llama/modeling_llama.py"): "a buffer to the device that it is on",
    ("to", "accelerate/accelerator.py"): "clip_grad_norm_: norms to the device of the first of them",
}
TRLS = HOSTS | {
    ("_local_scalar_dense", "transformers/trainer.py"): "is the loss NaN? logging_nan_inf_filter, of TRL's arguments",
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class WatchSteps(TrainerCallback):
    """From the beginning of each update to its end."""

    def __init__(self, watch: Watch, first: int = 0) -> None:
        self.watch, self.steps, self.first = watch, 0, first

    def on_step_begin(self, args, state, *_, **kwargs) -> None:
        if state.global_step >= self.first:
            self.watch.start()

    def on_step_end(self, *args, **kwargs) -> None:
        if self.watch.on:
            self.watch.stop()
            self.steps += 1


def assert_nothing_waits(trainer, monkeypatch, hosts=HOSTS, first: int = 0) -> Operators:
    watch = Watch(monkeypatch)
    steps = WatchSteps(watch, first)
    trainer.add_callback(steps)
    train(trainer)
    assert steps.steps == 2 and sum(watch.operators.launches.values()) > 100
    assert watch.ours == []
    assert {(event.what, event.file) for event in watch.operators.waits if not event.ours} <= hosts.keys()
    return watch.operators


def trainer_of(method: str, tmp_path, **options):
    trainer_class, config_class, more = METHODS[method]
    model, tokenizer = tiny()
    args = config(config_class, tmp_path, max_steps=2, **more, **options)
    return trainer_class(model=model, args=args, train_dataset=data_of(method), processing_class=tokenizer)


# the configurations' own precision and checkpointing; parts of a batch; every step measures entropies or none does
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {"bf16": True, "gradient_checkpointing": True}),
        ("dpo", {"precompute_ref_log_probs": False, "token_budget": 200, "statistics": "never"}),
        ("dpo", {"ld_alpha": 0.5, "use_weighting": True, "statistics": "never"}),
        ("ipo", {"statistics": "never", "layout": "packed"}),
        ("kto", {"statistics": "never", "precompute_ref_log_probs": False}),
        ("orpo", {}),
        ("cpo", {"statistics": "never"}),
        ("simpo", {"gradient_accumulation_steps": 2, "statistics": "never"}),
    ],
    ids=str,
)
def test_policy_trainers(method, options, tmp_path, monkeypatch):
    assert_nothing_waits(trainer_of(method, tmp_path, **options), monkeypatch)


@pytest.mark.parametrize(("method", "options"), [("dpo", {"token_budget": 200}), ("kto", {})], ids=str)
def test_a_batch_is_copied_from_pinned_memory_while_the_device_works(method, options, tmp_path, monkeypatch):
    """All of it, and before a step begins, which is when the watch starts."""
    trainer_class, config_class, more = METHODS[method]
    model, tokenizer = tiny()
    args = config(config_class, tmp_path, **more, **options)
    args.dataloader_pin_memory = True  # the default, which transformers takes back on a CPU
    trainer = trainer_class(model, args=args, train_dataset=data_of(method), processing_class=tokenizer)
    loader = trainer.get_train_dataloader()
    assert loader.pin_memory and loader._non_blocking
    pinned, copied = set(), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.add(self.data_ptr()) or self)

    def to(self, *_, non_blocking=False, **__):
        copied.append((self.data_ptr() in pinned, non_blocking))
        return self

    batch = pin_memory(trainer.data_collator(trainer.train_dataset.to_list()[:4]))
    monkeypatch.setattr(torch.Tensor, "to", to)
    send_to_device(batch, torch.device("cuda"), non_blocking=True)
    assert len(copied) > 10 and set(copied) == {(True, True)}


def test_distillation(tmp_path, monkeypatch):
    model, tokenizer = tiny()
    args = config(trainers.DistillationConfig, tmp_path, max_steps=2, lmbda=0.0, beta=0.5)
    trainer = trainers.DistillationTrainer(model, tiny(1)[0], args, pairs(), processing_class=tokenizer)
    assert_nothing_waits(trainer, monkeypatch)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("RLOO", {"beta": 0.1, "kl_estimator": "exact"}),
        ("GRPO", {"beta": 0.1, "entropy_coef": 0.01, "off_policy_mask_threshold": 0.5, "top_entropy_quantile": 0.5}),
    ],
    ids=str,
)
def test_updates_on_samples(method, options, tmp_path, monkeypatch):
    """Sampling waits for the samples, in the first of four steps. What is learnt from them later does not."""
    model, tokenizer = tiny()
    options = QUIET | {"max_steps": 4, "num_iterations": 2, "steps_per_generation": 2} | options
    args = getattr(trainers, f"{method}Config")(output_dir=str(tmp_path), **options)
    trainer = getattr(trainers, f"{method}Trainer")(model, length_reward, args, prompts(), processing_class=tokenizer)
    assert_nothing_waits(trainer, monkeypatch, first=2)


def test_samples_are_copied_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: (self, device, non_blocking))
    values, device, non_blocking = rollouts._sent(torch.ones(3), "cuda")
    assert values is pinned[0] and device == "cuda" and non_blocking


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_groups_of_units_whose_logits_do_not_fit(method, tmp_path, monkeypatch):
    trainer = trainer_of(method, tmp_path, statistics="never")
    operator = {"dpo": "linear_paired_loss", "kto": "linear_unpaired_loss"}[method]
    rows = max(sum(part["sizes"]) for part in trainer.data_collator(trainer.train_dataset.to_list()[:4])["parts"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 * rows * 4 * trainer.model.config.vocab_size // 2)
    assert operator in assert_nothing_waits(trainer, monkeypatch).of_fastpref


def test_rewards_and_steps(tmp_path, monkeypatch):
    model, tokenizer = tiny()
    classifier = AutoModelForSequenceClassification.from_config(_labelled(model.config, 1))
    args = config(trainers.RewardConfig, tmp_path, max_steps=2)
    rewards = pairs().map(lambda row, i: {"margin": float(i)}, with_indices=True)
    assert_nothing_waits(
        trainers.RewardTrainer(classifier, args, train_dataset=rewards, processing_class=tokenizer), monkeypatch
    )
    rows = [{"prompt": "Two and two?", "completions": ["Four.", "Five."], "labels": [True, False]}] * 8
    from datasets import Dataset

    classifier = AutoModelForTokenClassification.from_config(_labelled(model.config, 2))
    args = config(trainers.PRMConfig, tmp_path, max_steps=2)
    trainer = trainers.PRMTrainer(classifier, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    assert_nothing_waits(trainer, monkeypatch)


@pytest.mark.parametrize("loss", ["plackett_luce", "davidson"])
def test_rankings(loss, tmp_path, monkeypatch):
    """DPO in parts whose logits do not fit, and reward models: the host knows the lists' sizes and their pairs."""
    data = pairs().map(
        lambda row: {"responses": [row["chosen"], row["rejected"], row["chosen"][:1]], "ranks": [0, 1, 1]},
        remove_columns=["chosen", "rejected"],
    )
    model, tokenizer = tiny()
    args = config(trainers.RewardConfig, tmp_path, max_steps=2, ranking_loss=loss, center_rewards_coefficient=0.1)
    classifier = AutoModelForSequenceClassification.from_config(_labelled(tiny()[0].config, 1))
    assert_nothing_waits(
        trainers.RewardTrainer(classifier, args, train_dataset=data, processing_class=tokenizer), monkeypatch
    )
    args = config(trainers.DPOConfig, tmp_path, max_steps=2, loss_type=loss, statistics="never", layout="packed")
    trainer = trainers.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    rows = max(sum(part["sizes"]) for part in trainer.data_collator(trainer.train_dataset.to_list()[:4])["parts"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 4 * rows * 4 * trainer.model.config.vocab_size // 2)
    assert "linear_list_loss" in assert_nothing_waits(trainer, monkeypatch).of_fastpref


def _labelled(model_config, labels: int):
    model_config.num_labels = labels
    return model_config


@pytest.mark.skipif(not TRL, reason="TRL 1.16 is not installed")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trl_under_the_patch(method, tmp_path, monkeypatch):
    import trl_hosts

    from fastpref.integrations import trl as fast_trl

    with fast_trl.patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = trl_hosts.build(method, tmp_path, max_steps=2)
        assert_nothing_waits(trainer, monkeypatch, TRLS)


def test_the_watch_sees_what_waits(monkeypatch):
    watch, x = Watch(monkeypatch), torch.randn(5)
    with watch as operators:
        reduced = functools.partial(torch.segment_reduce, x, "sum", lengths=torch.tensor([2, 3]))  # checks the lengths
        for wait in (x.nonzero, x.sum().item, x.tolist, x.cpu, lambda: x[x > 0], lambda: x.to("cpu"), reduced):
            before = len(operators.waits)
            wait()
            assert len(operators.waits) == before + 1
        x.to("cpu", non_blocking=True), x.to(torch.float64), x[torch.tensor([1])], x.repeat_interleave(2)
        reduced(unsafe=True)
        assert len(operators.waits) == 7
        fastpref.linear_token_logprobs(x[None], torch.randn(7, 5), torch.tensor([1]))
    assert [event.what for event in watch.ours] == ["nonzero"]
