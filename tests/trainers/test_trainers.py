"""What the trainers promise beside TRL's losses: batches in any shape, resuming, cached references, adapters."""

import traceback

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from fastpref.trainers import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardTrainer,
)
from tests.support_trainers import METHODS, config, data_of, furthest, pairs, responses, run, tiny, train, weights


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "cpo", "mpo"])
def test_an_update_is_the_same_however_its_batch_is_split(method, tmp_path):
    """Parts within a token budget and accumulated gradients: one bigger batch, NLL terms and last batch included."""
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.05,
    }
    whole, log = run(method, tmp_path, **options)
    splits = [{"token_budget": 150}]
    if method != "kto":  # whose mismatched pairs depend on the batch size
        splits.append({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3})
    for split in splits:
        dataset = None
        if "gradient_accumulation_steps" in split:  # 3 + 3 + 2 examples in the first update
            dataset, split = pairs(8), split | {"max_steps": 1}
            whole, log = run(method, tmp_path, dataset=dataset, **(options | {"max_steps": 1}))
        parted, parted_log = run(method, tmp_path, dataset=dataset, **(options | split))
        assert [e["loss"] for e in parted_log] == pytest.approx([e["loss"] for e in log], abs=2e-6)
        assert furthest(weights(whole), weights(parted)) < 2e-6


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_names_its_metrics_as_trl(method, tmp_path):
    _, log = run(method, tmp_path, eval_strategy="no", statistics="every")
    assert len(log) == 3
    wanted = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
              "logits/chosen", "logits/rejected", "entropy", "num_tokens"}  # fmt: skip
    wanted |= {"kto": {"kl"}, "orpo": {"nll_loss", "log_odds_chosen", "log_odds_ratio"}, "cpo": {"nll_loss"}}.get(
        method, set()
    )
    wanted |= set() if method == "kto" else {"rewards/margins", "rewards/accuracies"}
    assert wanted <= set(log[-1])
    assert all(torch.isfinite(torch.tensor(list(entry.values()))).all() for entry in log)
    assert log[-1]["num_tokens"] > log[0]["num_tokens"] > 0


def test_statistics_are_measured_when_asked(tmp_path):
    for when, steps in (("logging", {2}), ("every", {1, 2, 3}), ("never", set())):
        _, log = run("dpo", tmp_path, statistics=when, logging_steps=1 if when == "every" else 2)
        assert {entry["step"] for entry in log if "entropy" in entry} == steps


@pytest.mark.parametrize("method", ["dpo", "kto", "tr-dpo"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(method, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    whole, log = run(method, tmp_path / "whole", **options)
    trainer_class, config_class, more = METHODS[method]
    model, tokenizer = tiny()
    args = config(config_class, tmp_path / "whole", **more, **options)
    again = trainer_class(model=model, args=args, train_dataset=data_of(method), processing_class=tokenizer)
    resumed = train(again, resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-3"))
    keys = ("loss", "grad_norm", "rewards/chosen", "logps/rejected", "entropy", "num_tokens")
    assert [[e[k] for k in keys] for e in resumed[-3:]] == [[e[k] for k in keys] for e in log[-3:]]
    assert furthest(weights(whole), weights(again)) == 0.0


def test_an_interrupted_run_was_counted_in_the_next(tmp_path):
    """What it had summed up for its next log was in the first log of the run after it. A run that is resumed counts the
    tokens from its checkpoint on; they restarted at 0."""

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    model, tokenizer = tiny()
    args = config(DPOConfig, tmp_path, learning_rate=0.0, logging_steps=3, save_steps=1)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    (wanted,) = train(trainer)
    args.save_strategy = "steps"
    trainer.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    trainer.remove_callback(Interrupt)
    (found,) = train(trainer)
    for name in ("num_tokens", "logps/chosen", "rewards/margins"):
        assert found[name] == wanted[name]
    (resumed,) = train(trainer, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed["num_tokens"] == wanted["num_tokens"]


def test_a_truncated_checkpoint_is_never_used(tmp_path):
    run("dpo", tmp_path, save_strategy="steps", save_steps=2)
    folder = tmp_path / "out" / "checkpoint-2"
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model, tokenizer = tiny()
    trainer = DPOTrainer(model, args=config(DPOConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer)
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|deserializ"):
        train(trainer, resume_from_checkpoint=str(folder))


def steps_data() -> Dataset:
    rows = [
        {
            "prompt": f"Add {i} and 2.",
            "completions": [f"{i} + 2", f"is {i + 2}", "so right"],
            "labels": [True, i > 3, False],
        }
        for i in range(8)
    ]
    return Dataset.from_list(rows)


class TestHeads:
    def model(self, kind: str, labels: int):
        import transformers

        model, tokenizer = tiny()
        auto = getattr(transformers, f"AutoModelFor{kind}Classification")
        config = model.config
        config.num_labels = labels
        torch.manual_seed(3)
        return auto.from_config(config), tokenizer

    @pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
    def test_reward(self, tmp_path, layout):
        model, tokenizer = self.model("Sequence", 1)
        dataset = pairs().add_column("margin", [0.1] * 16)
        args = config(RewardConfig, tmp_path, layout=layout, per_device_eval_batch_size=3, max_length=None)
        trainer = RewardTrainer(
            model, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
        )
        wanted = {"min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens"}
        assert wanted <= set(train(trainer)[-1])
        found = trainer.evaluate()
        assert found["eval_accuracy"] == pytest.approx(round(found["eval_accuracy"] * 16) / 16)

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_process_rewards(self, tmp_path, accumulation):
        model, tokenizer = self.model("Token", 2)
        args = config(
            PRMConfig, tmp_path, per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation, max_steps=1,
        )  # fmt: skip
        trainer = PRMTrainer(model, args=args, train_dataset=steps_data(), processing_class=tokenizer)
        (entry,) = train(trainer)
        assert 0 <= entry["accuracy"] <= 1
        assert entry["loss"] == pytest.approx(0.693, abs=0.2)

    def test_two_labels_are_no_reward(self, tmp_path):
        model, tokenizer = self.model("Sequence", 2)
        with pytest.raises(ValueError, match="model: got num_labels=2, want 1"):
            RewardTrainer(model, args=config(RewardConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer)


class HostSyncs(TorchDispatchMode):
    """Operators that make the host wait for an accelerator, by the file that called them."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITING):
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.callers.append(f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"token_budget": 150}, {"precompute_ref_log_probs": False}])
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_step_of_the_trainers_own_code_waits_for_nothing(method, options, tmp_path):
    if method == "orpo":
        options = {name: value for name, value in options.items() if name == "token_budget"}
    trainer, _ = run(method, tmp_path, max_steps=1, statistics="every", **options)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with HostSyncs() as syncs:
        trainer.training_step(trainer.model, batch, trainer._items([batch]))
    assert not [caller for caller in syncs.callers if "/fastpref/trainers/" in caller]
    with HostSyncs() as syncs:  # and if it did wait, it would be seen
        exec(compile("torch.ones(()).item()", "/somewhere/fastpref/trainers/base.py", "exec"))
    assert [caller for caller in syncs.callers if "/fastpref/trainers/" in caller]


class TestBadInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"layout": "rows"}, "layout: got 'rows', want one of auto, tree, shared, packed, padded"),
            ({"truncation_mode": "keep_end"}, "truncation_mode: got 'keep_end'"),
            ({"statistics": "always"}, "statistics: got 'always'"),
            ({"token_budget": 0}, "token_budget: got 0"),
            ({"include_for_metrics": ["inputs"]}, r"include_for_metrics: got \['inputs'\], which"),
            ({"batch_eval_metrics": True}, "batch_eval_metrics: got True, which fastpref does not support"),
            ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True"),
        ],
    )
    def test_configs(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            config(DPOConfig, tmp_path, **options)

    def test_batches_that_accelerate_would_cut(self, tmp_path):
        with pytest.raises(
            ValueError, match="dispatch_batches: got True, which fastpref does not support: a packed bat"
        ):
            run("dpo", tmp_path, accelerator_config={"dispatch_batches": True})

    def test_a_sorting_loss_has_no_parts(self, tmp_path):
        with pytest.raises(ValueError, match="token_budget: got 100 with loss_type 'aot'"):
            run("dpo", tmp_path, loss_type=["aot"], token_budget=100)

    @pytest.mark.parametrize("name", ["compute_metrics", "data_collator"])
    def test_what_needs_logits(self, tmp_path, name):
        model, tokenizer = tiny()
        with pytest.raises(ValueError, match=f"{name}: got 'one', which fastpref does not support"):
            DPOTrainer(
                model, args=config(DPOConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer,
                **{name: lambda _: None},
            )  # fmt: skip

    def test_what_was_never_called(self, tmp_path):
        model, tokenizer = tiny()
        given = {"train_dataset": responses(), "processing_class": tokenizer}
        args = config(KTOConfig, tmp_path)
        with pytest.raises(ValueError, match="compute_loss_func: got 'one', which fastpref does not support"):
            KTOTrainer(model, args=args, compute_loss_func=lambda *_: None, **given)

    def test_which_data_set_has_the_wrong_record(self, tmp_path):
        """It was 'dataset', and a list or an empty one an AttributeError."""
        model, tokenizer = tiny()
        args = config(DPOConfig, tmp_path)
        wrong = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": None}])
        for error, message, data in (
            (TypeError, "train_dataset: got list, want a datasets.Dataset", {"train_dataset": [*pairs(2)]}),
            (ValueError, "eval_dataset: got no records", {"train_dataset": pairs(2), "eval_dataset": wrong.select([])}),
            (
                ValueError, r"eval_dataset\['b'\], record 1: rejected: got None",
                {"train_dataset": pairs(2), "eval_dataset": {"a": pairs(2), "b": wrong}},
            ),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                DPOTrainer(model, args=args, processing_class=tokenizer, **data)

    def test_kto_of_single_examples(self, tmp_path):
        with pytest.raises(ValueError, match="per_device_train_batch_size: got 1, want at least 2"):
            run("kto", tmp_path, per_device_train_batch_size=1)
        with pytest.raises(ValueError, match="train_sampling_strategy: got 'random'"):
            run("kto", tmp_path, train_sampling_strategy="random")

    def test_someone_elses_arguments(self, tmp_path):
        model, tokenizer = tiny()
        with pytest.raises(TypeError, match=r"args: got KTOConfig, want fastpref\.trainers\.config\.DPOConfig"):
            DPOTrainer(model, args=config(KTOConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer)


@pytest.mark.parametrize("precompute", [True, False])
def test_autocast_reaches_policy_and_reference(tmp_path, precompute):
    """It was lost with the forward that Accelerate wraps: bf16=True ran in fp32."""
    model, tokenizer = tiny()
    dtypes: set[tuple[bool, torch.dtype]] = set()

    def note(module, inputs, output):
        dtypes.add((torch.is_grad_enabled(), output.dtype))

    args = config(DPOConfig, tmp_path, bf16=True, precompute_ref_log_probs=precompute, max_steps=4)
    handles = [model.model.layers[0].mlp.register_forward_hook(note)]  # deepcopied with the reference
    trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    if precompute:
        assert (False, torch.bfloat16) in dtypes
    dtypes.clear()
    train(trainer)
    handles[0].remove()
    wanted = {(True, torch.bfloat16)} | ({(False, torch.bfloat16)} if not precompute else set())
    assert dtypes == wanted


def test_a_stream_of_examples(tmp_path):
    model, tokenizer = tiny()
    args = config(DPOConfig, tmp_path)
    trainer = DPOTrainer(model, args=args, train_dataset=pairs().to_iterable_dataset(), processing_class=tokenizer)
    assert not trainer.precomputes
    assert len(train(trainer)) == 3


def test_evaluating_other_data_by_name_is_evaluating_each(tmp_path):
    """Each of them was prepared twice, and KTO's z0 was that of other completions."""
    trainer, _ = run("kto", tmp_path, max_steps=1, max_length=90)
    other = responses(8)
    found = trainer.evaluate({"x": other})
    model, tokenizer = tiny()
    args = config(KTOConfig, tmp_path, max_steps=1, max_length=90)
    given = KTOTrainer(
        model, args=args, train_dataset=responses(), eval_dataset={"x": other}, processing_class=tokenizer
    )
    train(given)
    wanted = given.evaluate()
    for key in ("eval_x_loss", "eval_x_kl", "eval_x_rewards/chosen"):
        assert found[key] == pytest.approx(wanted[key], abs=1e-5)


def test_length_grouped_batches_are_reproducible(tmp_path):
    logs = [run("dpo", tmp_path, train_sampling_strategy="group_by_length", seed=3)[1] for _ in range(2)]
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]


def test_a_pad_token_that_the_model_lacks(tmp_path):
    """Added to the tokenizer alone, or none at all: an IndexError and a TypeError where batches are padded."""
    tokens = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 4)
    losses = []
    for change in ({"layout": "packed"}, {"pad_token": "[PAD]"}, {"pad_token": None, "eos_token": None}):
        model, tokenizer = tiny()
        layout = change.pop("layout", "padded")
        for name, token in change.items():
            tokenizer.add_special_tokens({name: token}) if token else setattr(tokenizer, name, None)
        args = config(DPOConfig, tmp_path, layout=layout)
        trainer = DPOTrainer(model, args=args, train_dataset=tokens, processing_class=tokenizer)
        losses.append([entry["loss"] for entry in train(trainer)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == losses[1]


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_data_in_another_format(form, tmp_path):
    """As tensors, prompt + response are sums: an error in the middle of training. Token ids were refused."""
    tokens = Dataset.from_list([{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9, 3]}] * 4)
    plain, losses = pairs(4) if form == "torch" else tokens, []
    for dataset in (plain, plain.with_format(form), plain.with_format(form).to_iterable_dataset()):
        model, tokenizer = tiny()
        args = config(DPOConfig, tmp_path, max_steps=2, train_sampling_strategy="sequential")
        trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
        losses.append([entry["loss"] for entry in train(trainer)])
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_the_dtype_by_its_older_name_was_passed_over(tmp_path):
    """And the model was loaded in fp32."""
    for part in tiny():
        part.save_pretrained(tmp_path / "model")
    for given in ({"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
        args = config(DPOConfig, tmp_path, model_init_kwargs=given)
        trainer = DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=pairs(4))
        assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    with pytest.warns(UserWarning, match="model_init_kwargs: not used, since the model is already loaded"):
        DPOTrainer(trainer.model, args=args, train_dataset=pairs(4), processing_class=trainer.processing_class)
    args = config(DPOConfig, tmp_path, model_init_kwargs={"dtype": "bf16"})
    with pytest.raises(ValueError, match="model_init_kwargs: got a dtype of 'bf16', want 'auto', 'float32'"):
        DPOTrainer(str(tmp_path / "model"), args=args, train_dataset=pairs(4))
