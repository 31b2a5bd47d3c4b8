"""The reference policy of a trainer: cached, online, explicit, moving, or the model without its adapters."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from fastpref.data.reference_cache import ReferenceCache
from fastpref.trainers import DPOConfig, DPOTrainer
from fastpref.trainers.reference import fill_cache
from tests.support_trainers import METHODS, config, pairs, responses, run, tiny, train, weights


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights_of(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


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

    def test_rotary_frequencies_are_in_the_fingerprint(self, tmp_path, monkeypatch):
        """Only scalars of the config were: the same weights with another rope_theta found the first one's cache."""
        calls = self.count(monkeypatch)
        for theta in (10_000.0, 10.0):
            model, tokenizer = tiny()
            model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": theta}
            args = config(DPOConfig, tmp_path, max_steps=4)
            DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
        assert sum(calls) == 32

    def test_ranks_that_look_at_different_times_do_all_shards(self, tmp_path, monkeypatch):
        """Each took every second of what it found missing, while others wrote."""
        monkeypatch.setattr("fastpref.data.reference_cache.SHARD", 4)
        dataset = Dataset.from_dict({"length": [1] * 16})
        cache = ReferenceCache(tmp_path, "abc", 16, 1)
        for rank in (0, 1):  # one after the other
            fill_cache(
                cache, dataset, lambda examples: torch.ones(len(examples), 1), tokens=8, rank=rank, world=2,
                progress=lambda n: None,
            )  # fmt: skip
        assert cache.load().shape == (16, 1)

    def test_a_reference_that_cannot_share_gets_padded_batches(self, tmp_path):
        import transformers

        tokenizer = tiny()[1]
        recurrent = transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
        )
        with torch.no_grad():
            for parameter in recurrent.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        args = config(DPOConfig, tmp_path)
        with pytest.warns(UserWarning, match="MambaForCausalLM runs 'padded' batches"):
            trainer = DPOTrainer(tiny()[0], recurrent, args=args, train_dataset=pairs(), processing_class=tokenizer)
        assert trainer.data_collator.layout == "padded"

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

    def test_a_model_that_was_a_reference_could_not_be_trained(self, tmp_path):
        """It was frozen for good; so was a reward model given to an online trainer."""
        (one, tokenizer), (two, _) = tiny(), tiny(5)
        for model, reference in ((one, two), (two, one)):
            before = weights_of(reference)
            args = config(DPOConfig, tmp_path, precompute_ref_log_probs=False, max_steps=1)
            trainer = DPOTrainer(model, reference, args=args, train_dataset=pairs(), processing_class=tokenizer)
            train(trainer)
            assert all(torch.equal(a, b) for a, b in zip(weights_of(reference), before, strict=True))
            assert all(parameter.grad is None for parameter in reference.parameters())

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

    def test_columns_of_an_older_reference_were_read_by_one_that_runs(self, tmp_path):
        """TR-DPO became DPO where the data brought log-probs; TRL reads them only where it precomputes."""
        dataset = pairs().add_column("ref_chosen_logps", [-1.0] * 16).add_column("ref_rejected_logps", [-9.0] * 16)
        _, wanted = run("dpo", tmp_path, precompute_ref_log_probs=False)
        args = config(DPOConfig, tmp_path, precompute_ref_log_probs=False)
        model, tokenizer = tiny()
        found = train(DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer))
        assert [e["loss"] for e in found] == [e["loss"] for e in wanted]
        args = config(DPOConfig, tmp_path, precompute_ref_log_probs=True, max_steps=1)
        trainer = DPOTrainer(tiny()[0], args=args, train_dataset=dataset, processing_class=tokenizer)
        assert set(trainer.train_dataset["ref_rejected_logps"]) == {-9.0}

    def test_given_log_probs_were_read_by_some_runs_only(self, tmp_path):
        """Not by those over less than the data or over streams; one column without the other was a KeyError."""
        chosen = pairs().add_column("ref_chosen_logps", [-1.0] * 16)
        both = chosen.add_column("ref_rejected_logps", [-900.0] * 16)
        losses = []
        for dataset in (both, both.to_iterable_dataset()):
            model, tokenizer = tiny()
            args = config(DPOConfig, tmp_path, max_steps=1, train_sampling_strategy="sequential")
            trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
            losses += [entry["loss"] for entry in train(trainer)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] > 1
        part = pairs(4).to_iterable_dataset()
        with pytest.warns(UserWarning, match="ref_chosen_logps: in the data, but not read: the reference runs"):
            DPOTrainer(model, args=args, train_dataset=both, eval_dataset=part, processing_class=tokenizer)
        for dataset in (chosen, chosen.to_iterable_dataset()):
            with pytest.raises(ValueError, match="ref_chosen_logps: got a data set that has it without ref_rejec"):
                DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)

    def test_a_mismatched_completions_log_prob_was_given_to_another(self, tmp_path):
        """KTO's z0 of a part of a prepared data set: the completions were rotated anew, their log-probs were not."""
        trainer_class, config_class, _ = METHODS["kto"]
        model, tokenizer = tiny()
        args = config(config_class, tmp_path, precompute_ref_log_probs=True)
        trainer = trainer_class(
            model, args=args, train_dataset=responses(), eval_dataset=responses(), processing_class=tokenizer
        )
        part = trainer.eval_dataset.select(range(3))
        prepared = trainer.prepare_dataset(part, "eval", args)
        for column in ("completion_ids", "kl_completion_ids", "ref_KL_logps"):
            assert prepared[column] == part[column]
        with pytest.raises(ValueError, match="ref_KL_logps: got a data set without kl_completion_ids, want both"):
            trainer.prepare_dataset(part.remove_columns("kl_completion_ids"), "eval", args)

    def test_the_only_checkpoint_could_lack_the_moving_reference(self, tmp_path, monkeypatch):
        """Older ones are deleted when the trainer's state is written: what a run resumes from must be there by then."""
        seen = []
        original = Trainer._save_checkpoint

        def looking(self, *args):
            seen.append((tmp_path / "out" / f"checkpoint-{self.state.global_step}" / "reference.safetensors").exists())
            return original(self, *args)

        monkeypatch.setattr(Trainer, "_save_checkpoint", looking)
        run("dpo", tmp_path, sync_ref_model=True, save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=2)
        assert seen == [True, True]


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

    def test_the_reference_was_the_policy_whose_adapters_it_froze(self, tmp_path):
        model, tokenizer = tiny()
        args = config(DPOConfig, tmp_path)
        with pytest.raises(ValueError, match="ref_model: got the policy itself"):
            DPOTrainer(
                model, model, args=args, train_dataset=pairs(), processing_class=tokenizer, peft_config=self.lora()
            )

    @pytest.mark.parametrize("how", ["pissa", "olora"])
    def test_adapters_that_take_over_base_weights_changed_the_reference(self, tmp_path, how):
        """Without them the model is what is left of it, not what it was."""
        _, plain = run("dpo", tmp_path, precompute_ref_log_probs=False, max_steps=1)
        for precompute in (False, True):
            trainer, log = run(
                "dpo", tmp_path, peft_config=self.lora(init_lora_weights=how), precompute_ref_log_probs=precompute,
                max_steps=1,
            )  # fmt: skip
            assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
            assert log[0]["logps/chosen"] == pytest.approx(plain[0]["logps/chosen"], rel=1e-4)
            assert trainer.reference.own is None

    def test_a_reloaded_adapter_of_pissa_keeps_the_base_weights(self, tmp_path):
        """The copy that is the reference was initialised like the original, out of the base weights."""
        peft = pytest.importorskip("peft")
        model, tokenizer = tiny()
        model = peft.get_peft_model(model, self.lora(init_lora_weights="pissa"))
        name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
        before = model.get_parameter(name).detach().clone()
        args = config(DPOConfig, tmp_path, max_steps=1)
        log = train(DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer))
        assert torch.equal(model.get_parameter(name), before)
        assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
