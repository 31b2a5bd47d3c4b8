"""What the trainers promise beside TRL's losses: batches in any shape, resuming, cached references, adapters."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from fastpref.trainers import (
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    IPOConfig,
    IPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    PRMConfig,
    PRMTrainer,
    RewardConfig,
    RewardTrainer,
    SimPOConfig,
    SimPOTrainer,
)
from tests.support_trainers import config, furthest, pairs, responses, tiny, train, weights

METHODS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "ipo": (IPOTrainer, IPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "orpo": (ORPOTrainer, ORPOConfig, {}),
    "cpo": (CPOTrainer, CPOConfig, {}),
    "simpo": (SimPOTrainer, SimPOConfig, {}),
    "tr-dpo": (DPOTrainer, DPOConfig, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "mpo": (DPOTrainer, DPOConfig, {"loss_type": ["sigmoid", "sft"]}),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def data_of(method: str) -> Dataset:
    return responses() if method == "kto" else pairs()


def run(method: str, tmp_path, dataset=None, peft_config=None, **options):
    trainer_class, config_class, more = METHODS[method]
    model, tokenizer = tiny()
    torch.manual_seed(0)  # of new adapters
    extra = {} if peft_config is None else {"peft_config": peft_config}
    trainer = trainer_class(
        model=model, args=config(config_class, tmp_path, **more, **options), train_dataset=dataset or data_of(method),
        processing_class=tokenizer, **extra,
    )  # fmt: skip
    return trainer, train(trainer)


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
    keys = ("loss", "grad_norm", "rewards/chosen", "logps/rejected", "entropy")
    assert [[e[k] for k in keys] for e in resumed[-3:]] == [[e[k] for k in keys] for e in log[-3:]]
    assert furthest(weights(whole), weights(again)) == 0.0


def test_a_truncated_checkpoint_is_never_used(tmp_path):
    run("dpo", tmp_path, save_strategy="steps", save_steps=2)
    folder = tmp_path / "out" / "checkpoint-2"
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    model, tokenizer = tiny()
    trainer = DPOTrainer(model, args=config(DPOConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer)
    with pytest.raises(Exception, match=r"(?i)safetensor|incomplete|deserializ"):
        train(trainer, resume_from_checkpoint=str(folder))


class TestReference:
    def count(self, monkeypatch) -> list[int]:
        calls: list[int] = []
        original = DPOTrainer._reference_of

        def counted(self, model, examples):
            calls.append(len(examples))
            return original(self, model, examples)

        monkeypatch.setattr(DPOTrainer, "_reference_of", counted)
        return calls

    def test_a_second_run_does_no_reference_forward(self, tmp_path, monkeypatch):
        calls = self.count(monkeypatch)
        _, first = run("dpo", tmp_path, max_steps=4)
        assert sum(calls) == 16
        _, second = run("dpo", tmp_path, max_steps=4)
        assert sum(calls) == 16
        assert [e["loss"] for e in first] == [e["loss"] for e in second]

    @pytest.mark.parametrize("change", [{"max_length": 80}, {"ld_alpha": 0.5}, {"model": 1}, {"data": 15}])
    def test_another_job_has_another_cache(self, tmp_path, monkeypatch, change):
        calls = self.count(monkeypatch)
        run("dpo", tmp_path, max_steps=4)
        model, tokenizer = tiny(change.pop("model", 0))
        dataset = pairs(change.pop("data", 16))
        args = config(DPOConfig, tmp_path, max_steps=4, **change)
        DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
        assert sum(calls) > 16

    def test_an_online_reference_gives_the_same_losses(self, tmp_path):
        _, cached = run("dpo", tmp_path)
        _, online = run("dpo", tmp_path, precompute_ref_log_probs=False)
        assert [e["loss"] for e in online] == pytest.approx([e["loss"] for e in cached], abs=2e-6)

    def test_an_explicit_reference_is_used(self, tmp_path):
        model, tokenizer = tiny()
        args = config(DPOConfig, tmp_path, max_steps=1)
        losses = []
        for reference in (None, tiny(5)[0]):
            trainer = DPOTrainer(tiny()[0], reference, args=args, train_dataset=pairs(), processing_class=tokenizer)
            losses.append(train(trainer)[0]["loss"])
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same
        assert abs(losses[1] - losses[0]) > 1e-5
        with pytest.raises(ValueError, match="ref_model: got the policy itself"):
            DPOTrainer(model, model, args=args, train_dataset=pairs(), processing_class=tokenizer)

    def test_tr_dpo_moves_the_reference(self, tmp_path):
        model, tokenizer = tiny()
        args = config(
            DPOConfig, tmp_path, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.25, max_steps=3
        )
        trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
        name = "model.layers.0.mlp.up_proj.weight"
        before = model.get_parameter(name).detach().clone()
        steps = []

        class Watch(type(trainer.callback_handler.callbacks[0])):
            def on_step_end(self, args, state, control, **kwargs):
                steps.append(model.get_parameter(name).detach().clone())

        trainer.callback_handler.callbacks.insert(0, Watch())
        train(trainer)
        wanted = 0.25 * steps[1] + 0.75 * before
        torch.testing.assert_close(trainer.reference.own.get_parameter(name), wanted)

    def test_a_damaged_cache_is_computed_again(self, tmp_path):
        _, first = run("dpo", tmp_path, reference_cache=str(tmp_path / "refs"), max_steps=4)
        (shard,) = (tmp_path / "refs").rglob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.warns(UserWarning, match="damaged"):
            trainer_class, config_class, _ = METHODS["dpo"]
            model, tokenizer = tiny()
            args = config(config_class, tmp_path, reference_cache=str(tmp_path / "refs"), max_steps=4)
            trainer = trainer_class(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
        assert [e["loss"] for e in train(trainer)] == [e["loss"] for e in first]


class TestPeft:
    def lora(self, **options):
        peft = pytest.importorskip("peft")
        return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_reference_is_the_model_without_adapters(self, tmp_path, checkpointing):
        options = {"peft_config": self.lora(), "gradient_checkpointing": checkpointing, "max_steps": 4}
        cached, log = run("dpo", tmp_path, **options)
        online, online_log = run("dpo", tmp_path, precompute_ref_log_probs=False, **options)
        assert online.reference.own is None
        assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert [e["loss"] for e in online_log] == pytest.approx([e["loss"] for e in log], abs=2e-6)
        assert all("lora" in name for name in weights(cached))

    def test_a_trained_head_is_trained(self, tmp_path):
        trainer, log = run("dpo", tmp_path, peft_config=self.lora(modules_to_save=["lm_head"]))
        head = trainer.model.base_model.model.lm_head
        assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)

    def test_an_adapter_on_the_head_is_refused(self, tmp_path):
        peft = pytest.importorskip("peft")
        with pytest.raises(ValueError, match="adapter on the output head"):
            run("dpo", tmp_path, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))

    def test_an_adapter_from_before_is_the_reference(self, tmp_path):
        peft = pytest.importorskip("peft")
        model, tokenizer = tiny()
        model = peft.get_peft_model(model, self.lora(init_lora_weights=False))
        args = config(DPOConfig, tmp_path)
        trainer = DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
        log = train(trainer)
        assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # not the model without adapters
        assert log[-1]["loss"] != pytest.approx(0.693147, abs=1e-6)


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


class CountReads(TorchDispatchMode):
    """Reads of a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            import traceback

            self.found.append("".join(traceback.format_stack(limit=8)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_metrics_are_read_once_when_they_are_logged(method, tmp_path):
    trainer, _ = run(method, tmp_path, max_steps=1)
    with CountReads() as reads:
        for value in trainer._sums["train"]._sums.values():
            assert value.shape == (2,)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        trainer.training_step(trainer.model, batch)
    ours = [stack for stack in reads.found if "fastpref/trainers" in stack.split("File ")[-2]]
    assert not ours


class TestBadInput:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"layout": "rows"}, "layout: got 'rows', want one of auto, shared, packed, padded"),
            ({"truncation_mode": "keep_end"}, "truncation_mode: got 'keep_end'"),
            ({"statistics": "always"}, "statistics: got 'always'"),
            ({"token_budget": 0}, "token_budget: got 0"),
            ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs: got True"),
        ],
    )
    def test_configs(self, tmp_path, options, message):
        with pytest.raises(ValueError, match=message):
            config(DPOConfig, tmp_path, **options)

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


def test_evaluation_is_the_mean_over_examples(tmp_path):
    model, tokenizer = tiny()
    results = []
    for batch in (2, 5, 16):
        args = config(DPOConfig, tmp_path, per_device_eval_batch_size=batch)
        trainer = DPOTrainer(model, tiny(5)[0], args=args, eval_dataset=pairs(), processing_class=tokenizer)
        results.append(trainer.evaluate())
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
        assert [r[key] for r in results] == pytest.approx([results[0][key]] * 3, rel=1e-5), key


def test_length_grouped_batches_are_reproducible(tmp_path):
    logs = [run("dpo", tmp_path, train_sampling_strategy="group_by_length", seed=3)[1] for _ in range(2)]
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]
