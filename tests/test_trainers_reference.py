"""The reference policy of a trainer: cached, online, explicit, moving, or the model without its adapters."""

import pytest
import torch
from datasets import Dataset

from fastpref.data.reference_cache import ReferenceCache
from fastpref.trainers import DPOConfig, DPOTrainer
from fastpref.trainers.reference import fill_cache
from tests.support_trainers import METHODS, config, pairs, run, tiny, train, weights


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
