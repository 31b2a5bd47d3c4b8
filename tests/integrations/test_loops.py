"""fastpref in `transformers.Trainer`, Accelerate and plain loops: the loss of a loop over logits, without logits."""

from __future__ import annotations

import copy
import itertools
import runpy
import sys
from pathlib import Path

import pytest
import torch
from support import DEVICE, relative_error

pytest.importorskip("transformers")
from transformers import Trainer, TrainingArguments

import fastpref
from fastpref import models
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import sample_pairs
from fastpref.integrations.transformers import PreferenceLossMixin, batch_loss, pair_batch, reference_logps

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class PairTrainer(PreferenceLossMixin, Trainer):
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    texts = [m["content"] for pair in sample_pairs()[0][:8] for m in pair.prompt + pair.chosen]
    for part in models.tiny(texts):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(checkpoint) -> list:
    _, tokenizer = models.load(checkpoint)
    return tokenize_pairs(sample_pairs()[0][:8], tokenizer, max_length=64)


@pytest.fixture
def model(checkpoint):
    return models.load(checkpoint)[0].to(DEVICE)


def trainer_of(model, data, folder, *, loss_fn, ref_model=None, **options) -> PairTrainer:
    args = TrainingArguments(
        output_dir=str(folder), optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=DEVICE == "cpu", **options,
    )  # fmt: skip
    pad = model.config.pad_token_id
    return PairTrainer(
        model, args, lambda pairs: pair_batch(pairs, pad), data, data[:4], loss_fn=loss_fn, ref_model=ref_model
    )


def loss_over_logits(model, batch, loss_fn, ref_logps=None) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return loss_fn.from_logits(logits, batch["shift_labels"], ref_logps).loss


def on_device(batch: dict) -> dict:
    return {name: value.to(DEVICE) for name, value in batch.items()}


@pytest.mark.parametrize(("size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_an_update_is_that_of_a_loop_over_logits(checkpoint, model, data, tmp_path, size, accumulation, monkeypatch):
    """However 4 pairs are split: by the batch, or by gradient accumulation."""
    expected, reference = models.load(checkpoint)[0].to(DEVICE), models.load(checkpoint)[0].to(DEVICE)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.01)
    loss_fn, batch = fastpref.DPOLoss(beta=0.5), on_device(pair_batch(data[:4], model.config.pad_token_id))
    loss_over_logits(expected, batch, loss_fn, reference_logps(reference, batch)).backward()
    trainer = trainer_of(
        model, data[:4], tmp_path, loss_fn=loss_fn, ref_model=reference, per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation, num_train_epochs=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each in (model, reference):
        monkeypatch.setattr(each.lm_head, "forward", lambda *_: pytest.fail("a head ran"))
    trainer.train()
    for name, p in expected.named_parameters():
        step = (before[name] - dict(model.named_parameters())[name].detach()) / 0.1
        assert relative_error(step, p.grad) < 1e-4, name  # the weights' last bit is 1e-5 of a step


def test_evaluation_and_outputs(model, data, tmp_path):
    loss_fn = fastpref.SimPOLoss()
    trainer = trainer_of(model, data, tmp_path, loss_fn=loss_fn, per_device_eval_batch_size=2)
    batches = [on_device(pair_batch(data[i : i + 2], model.config.pad_token_id)) for i in (0, 2)]
    wanted = sum(loss_over_logits(model.eval(), batch, loss_fn).item() for batch in batches) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-5)
    loss, outputs = trainer.compute_loss(model, batches[0], return_outputs=True)
    assert outputs["loss"] is loss and outputs["margins"].shape == (2,)
    prediction = trainer.predict(data[:4])
    assert prediction.predictions.shape == (4,) == prediction.label_ids.shape  # margins, accuracies


def test_autocast_reaches_the_backbone(model, data, tmp_path):
    trainer = trainer_of(model, data, tmp_path, loss_fn=fastpref.SimPOLoss(), bf16=True)
    batch, seen = on_device(pair_batch(data[:2], model.config.pad_token_id)), []
    wrapped = trainer.accelerator.prepare_model(model)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    loss = trainer.compute_loss(wrapped, batch)
    assert seen == [torch.bfloat16] and loss.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        again = batch_loss(trainer.loss_fn, model, batch).loss
    assert loss.item() == again.item()


@pytest.mark.parametrize("convention", ["labels", "shift_labels"])
def test_labels_of_either_convention(model, data, convention):
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    wanted = batch_loss(fastpref.SimPOLoss(), model, batch).loss.item()
    if convention == "labels":
        shifted = batch.pop("shift_labels")
        batch["labels"] = torch.cat([torch.full_like(shifted[:, :1], -100), shifted[:, :-1]], 1)
    assert batch_loss(fastpref.SimPOLoss(), model, batch).loss.item() == wanted


def test_unpaired_losses(model, data):
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    batch |= {
        "desirable": torch.tensor([True, True, False, False], device=DEVICE),
        "kl": torch.tensor(0.1, device=DEVICE),
        "ref_logps": reference_logps(model, batch) + 1,
    }
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss_fn = fastpref.KTOLoss()
    wanted = loss_fn.from_logits(
        logits, batch["shift_labels"], batch["desirable"], ref_logps=batch["ref_logps"], kl=batch["kl"]
    )
    assert batch_loss(loss_fn, model, batch).loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)


def test_adapters_off_are_the_reference(model, data, tmp_path):
    peft = pytest.importorskip("peft")
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    wanted = reference_logps(model, batch)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(reference_logps(adapted, batch), wanted)
    trainer = trainer_of(adapted, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model="adapters")
    loss = trainer.compute_loss(adapted, batch)
    torch.testing.assert_close(loss, batch_loss(fastpref.DPOLoss(), adapted, batch | {"ref_logps": wanted}).loss)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


def test_what_trains_beside_adapters_was_in_the_reference(model, data, tmp_path):
    peft = pytest.importorskip("peft")
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    wanted = reference_logps(model, batch)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = trainer_of(adapted, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model="adapters")
    with torch.no_grad():
        adapted.base_model.model.model.norm.weight.mul_(1.1)
    assert not torch.equal(reference_logps(adapted, batch), wanted)
    assert torch.equal(trainer._reference_logps(adapted, batch), wanted)


def test_a_reference_with_adapters_of_its_own_lost_them(model, data, tmp_path):
    peft = pytest.importorskip("peft")
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    base = reference_logps(model, batch)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    trainer = trainer_of(model, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model=reference)
    assert not torch.equal(trainer._reference_logps(model, batch), base)


def test_bad_input(model, data, tmp_path):
    with pytest.raises(ValueError, match="ref_model: got 'adapters' with LlamaForCausalLM, want a PeftModel"):
        trainer_of(model, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model="adapters")
    with pytest.raises(TypeError, match="ref_model: got 'peft', want a model, 'adapters' or None"):
        trainer_of(model, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model="peft")
    with pytest.raises(ValueError, match="ref_model: got the model that is trained, want another"):
        trainer_of(model, data, tmp_path, loss_fn=fastpref.DPOLoss(), ref_model=model)
    batch = on_device(pair_batch(data[:2], model.config.pad_token_id))
    del batch["shift_labels"]
    with pytest.raises(ValueError, match="labels: got none in the batch, want `labels` or `shift_labels`"):
        batch_loss(fastpref.SimPOLoss(), model, batch)


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "trainer", "trl_patch"])
def test_examples(name, checkpoint, tmp_path, monkeypatch, capsys):
    if name == "trl_patch":
        pytest.importorskip("trl")
    if name == "trainer":
        pytest.importorskip("peft")
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 25
    monkeypatch.setattr(sys, "argv", [str(script), str(checkpoint), str(tmp_path)])
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if name == "trl_patch":
            from fastpref.integrations import trl as fast_trl

            fast_trl.unpatch()
    printed = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    steps = 3 if name == "trainer" else 4
    assert len(list(itertools.islice(printed, steps))) == steps and "nan" not in "".join(printed)
