"""The subclasses of TRL's trainers against TRL's own: the same training, packed and with fewer products."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings

import pytest
import torch

if importlib.util.find_spec("trl") is None or importlib.metadata.version("trl").split(".")[:2] != ["1", "16"]:
    pytest.skip("TRL 1.16 is not installed", allow_module_level=True)

import trl
import trl_hosts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl_hosts import LORA, WIDTH, assert_same, build, operations, train

from fastpref.integrations import trl as fast_trl
from fastpref.integrations import trl_trainers
from fastpref.trainers.forward import scored_hidden

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
CLASSES = {"dpo": "DPOTrainer", "kto": "KTOTrainer", "reward": "RewardTrainer"}


@pytest.fixture
def ours(monkeypatch):
    """`trl_hosts.build` makes our subclasses for the time of `ours()`; they must not have fallen back."""
    own = trl_hosts.trainer_class

    def theirs(method):
        return (trl.RewardTrainer, trl.RewardConfig) if method == "reward" else own(method)

    def use() -> None:
        monkeypatch.setattr(
            trl_hosts, "trainer_class", lambda method: (getattr(fast_trl, CLASSES[method]), theirs(method)[1])
        )

    monkeypatch.setattr(trl_hosts, "trainer_class", theirs)
    return use


def initial(method) -> dict:
    """A reward model with a new head, the same every time; others are what `build` makes."""
    if method != "reward":
        return {}
    torch.manual_seed(3)
    return {"model": AutoModelForSequenceClassification.from_pretrained(trl_hosts.checkpoint(), num_labels=1)}


def both(method, folder, ours, **options):
    """Trained by TRL, and by us."""
    want = train(method, folder / "own", **options, **initial(method))
    ours()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without fastpref|layout:")
        got = train(method, folder / "ours", **options, **initial(method))
    assert len(want.losses) >= 2 and any(g.abs().max() > 0 for g in want.gradients[0].values())
    return got, want


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpo", {"max_steps": 10}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [1.0, 0.5, 2.0], "ld_alpha": 0.5}),
        ("dpo", {"ld_alpha": 0.5, "precompute_ref_log_probs": True}),
        ("dpo", {"use_weighting": True, "f_divergence_type": "js_divergence"}),
        ("dpo", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_length": 7}),
        ("dpo", {"label_smoothing": 0.1}),
        ("dpo", {"pad_to_multiple_of": 16, "truncation_mode": "keep_end", "max_length": 8}),
        ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
        ("kto", {"max_steps": 4}),
        ("kto", {"precompute_ref_log_probs": True}),
        ("kto", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.5}),
        ("kto", {"gradient_accumulation_steps": 2}),
        ("reward", {"max_steps": 4}),
        ("reward", {"center_rewards_coefficient": 0.01, "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_training_is_the_same(method, options, tmp_path, ours):
    assert_same(*both(method, tmp_path, ours, **options))


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_training_with_adapters_is_the_same(method, tmp_path, ours):
    peft = pytest.importorskip("peft")
    task, rate = ("SEQ_CLS", 0.05) if method == "reward" else ("CAUSAL_LM", 1.0)
    assert_same(*both(method, tmp_path, ours, peft=peft.LoraConfig(task_type=task, **LORA), learning_rate=rate))


def test_a_peft_model_keeps_its_adapter_as_the_reference(tmp_path, ours):
    peft = pytest.importorskip("peft")

    def adapted():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(trl_hosts.checkpoint())
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))

    records = []
    for use in (lambda: None, ours):
        use()
        trainer = trl_hosts.trainer_class("dpo")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl_hosts, "trainer_class", lambda method, own=trainer: (without_reference(own[0]), own[1]))
            records.append(train("dpo", tmp_path / str(len(records)), model=adapted(), learning_rate=1.0))
    assert_same(records[1], records[0])


def without_reference(trainer):
    return lambda **options: trainer(**{**options, "ref_model": None})


@pytest.mark.parametrize("loss_type", trl_hosts.loss_types())
def test_each_loss_type(loss_type, tmp_path, ours):
    options = {"label_smoothing": 0.1} if loss_type != "sigmoid" else {}
    got, want = both("dpo", tmp_path, ours, loss_type=[loss_type], max_steps=2, learning_rate=0.005, **options)
    assert_same(got, want)


def batch_of(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2)])
def test_products_and_packing_of_a_dpo_step(frozen, products, tmp_path, ours):
    peft = None
    if frozen:
        peft = pytest.importorskip("peft").LoraConfig(task_type="CAUSAL_LM", **LORA)
    ours()
    trainer = build("dpo", tmp_path, peft=peft, precompute_ref_log_probs=True)
    assert isinstance(trainer, trl.DPOTrainer) and trainer.packing.layout == "shared"
    batch = batch_of(trainer)
    part = batch[trl_trainers.KEY]
    # nothing is padded, and prompts are there once
    prompts = int((batch["attention_mask"] - batch["completion_mask"])[: part["examples"]].sum())
    tokens = int(batch["attention_mask"].sum()) - prompts
    assert part["input_ids"].shape[0] == 1 and 0 < part["input_ids"].shape[1] <= tokens  # responses may begin alike
    own = operations(lambda: scored_hidden(trainer.inner, part).sum().backward())
    for trainer.statistics in ("never", "every"):  # what is measured costs none
        step = operations(lambda: trainer.compute_loss(trainer.model, batch).backward())
        scored = int(batch["completion_mask"].sum())
        assert (step - own) / (2 * WIDTH * trainer.inner.config.vocab_size) == products * scored


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_evaluation_and_metrics_between_logs(method, tmp_path, ours, monkeypatch):
    """Means over two batches, of training and of evaluation; TRL's per-step collectives are one a log."""
    logs, gathers = [], []
    for use in (lambda: None, ours):
        use()
        options = {"logging_steps": 2, "max_steps": 2, "seed": 7, "per_device_eval_batch_size": 2}
        trainer = build(method, tmp_path, **options, **initial(method))
        if use is ours:
            assert trainer.packing is not None
            trainer.statistics = "every"
        gather, calls = trainer.accelerator.gather, []
        trainer.accelerator.gather = lambda value, calls=calls, gather=gather: (calls.append(0), gather(value))[1]
        trainer.train()
        gathers.append(len(calls))
        logs.append([trainer.state.log_history[0], trainer.evaluate(trl_hosts.dataset(method))])
    assert gathers[1] == 1 < gathers[0]
    for found, wanted in zip(logs[1], logs[0], strict=True):
        assert found.keys() == wanted.keys() and len(found) > 5
        for name, value in wanted.items():
            if not any(word in name for word in ("runtime", "per_second")):
                assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-5), name


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])
def test_a_streams_packed_batches_were_cut_into_rows(method, tmp_path, ours):
    """By Accelerate, which hands out a stream's batches itself; TRL keeps it from that in training alone."""
    losses = []
    for use in (lambda: None, ours):
        use()
        trainer = build(method, tmp_path, per_device_eval_batch_size=2, **initial(method))
        losses.append(trainer.evaluate(trl_hosts.dataset(method).to_iterable_dataset())["eval_loss"])
    assert trainer.packing is not None
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_statistics_of_logged_steps(tmp_path, ours):
    ours()
    trainer = build("dpo", tmp_path, logging_steps=2, max_steps=4)
    measured = []
    trainer.add_token_metrics = lambda *args: measured.append(trainer.measuring())
    trainer.train()
    assert measured == [False, True, False, True]


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_what_was_not_tried_stays_with_trl(name, tmp_path, ours, monkeypatch):
    ours()
    trainer = build("dpo", tmp_path)
    del trainer.packing
    monkeypatch.setattr(trainer, name, True)
    with pytest.warns(UserWarning, match=f"without fastpref: {name}: got True, want False"):
        assert trainer.packing is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}, "label_smoothing: got 0.1 with"),
        ({"loss_type": ["ipo"], "truncation_mode": "keep_end"}, "truncation_mode: got 'keep_end'"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "loss_type: got "),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches: got True, want False"),
    ],
    ids=str,
)
def test_what_stays_with_trl(options, reason, tmp_path, ours):
    own = build("dpo", tmp_path, **options)
    ours()
    with pytest.warns(UserWarning, match=f"DPOTrainer computes losses as TRL does, without fastpref: {reason}"):
        trainer = build("dpo", tmp_path, **options)
    batch = batch_of(trainer)
    assert trl_trainers.KEY not in batch
    assert torch.equal(trainer.compute_loss(trainer.model, batch), own.compute_loss(own.model, batch))


def test_a_head_that_is_not_known_stays_with_trl(tmp_path, ours):
    ours()
    model = AutoModelForCausalLM.from_pretrained(trl_hosts.checkpoint())
    model.lm_head.register_forward_hook(lambda layer, inputs, output: output * 1.01)
    with pytest.warns(UserWarning, match="without fastpref: model: got Llama"):
        assert build("dpo", tmp_path, model=model).packing is None


def test_batches_of_other_collators(tmp_path, ours):
    """A padded batch from elsewhere is packed when it comes; outputs are TRL's own."""
    ours()
    trainer = build("dpo", tmp_path)
    batch = batch_of(trainer)
    padded = {name: value for name, value in batch.items() if name != trl_trainers.KEY}
    loss = trainer.compute_loss(trainer.model, padded)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, batch))
    other, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-6)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_completion_masks_with_holes(method, tmp_path, ours):
    """Responses of which parts are not the policy's, from a collator of the user's."""
    own = build(method, tmp_path)
    ours()
    trainer = build(method, tmp_path)
    batch = {name: value for name, value in batch_of(trainer).items() if name != trl_trainers.KEY}
    for name in [name for name in batch if name.endswith("completion_mask")]:
        holes = torch.arange(batch[name].shape[1]) % 3 == 0
        batch[name] = batch[name].masked_fill(holes, 0)
    got, want = (t.compute_loss(t.model, dict(batch)) for t in (trainer, own))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_another_trl_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.8.0")
    with pytest.raises(RuntimeError, match=r"trl: got version 1.8.0, which fastpref does not know; want 1.16.x"):
        _ = fast_trl.DPOTrainer
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainer'"):
        _ = fast_trl.GRPOTrainer


def test_trl_is_imported_when_asked_for():
    code = (
        "import sys, fastpref.integrations.trl as t; assert 'trl' not in sys.modules; t.DPOTrainer; "
        "assert issubclass(t.RewardTrainer, sys.modules['trl'].RewardTrainer)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
