"""Pairs about images: the losses of TRL 1.16, what runs once, and bad images that name their record."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from support_vision import FAMILIES, one_sequence, own_logps, picture, records
from transformers import TrainerCallback

from fastpref import RewardHead
from fastpref.integrations import trl_trainers
from fastpref.trainers import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SimPOConfig,
    SimPOTrainer,
)

STEPS = 3


def options(**more: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 1e-3, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "bf16": False, "disable_tqdm": True,
        "gradient_checkpointing": True,
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", **more,
    }  # fmt: skip


def logs(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def check_against(wanted: list[dict[str, float]], found: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    assert len(wanted) == len(found) == STEPS
    for theirs, ours in zip(wanted, found, strict=True):
        assert set(theirs) <= set(ours)
        for name in ("loss", "logps/chosen", "logps/rejected", "entropy", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], abs=tolerance, rel=1e-5), name


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3n"])
def test_dpo_has_the_losses_of_trl(family, tmp_path):
    model, processor = FAMILIES[family]()
    dataset = Dataset.from_list(records())
    theirs = trl.DPOTrainer(
        copy.deepcopy(model), copy.deepcopy(model), trl.DPOConfig(str(tmp_path / "trl"), **options()),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    patched = trl_trainers.DPOTrainer(
        copy.deepcopy(model), copy.deepcopy(model), trl.DPOConfig(str(tmp_path / "patched"), **options()),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    patched.statistics = "every"
    ours = DPOTrainer(
        model, args=DPOConfig(str(tmp_path / "ours"), reference_cache=str(tmp_path / "cache"), **options()),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    assert ours.data_collator.layout == patched.data_collator.layout == "shared"
    wanted = logs(theirs)
    check_against(wanted, logs(ours))
    check_against(wanted, logs(patched))


TRAINED = {  # what trains: LoRA's target modules, or all but the tower
    "lora on the language part": r".*language_model.*\.(q_proj|v_proj)",
    "lora on all": "all-linear",
    "frozen tower": None,
}


@pytest.mark.parametrize("what", TRAINED)
def test_parts_train_as_in_trl(what, tmp_path):
    model, processor = FAMILIES["qwen2_vl"]()
    if TRAINED[what] is None:
        model.model.visual.requires_grad_(False)
    dataset = Dataset.from_list(records())
    found = []
    for trainer, config in ((trl.DPOTrainer, trl.DPOConfig), (DPOTrainer, DPOConfig)):
        more: dict[str, Any] = {"reference_cache": str(tmp_path / "cache")} if config is DPOConfig else {}
        args = config(str(tmp_path / "out"), **options(learning_rate=1e-2, **more))
        peft_config = None
        if TRAINED[what] is not None:
            peft_config = LoraConfig(target_modules=TRAINED[what], r=4, init_lora_weights=True, task_type="CAUSAL_LM")
        theirs = trainer is trl.DPOTrainer and peft_config is None
        torch.manual_seed(0)
        one = trainer(
            copy.deepcopy(model), copy.deepcopy(model) if theirs else None, args, train_dataset=dataset,
            processing_class=processor, peft_config=peft_config,
        )  # fmt: skip
        torch.manual_seed(0)
        for name, parameter in one.model.named_parameters():  # the two draw their factors in different orders
            if "lora_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
        found.append(logs(one))
        moved = {name for name, p in one.model.named_parameters() if not torch.equal(p, before[name])}
        assert any("language_model" in name for name in moved)
        assert any(".visual." in name for name in moved) == (what == "lora on all")
    check_against(*found)


def singles() -> Dataset:
    """Single responses, bad and good ones in turn."""
    rows = [
        {"images": r["images"], "prompt": r["prompt"], "completion": r["chosen" if good else "rejected"], "label": good}
        for r, good in zip(records(), [False, True] * 3, strict=True)
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3n"])
def test_kto_has_the_losses_of_trl(family, tmp_path):
    model, processor = FAMILIES[family]()
    dataset, more = singles(), options(per_device_train_batch_size=2)
    theirs = trl.KTOTrainer(
        copy.deepcopy(model), copy.deepcopy(model), trl.KTOConfig(str(tmp_path / "trl"), **more),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    ours = KTOTrainer(
        model, args=KTOConfig(str(tmp_path / "ours"), precompute_ref_log_probs=False, **more),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    patched = trl_trainers.KTOTrainer(
        copy.deepcopy(model), copy.deepcopy(model), trl.KTOConfig(str(tmp_path / "patched"), **more),
        train_dataset=dataset, processing_class=processor,
    )  # fmt: skip
    wanted, found = logs(theirs), logs(ours)
    check_against(wanted, found)
    check_against(wanted, logs(patched))
    assert [e["kl"] for e in found] == pytest.approx([e["kl"] for e in wanted], abs=1e-4)


def test_the_patch_has_the_losses_of_trl_without_mismatched_completions(tmp_path):
    model, processor = FAMILIES["llava"]()
    found = []
    for home in (trl, trl_trainers):
        args = trl.KTOConfig(str(tmp_path / home.__name__), **options(loss_type="apo_zero_unpaired"))
        trainer = home.KTOTrainer(
            copy.deepcopy(model), copy.deepcopy(model), args, train_dataset=singles(), processing_class=processor
        )
        found.append(logs(trainer))
    check_against(*found)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3n"])
def test_an_image_and_a_prompt_run_once_for_a_pair(family, tmp_path):
    model, processor = FAMILIES[family]()
    images = 1 + 1 + 2 + 0 + 1 + 2
    counts = {"images": 0, "tokens": 0}
    tower = model.model.visual if family == "qwen2_vl" else model.model.vision_tower

    def pixels(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs["grid_thw"] if family == "qwen2_vl" else kwargs.get("pixel_values", args[0] if args else None)
        counts["images"] += len(given)

    def tokens(module: Any, args: Any, kwargs: Any) -> None:
        counts["tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    trainer = DPOTrainer(
        model, args=DPOConfig(str(tmp_path), reference_cache=str(tmp_path / "cache"), **options()),
        train_dataset=Dataset.from_list(records()), processing_class=processor,
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    hooks = [
        tower.register_forward_pre_hook(pixels, with_kwargs=True),
        model.model.language_model.register_forward_pre_hook(tokens, with_kwargs=True),
    ]
    trainer.train()
    for hook in hooks:
        hook.remove()
    once, twice = (trainer.data_collator(some)["parts"][0] for some in (rows, rows + rows))
    for name in ("input_ids", "position_ids"):  # examples of one image and prompt are one tree
        assert torch.equal(once[name], twice[name])
    for name, value in once["vision"].items():
        assert torch.equal(value, twice["vision"][name])
    separate = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    assert counts["images"] == images  # of 2 * images in separate sequences
    assert counts["tokens"] <= sum(r["length"] for r in rows)  # responses may begin alike, too
    assert counts["tokens"] < 0.8 * separate


def expected(model: Any, processor: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the methods without a reference take of each pair, from the model's own logits."""
    found = {side: [own_logps(model, processor, r, side) for r in rows] for side in ("chosen", "rejected")}
    sums = {side: torch.stack([response.sum() for _, response in both]) for side, both in found.items()}
    means = {f"{side}_mean": torch.stack([response.mean() for _, response in both]) for side, both in found.items()}
    chosen = [torch.cat(both) for both in found["chosen"]]
    return sums | means | {"nll": -torch.cat(chosen).mean()}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3n"])
def test_methods_without_a_reference_have_the_losses_of_the_models_own_logits(family, tmp_path):
    model, processor = FAMILIES[family]()
    rows = records(2) if family == "llava" else [records()[i] for i in (2, 3)]
    own = expected(model, processor, rows)
    config = {
        "output_dir": str(tmp_path), "processing_class": processor, "train_dataset": Dataset.from_list(rows),
    }  # fmt: skip

    def first(trainer: Any, config_class: Any, **more: Any) -> dict[str, float]:
        args = config_class(config["output_dir"], **options(max_steps=1, **more))
        return logs(
            trainer(copy.deepcopy(model), args=args, train_dataset=config["train_dataset"], processing_class=processor)
        )[0]

    margin = own["chosen_mean"] - own["rejected_mean"]
    odds = margin - (torch.log1p(-own["chosen_mean"].exp()) - torch.log1p(-own["rejected_mean"].exp()))
    wanted = own["nll"] - 0.1 * torch.nn.functional.logsigmoid(odds).mean()
    assert first(ORPOTrainer, ORPOConfig, beta=0.1)["loss"] == pytest.approx(float(wanted), abs=1e-4)
    wanted = -torch.nn.functional.logsigmoid(2.0 * margin - 0.5).mean()
    assert first(SimPOTrainer, SimPOConfig, beta=2.0, simpo_gamma=0.5)["loss"] == pytest.approx(float(wanted), abs=1e-4)
    found = first(CPOTrainer, CPOConfig)
    assert found["logps/chosen"] == pytest.approx(float(own["chosen"].mean()), abs=1e-3)
    assert found["logps/rejected"] == pytest.approx(float(own["rejected"].mean()), abs=1e-3)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3n"])
def test_rewards_are_those_of_transformers_own_forward(family, tmp_path):
    model, processor = FAMILIES[family]()
    model.save_pretrained(tmp_path / "policy")
    processor.tokenizer.save_pretrained(tmp_path / "policy")
    rows = records(2)
    trainer = RewardTrainer(
        str(tmp_path / "policy"), args=RewardConfig(str(tmp_path / "out"), **options(max_steps=1)),
        train_dataset=Dataset.from_list(rows), processing_class=processor,
    )  # fmt: skip
    assert trainer.data_collator.layout == "shared"
    scores = []
    whole = trainer.model
    for side in ("chosen", "rejected"):
        for row in rows:
            inputs = one_sequence(processor, row, side)[0]
            with torch.no_grad():
                scores.append(whole.eval()(**inputs).logits[0, 0])
    chosen, rejected = torch.stack(scores).view(2, -1)
    found = logs(trainer)[0]
    assert found["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(chosen - rejected).mean()), abs=1e-5)
    assert found["mean_reward"] == pytest.approx(float(torch.cat([chosen, rejected]).mean()), abs=1e-5)
    trainer.save_model(str(tmp_path / "reward"))
    again = RewardHead.from_pretrained(tmp_path / "reward")
    torch.testing.assert_close(again.score.weight, whole.score.weight)


def broken(change: str) -> tuple[list[dict[str, Any]], str]:
    rows = records(2)
    for row in rows:  # as a data file has them
        row["images"] = [{"bytes": None, "path": path} for path in ("there.png",)]
    match change:
        case "missing":
            rows[1]["images"][0]["path"] = "not-there.png"
            return rows, "record 2: images: got '.*not-there.png', want a file that exists"
        case "broken":
            rows[1]["images"][0]["path"] = "broken.png"
            return rows, "record 2: images: got '.*broken.png', want an image that can be read"
        case "fewer":
            rows[1]["prompt"][0]["content"] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
            rows[0]["prompt"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "?"}]
            return rows, "record 2: images: got 1 for 2 image parts in the messages of prompt"
        case "more":
            rows[1]["images"] *= 2
            rows[1]["prompt"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "?"}]
            rows[0]["prompt"][0]["content"] = [{"type": "image"}, {"type": "text", "text": "?"}]
            return rows, "record 2: images: got 2 for 1 image part in the messages"
        case _:
            for row in rows:
                row |= {"prompt": "<image>?" if row is rows[0] else "?", "chosen": "a", "rejected": "b"}
            return rows, "record 2: images: got 1 for 0 times '<image>' in the prompt"


@pytest.mark.parametrize("change", ["missing", "broken", "fewer", "more", "text"])
def test_a_bad_image_is_named_with_its_record(change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(1).save("there.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "there.png").read_bytes()[:60])
    model, processor = FAMILIES["llava"]()
    rows, message = broken(change)
    with pytest.raises(ValueError, match=message):
        DPOTrainer(
            model, args=DPOConfig("out", **options()), train_dataset=Dataset.from_list(rows), processing_class=processor
        )


def test_images_in_a_text_model_are_named_with_their_record(tmp_path):
    from fastpref.models import tiny

    model, tokenizer = tiny(["a b"])
    rows = [{"images": [], "prompt": "a", "chosen": "b", "rejected": "c"}]
    rows.append(rows[0] | {"images": [picture(1)]})
    with pytest.raises(ValueError, match="record 2: images: got 1, want none: the model reads texts only"):
        DPOTrainer(
            model, args=DPOConfig(str(tmp_path), **options()), train_dataset=Dataset.from_list(rows[::1]),
            processing_class=tokenizer,
        )  # fmt: skip


def test_a_trainer_that_reads_no_images_says_so(tmp_path):
    model, processor = FAMILIES["llava"]()
    config = RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2)
    with pytest.raises(
        ValueError, match="record 1: images: got 1, want none: the model reads texts only, or the trainer"
    ):
        RLOOTrainer(
            model, args=config, train_dataset=Dataset.from_list(records(2)), processing_class=processor,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
        )  # fmt: skip


def test_the_reference_cache_knows_the_pixels(tmp_path):
    model, processor = FAMILIES["llava"]()
    found = []
    for number in (1, 1, 2):
        picture(number).save(tmp_path / "one.png")
        rows = [r | {"images": [str(tmp_path / "one.png")]} for r in records(2)]
        trainer = DPOTrainer(
            copy.deepcopy(model), args=DPOConfig(str(tmp_path), reference_cache=str(tmp_path / "cache"), **options()),
            train_dataset=Dataset.from_list(rows), processing_class=processor,
        )  # fmt: skip
        found.append(torch.tensor(trainer.train_dataset["ref_chosen_logps"][:]))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert (found[0] - found[2]).abs().max() > 1e-3


def gradients(trainer_class: Any, config_class: Any, model: Any, processor: Any, folder: str, **more: Any) -> Any:
    """Of each step, with weights that stay as they are; the reference is another model."""
    reference, found = copy.deepcopy(model), []
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    config = config_class(
        folder, precompute_ref_log_probs=False, max_grad_norm=0.0, **options(learning_rate=0.0, **more)
    )
    trainer = trainer_class(
        model, reference, config, train_dataset=Dataset.from_list(records()), processing_class=processor
    )

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))

    trainer.add_callback(Keep())
    trainer.train()
    return torch.cat(found)


def test_bf16_has_no_more_error_than_trl(tmp_path):
    model, processor = FAMILIES["llava"]()
    truth = gradients(trl.DPOTrainer, trl.DPOConfig, copy.deepcopy(model).double(), processor, str(tmp_path))
    errors = [
        float((gradients(*host, copy.deepcopy(model), processor, str(tmp_path), bf16=True) - truth).norm())
        for host in ((trl.DPOTrainer, trl.DPOConfig), (DPOTrainer, DPOConfig))
    ]
    assert 0 < errors[1] <= 1.1 * errors[0] < 0.1 * float(truth.norm())


@pytest.mark.parametrize(
    ("host", "family"), [("ours", "qwen2_vl"), ("subclass of TRL's", "qwen2_vl"), ("ours", "gemma3n")]
)
def test_it_trains_by_default_twice_on_one_model(host, family, tmp_path):
    """bf16 and gradient checkpointing, as both hosts have them; the last batch is uneven, and none is dropped."""
    trainer_class, config_class = {"ours": (DPOTrainer, DPOConfig)}.get(host, (trl_trainers.DPOTrainer, trl.DPOConfig))
    model, processor = FAMILIES[family]()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")  # from where TRL takes its reference, in both runs
    dataset = Dataset.from_list(records()[:3])
    for run in ("first", "second"):
        args = config_class(str(tmp_path / run), per_device_train_batch_size=2, num_train_epochs=1, use_cpu=True,
                            learning_rate=1e-2, logging_steps=1)  # fmt: skip
        assert args.bf16 and args.gradient_checkpointing
        before = copy.deepcopy(model.state_dict())
        trainer = trainer_class(model, args=args, train_dataset=dataset, processing_class=processor)
        found = logs(trainer)
        assert trainer.data_collator.layout == "shared" and trainer.state.global_step == 2
        if run == "first" or host == "ours":
            assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-2), "the reference is the policy as it came"
        assert all(math.isfinite(entry["loss"]) for entry in found)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
