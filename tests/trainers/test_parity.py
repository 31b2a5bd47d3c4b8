"""A script of TRL's moves by its import: what its trainers have, refuse and leave behind beside the losses."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from datasets import DatasetDict
from huggingface_hub import ModelCard
from support_trainers import METHODS, config, data_of, pairs, responses, run, tiny, train

from fastpref import trainers
from tests.trainers.test_evaluation import build


@pytest.mark.parametrize("case", ["dpo", "kto", "orpo", "reward", "prm"])
def test_training_goes_on_in_the_same_trainer_and_on_the_same_model(case, tmp_path):
    """A notebook's second cell: everything is set up again where the first left the weights."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": True, "gradient_checkpointing": True}
    first = build(case, tmp_path, **options)
    entries = train(first), train(first)[-2:]
    second = type(first)(
        model=first.model, args=config(first.config_class, tmp_path, **options, max_length=None),
        train_dataset=first.train_dataset, processing_class=first.processing_class,
    )  # fmt: skip
    entries += (train(second),)
    assert all(len(some) == 2 and all(math.isfinite(entry["loss"]) for entry in some) for some in entries)
    assert entries[1][-1]["num_tokens"] == entries[0][-1]["num_tokens"]


@pytest.mark.parametrize("name", ["DPO", "IPO", "KTO", "ORPO", "CPO", "SimPO"])
def test_data_of_another_kind_are_refused_by_name(name, tmp_path):
    model, tokenizer = tiny()
    args = config(getattr(trainers, f"{name}Config"), tmp_path)
    trainer_class = getattr(trainers, f"{name}Trainer")
    with pytest.raises(ValueError, match=r"train_dataset: got None, want .*`train_dataset` is required"):
        trainer_class(model=model, args=args, processing_class=tokenizer)
    split = DatasetDict({"train": pairs(2), "test": pairs(2)})
    with pytest.raises(TypeError, match="train_dataset: got DatasetDict of train, test; want one of them"):
        trainer_class(model=model, args=args, train_dataset=split, processing_class=tokenizer)
    for option in ("compute_metrics", "data_collator"):
        with pytest.raises(ValueError, match=f"{option}: got 'one', which fastpref does not support"):
            trainer_class(
                model=model, args=args, train_dataset=pairs(2), processing_class=tokenizer, **{option: lambda _: {}}
            )


@pytest.mark.parametrize("name", [name for name in dir(trainers) if name.endswith("Config")])
def test_a_scripts_parser_reads_every_configuration(name, tmp_path, capsys):
    """A bare % in a help text broke --help, and --precompute_ref_log_probs wanted a value, which TRL's does not."""
    config_class = getattr(trainers, name)
    parser = transformers.HfArgumentParser(config_class)
    ours = [vars(c).get("__annotations__", {}) for c in config_class.__mro__ if c.__module__.startswith("fastpref")]
    for action in parser._actions:
        if any(action.dest in names for names in ours):  # in transformers' own some are bare
            parser._get_formatter()._expand_help(action)
    flags = ["--precompute_ref_log_probs"] if issubclass(config_class, trainers.config.ReferenceConfig) else []
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *flags])
    assert not flags or args.precompute_ref_log_probs is True


@pytest.mark.parametrize("name", ["DPO", "KTO", "Reward", "CPO", "ORPO", "GRPO", "RLOO"])
def test_configurations_have_every_field_of_trls(name):
    host = pytest.importorskip("trl" if name not in ("CPO", "ORPO") else f"trl.experimental.{name.lower()}")
    theirs, ours = (getattr(room, f"{name}Config") for room in (host, trainers))
    assert {field.name for field in fields(theirs)} <= {field.name for field in fields(ours)}


def test_grpo_takes_the_older_name_of_the_ratios_upper_end(tmp_path):
    with pytest.warns(FutureWarning, match="vllm_importance_sampling_cap"):
        args = config(
            trainers.GRPOConfig, tmp_path, max_length=None, num_generations=4, vllm_importance_sampling_cap=2.0
        )
    assert args.vllm_importance_sampling_clip_max == 2.0


def test_options_that_were_passed_over(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor: got 0\.1, which fastpref does not support"):
        config(trainers.ORPOConfig, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"liger_kernel_config: got .*it replaces the forward"):
        config(trainers.ORPOConfig, tmp_path, use_liger_kernel=True, liger_kernel_config={"cross_entropy": True})
    with pytest.warns(UserWarning, match="use_liger_kernel: Liger's kernels of layers are used; its cross-entropy"):
        args = config(trainers.DPOConfig, tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert args.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": False}


def test_the_reference_model_is_an_attribute(tmp_path):
    """Explicit, moving, or the copy that runs in every step; None where it was precomputed or is an adapter away."""
    own, (model, tokenizer) = tiny(5)[0], tiny()
    args = config(trainers.DPOConfig, tmp_path)
    given = trainers.DPOTrainer(model, own, args=args, train_dataset=pairs(4), processing_class=tokenizer)
    assert given.ref_model is own
    before = {name: value.clone() for name, value in own.state_dict().items()}
    train(given)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    moving, _ = run("tr-dpo", tmp_path, max_steps=2)
    assert not torch.equal(moving.ref_model.lm_head.weight, tiny()[0].lm_head.weight)
    assert run("dpo", tmp_path, max_steps=1, precompute_ref_log_probs=False)[0].ref_model is not None
    assert run("dpo", tmp_path, max_steps=1, precompute_ref_log_probs=True)[0].ref_model is None


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_streams_and_precomputed_references(method, tmp_path):
    """By default a stream's reference runs beside the policy, with the same result; asked for, it is TRL's error."""
    trainer_class, config_class, _ = METHODS[method]
    data, (model, tokenizer) = data_of(method).select(range(8)), tiny()
    stream = data.to_iterable_dataset()
    args = config(config_class, tmp_path, max_steps=4, per_device_train_batch_size=2)
    given = {"args": args, "train_dataset": data, "processing_class": tokenizer}
    trainer = trainer_class(model, tiny(5)[0], **given)
    assert trainer.precomputes
    wanted = trainer.evaluate(data)["eval_loss"]
    assert trainer.evaluate(stream)["eval_loss"] == pytest.approx(wanted, rel=1e-6) and abs(wanted - 0.69315) > 1e-3
    trainer = trainer_class(model, **given)
    train(trainer)
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to"):
        trainer.evaluate(stream)
    args = config(config_class, tmp_path, precompute_ref_log_probs=True)
    for extra in ({"train_dataset": stream}, {"train_dataset": data, "eval_dataset": {"x": stream}}):
        with pytest.raises(ValueError, match=r"precompute_ref_log_probs.*not supported with IterableDataset"):
            trainer_class(tiny()[0], args=args, processing_class=tokenizer, **extra)


def test_a_checkpoint_has_a_card_and_its_model_tags(tmp_path):
    trainer, _ = run("simpo", tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert set(trainer.model.model_tags) >= {"fastpref", "simpo"}
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert {"fastpref", "simpo"} <= set(card.data.tags) and "arXiv" not in card.text
    assert "2405.14734" in card.text and card.data.base_model is None
    trainer.create_model_card("my-model", dataset_name="me/my-data", tags="mine")
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.data.model_name == "my-model" and card.data.datasets == ["me/my-data"] and "mine" in card.data.tags


def test_num_tokens_goes_on_where_a_run_is_resumed(tmp_path):
    """Saved between two logs: the tokens since the last one are not lost, either."""
    options = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = run("orpo", tmp_path, **options)[1]
    model, tokenizer = tiny()
    args = config(trainers.ORPOConfig, tmp_path, **options)
    trainer = trainers.ORPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    entries = train(trainer, resume_from_checkpoint=str(Path(args.output_dir) / "checkpoint-3"))
    assert [entry["num_tokens"] for entry in entries[-2:]] == [entry["num_tokens"] for entry in whole[-2:]]


def test_a_run_shorter_than_its_logging_steps_has_metrics(tmp_path):
    trainer, _ = run("dpo", tmp_path, max_steps=2, logging_steps=10)
    (last,) = trainer.state.log_history
    assert {"train_loss", "rewards/margins", "mean_token_accuracy"} <= last.keys() and last["num_tokens"] > 0


def test_pairs_for_kto_are_said_to_be_unmixed(tmp_path):
    with pytest.warns(UserWarning, match="train_dataset: got pairs, .* most batches have one class"):
        model, tokenizer = tiny()
        args = config(trainers.KTOConfig, tmp_path)
        trainer = trainers.KTOTrainer(model, args=args, train_dataset=pairs(4), processing_class=tokenizer)
    assert [label for label, _ in itertools.groupby(trainer.train_dataset["label"])] == [True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainers.KTOTrainer(model, args=args, train_dataset=responses(4), processing_class=tokenizer)


def test_a_reward_model_of_two_labels(tmp_path):
    model = build("prm", tmp_path).model
    with pytest.raises(ValueError, match=r"got num_labels=2, want 1 .reward models require `num_labels=1`"):
        trainers.RewardTrainer(
            model, args=config(trainers.RewardConfig, tmp_path), train_dataset=pairs(4), processing_class=tiny()[1]
        )


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    for name in ("CPO", "ORPO", "DPO"):
        with pytest.raises(ValueError, match=r"model: got 'T5ForConditionalGeneration', .* encoder-decoder"):
            getattr(trainers, f"{name}Trainer")(
                model=model, args=config(getattr(trainers, f"{name}Config"), tmp_path), train_dataset=pairs(4),
                processing_class=tiny()[1],
            )  # fmt: skip


def test_a_loss_of_nan_is_logged_as_nan_and_said(tmp_path):
    model, tokenizer = tiny()
    args = config(trainers.ORPOConfig, tmp_path, max_steps=3, learning_rate=1e30, warmup_steps=0)
    trainer = trainers.ORPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    with pytest.warns(UserWarning, match="loss: NaN in the steps up to [23]; the model's weights are likely NaN"):
        trainer.train()
    assert math.isnan([entry for entry in trainer.state.log_history if "loss" in entry][-1]["loss"])
