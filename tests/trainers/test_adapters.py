"""Adapters in the trainers: those that go on, what else trains beside them, several of them, other kinds than LoRA."""

import json
import warnings

import pytest
import torch
from torch import nn

from fastpref import trainers
from fastpref.models import inner_model
from fastpref.models.adapters import Snapshot
from tests.support_trainers import METHODS, config, data_of, pairs, tiny, train

peft = pytest.importorskip("peft")
LOG2 = 0.6931472
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lora(**options):
    return peft.LoraConfig(**({"r": 2} | TARGETS | options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a base model's folder, that of an adapter of it which is not zero)."""
    folder = tmp_path_factory.mktemp("adapters")
    model, tokenizer = tiny()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "base")
    model.config._name_or_path = model.name_or_path = str(folder / "base")
    torch.manual_seed(3)
    peft.get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def trainer_of(model, tmp_path, method="dpo", tokenizer=None, **options):
    trainer_class, config_class, more = METHODS[method]
    extra = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    args = config(config_class, tmp_path, **more, **options)
    return trainer_class(
        model=model, args=args, train_dataset=data_of(method), processing_class=tokenizer or tiny()[1], **extra
    )


def reference_logps(trainer, rows=4):
    """By the trainer's reference, in one batch."""
    examples = trainer.train_dataset.select(range(rows)).to_list()
    with trainer.reference.model() as model:
        return trainer._reference_of(model, examples)


def policy_logps(trainer, rows=4):
    training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        found = trainer._reference_of(trainer.model, trainer.train_dataset.select(range(rows)).to_list())
    trainer.model.train(training)
    return found


def flags(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


class TestThatGoesOn:
    @pytest.mark.parametrize("method", ["dpo", "kto", "simpo"])
    def test_an_adapters_folder_was_loaded_with_nothing_to_train(self, method, folders, tmp_path):
        """It was at log 2 to the end."""
        trainer = trainer_of(folders[1], tmp_path, method, precompute_ref_log_probs=False) if method != "simpo" else (
            trainer_of(folders[1], tmp_path, method)
        )  # fmt: skip
        began = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        wanted = peft.load_peft_weights(folders[1])
        assert len(began) == len(wanted) == 8
        assert all(torch.equal(value, wanted[name.replace(".default", "")]) for name, value in began.items())
        log = train(trainer)
        if method == "dpo":
            assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-5) and log[-1]["loss"] < LOG2 - 1e-4
        assert all(not torch.equal(p, began[n]) for n, p in trainer.model.named_parameters() if n in began)
        trainer.save_model(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == folders[0]
        assert sorted(p.name for p in (tmp_path / "saved").iterdir() if p.is_dir()) == []

    def test_its_tokenizer_is_the_adapters_or_the_base_models(self, folders, tmp_path):
        args = config(trainers.DPOConfig, tmp_path, precompute_ref_log_probs=False)
        assert trainers.DPOTrainer(folders[1], args=args, train_dataset=pairs()).processing_class.chat_template

    def test_two_rounds_are_the_policy_as_it_was_at_the_start_of_each(self, folders, tmp_path):
        """The reference of a round is the base model with the adapter of the round before, not the base model."""
        first = trainer_of(folders[0], tmp_path / "1", peft_config=lora(), learning_rate=1e-2)
        train(first)
        first.save_model(tmp_path / "round1")
        for precompute in (False, True):
            second = trainer_of(str(tmp_path / "round1"), tmp_path / "2", precompute_ref_log_probs=precompute)
            assert torch.equal(policy_logps(second), policy_logps(first))
            assert torch.equal(reference_logps(second), policy_logps(first))
            assert not torch.allclose(reference_logps(second), reference_logps(first), atol=1e-3)
            train(second)
            assert torch.equal(reference_logps(second), policy_logps(first))
            assert not torch.equal(policy_logps(second), policy_logps(first))

    def test_rounds_do_not_share_a_reference_cache(self, folders, tmp_path):
        base = trainer_of(folders[0], tmp_path, peft_config=lora(), precompute_ref_log_probs=True)
        on = trainer_of(folders[1], tmp_path, precompute_ref_log_probs=True)
        louder = trainer_of(self.rescaled(folders[1], tmp_path), tmp_path, precompute_ref_log_probs=True)
        found = [t.train_dataset["ref_chosen_logps"] for t in (base, on, louder)]
        assert len({tuple(column) for column in found}) == 3
        again = trainer_of(folders[1], tmp_path, peft_config=None, precompute_ref_log_probs=True)
        assert again.reference.fingerprint == on.reference.fingerprint

    def rescaled(self, folder, tmp_path):
        """The same weights, and another alpha."""
        import shutil

        target = shutil.copytree(folder, tmp_path / "rescaled")
        values = json.loads((target / "adapter_config.json").read_text()) | {"lora_alpha": 64}
        (target / "adapter_config.json").write_text(json.dumps(values))
        return str(target)

    def test_an_adapter_as_the_reference_model(self, folders, tmp_path):
        args = config(trainers.DPOConfig, tmp_path, precompute_ref_log_probs=True)
        options = {"args": args, "train_dataset": pairs(), "processing_class": tiny()[1]}
        found = [trainers.DPOTrainer(folders[0], reference, **options) for reference in (folders[1], folders[0])]
        policy = trainer_of(folders[1], tmp_path, precompute_ref_log_probs=False)
        assert torch.equal(reference_logps(found[0]), policy_logps(policy))
        # weights of a reference's adapters were not in the fingerprint
        assert found[0].train_dataset["ref_chosen_logps"] != found[1].train_dataset["ref_chosen_logps"]

    def test_resuming_an_adapter_that_goes_on_is_exact(self, folders, tmp_path):
        options = {
            "save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": False, "max_steps": 3,
            "lr_scheduler_type": "constant",
        }  # fmt: skip
        whole = trainer_of(folders[1], tmp_path / "whole", **options)
        log = train(whole)
        resumed = trainer_of(folders[1], tmp_path / "resumed", **options)
        found = train(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-1"))
        assert [e["loss"] for e in found[1:]] == [e["loss"] for e in log[1:]]
        for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
            assert torch.equal(a, b), name
        assert torch.equal(reference_logps(resumed), reference_logps(whole))

    def test_new_adapters_on_top_are_refused(self, folders, tmp_path):
        """They replaced the earlier ones without a word."""
        from transformers import AutoModelForCausalLM

        for model in (folders[1], AutoModelForCausalLM.from_pretrained(folders[1])):
            with pytest.raises(ValueError, match="peft_config: got one with a model that has adapters"):
                trainer_of(model, tmp_path, peft_config=lora())

    def test_an_adapter_of_another_task_or_without_its_base_is_refused(self, folders, tmp_path):
        args = config(trainers.RewardConfig, tmp_path)
        with pytest.raises(ValueError, match="an adapter for CAUSAL_LM, want one for SEQ_CLS"):
            trainers.RewardTrainer(folders[1], args=args, train_dataset=pairs())
        lost = tmp_path / "lost"
        lost.mkdir()
        (lost / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "./nowhere", "r": 2})
        )
        with pytest.raises(ValueError, match=r"an adapter of '\./nowhere', which is no folder"):
            trainer_of(str(lost), tmp_path)


class TestNothingTrains:
    @pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
    def test_a_frozen_adapter_trained_nothing_and_logged_gradient_norms(self, method, folders, tmp_path):
        from transformers import AutoModelForCausalLM

        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[0]), folders[1])
        with pytest.raises(ValueError, match=r"nothing that trains, want an adapter.*is_trainable=True"):
            trainer_of(model, tmp_path, method)
        with pytest.raises(ValueError, match="nothing that trains, want parameters with requires_grad"):
            trainer_of(tiny()[0].requires_grad_(False), tmp_path, method)

    def test_a_frozen_reward_model(self, tmp_path):
        from transformers import LlamaForSequenceClassification

        model, tokenizer = tiny()
        frozen = LlamaForSequenceClassification(model.config).requires_grad_(False)
        frozen.config.num_labels = 1
        frozen.score = nn.Linear(64, 1, bias=False).requires_grad_(False)
        with pytest.raises(ValueError, match="nothing that trains"):
            trainers.RewardTrainer(
                frozen, args=config(trainers.RewardConfig, tmp_path), train_dataset=pairs(), processing_class=tokenizer
            )

    def test_auto_peft_model_trains(self, folders, tmp_path):
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folders[1], is_trainable=True)
        log = train(trainer_of(model, tmp_path, precompute_ref_log_probs=False))
        assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-5) and log[-1]["loss"] < LOG2 - 1e-4


BESIDE = {  # what makes the adapters, and what of the model is set to train beside them
    "bias": (lambda: lora(bias="all"), ()),
    "norms": (lora, ("norm",)),
    "saved": (lambda: lora(modules_to_save=["lm_head"], bias="lora_only"), ()),
    "dora": (lambda: lora(use_dora=True), ("norm",)),
    "rslora": (lambda: lora(use_rslora=True), ()),
    "pissa": (lambda: lora(init_lora_weights="pissa"), ("norm",)),
    "ia3": (lambda: peft.IA3Config(**TARGETS, feedforward_modules=["down_proj"]), ("norm",)),
    "vera": (lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4), ()),
    "tokens": (lambda: lora(trainable_token_indices={"embed_tokens": [5, 6, 7]}), ()),
}


class TestReference:
    """Constant to 0, whatever trains."""

    @pytest.mark.parametrize("goes_on", [False, True], ids=["fresh", "goes on"])
    @pytest.mark.parametrize("case", BESIDE)
    def test_what_trains_beside_adapters_moved_the_reference(self, case, goes_on, tmp_path):
        make, unfrozen = BESIDE[case]
        model, tokenizer = self.untied()
        torch.manual_seed(0)
        if goes_on:
            model = peft.get_peft_model(model, make())
            with torch.no_grad():  # as if it had been trained
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.02 * torch.randn_like(parameter))
            self.thaw(model, unfrozen)
            extra = {}
        else:
            extra = {"peft_config": make()}
        options = {"precompute_ref_log_probs": False, "learning_rate": 1e-2, **extra}
        trainer = trainer_of(model, tmp_path, tokenizer=tokenizer, **options)
        self.thaw(trainer.model, unfrozen)
        before, policy, wanted = reference_logps(trainer), policy_logps(trainer), flags(trainer.model)
        if goes_on:
            assert torch.equal(before, policy)
        log = train(trainer)
        assert torch.equal(reference_logps(trainer), before)
        assert not torch.equal(policy_logps(trainer), policy)
        assert flags(trainer.model) == wanted
        assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-5)

    def untied(self):
        model, tokenizer = tiny()
        torch.manual_seed(1)
        config = type(model.config)(**(model.config.to_dict() | {"tie_word_embeddings": False, "attention_bias": True}))
        return type(model)(config), tokenizer

    def thaw(self, model, parts):
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.requires_grad_(True)

    def test_two_active_adapters_became_one(self, folders, tmp_path):
        """And the reference was the first of them alone."""
        from transformers import AutoModelForCausalLM

        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folders[0]), folders[1], is_trainable=True
        )
        torch.manual_seed(9)
        model.add_adapter("two", lora(init_lora_weights=False))
        model.base_model.set_adapter(["default", "two"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".two." in name)
        trainer = trainer_of(model, tmp_path, precompute_ref_log_probs=False)
        before, wanted, policy = reference_logps(trainer), flags(model), policy_logps(trainer)
        assert torch.equal(before, policy)  # both
        log = train(trainer)
        assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-5) and log[-1]["loss"] < LOG2 - 1e-4
        assert torch.equal(reference_logps(trainer), before) and flags(model) == wanted
        assert model.active_adapters == ["default", "two"]
        layer = inner_model(model).model.layers[0].self_attn.q_proj
        assert layer.active_adapters == ["default", "two"] and not layer.disable_adapters


class TestASecondTrainer:
    def test_on_the_same_peft_model(self, folders, tmp_path):
        """Adapter with name 'ref' already exists."""
        model = peft.AutoPeftModelForCausalLM.from_pretrained(folders[1], is_trainable=True)
        for _ in range(2):
            trainer = trainer_of(model, tmp_path, precompute_ref_log_probs=False)
            assert train(trainer)[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
        assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
        trainer.save_model(tmp_path / "saved")
        assert not (tmp_path / "saved" / "ref").exists()

    def test_on_the_same_base_model(self, tmp_path):
        """New adapters stood beside those of the run before, in layers that only it had."""
        model = tiny()[0]
        first = trainer_of(model, tmp_path, peft_config=lora(), learning_rate=1e-2)
        before = policy_logps(first)
        train(first)
        with pytest.warns(UserWarning, match="adapters of an earlier run in its layers; they were taken out"):
            second = trainer_of(model, tmp_path, peft_config=lora(target_modules=["v_proj"]))
        assert torch.equal(policy_logps(second), before) and torch.equal(reference_logps(second), before)
        assert train(second)[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
        assert not any("q_proj.lora" in name for name, _ in second.model.named_parameters())
        model = tiny()[0]
        trainer_of(model, tmp_path, peft_config=lora(init_lora_weights="pissa"))
        with pytest.raises(ValueError, match=r"weights an earlier run's adapters changed \(pissa\)"):
            trainer_of(model, tmp_path, peft_config=lora())

    def test_on_the_base_model_alone(self, tmp_path):
        """The adapters in its layers alone trained, unseen, and what was saved was no model."""
        model = tiny()[0]
        trainer = trainer_of(model, tmp_path, peft_config=lora())
        with pytest.raises(ValueError, match=r"model: got one with an earlier run's adapters .* want its Peft"):
            trainer_of(model, tmp_path)
        train(trainer_of(trainer.model, tmp_path, max_steps=1))
        own = tiny()[0]
        own.add_adapter(lora())  # transformers' own way, which saves them
        trainer_of(own, tmp_path).save_model(tmp_path / "own")
        assert (tmp_path / "own" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    "refused", [{"num_virtual_tokens": 3}, {"total_step": 10, "target_modules": ["q_proj"]}], ids=["prompts", "adalora"]
)
def test_adapters_that_need_more_than_their_layers_are_refused(refused, tmp_path):
    kind = peft.PromptTuningConfig if "num_virtual_tokens" in refused else peft.AdaLoraConfig
    with pytest.raises(ValueError, match=r"peft_config: got '(prompt learning|AdaLoRA)'"):
        trainer_of(tiny()[0], tmp_path, peft_config=kind(task_type="CAUSAL_LM", **refused))


def test_a_language_models_adapter_on_a_reward_model(tmp_path):
    """It was an AttributeError inside of PEFT."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = tiny()
    model.config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(model.config)
    args = config(trainers.RewardConfig, tmp_path)
    with pytest.raises(ValueError, match="peft_config: got task_type 'CAUSAL_LM' with LlamaForSequenceClassification"):
        trainers.RewardTrainer(model, args, None, pairs(2), processing_class=tokenizer, peft_config=lora())


def test_what_was_exchanged_comes_back_to_the_bit():
    layer = nn.Linear(3, 3)
    began = layer.weight.detach().clone()
    snapshot = Snapshot(layer, outside=False)
    with torch.no_grad():
        layer.weight.add_(1.0)
    now, loss = layer.weight.detach().clone(), layer(torch.ones(3, requires_grad=True)).square().sum()
    for _ in range(2):
        with warnings.catch_warnings(), snapshot.restored():
            assert torch.equal(layer.weight, began)
        assert torch.equal(layer.weight, now)
    loss.backward()  # the graph of a forward before still stands
