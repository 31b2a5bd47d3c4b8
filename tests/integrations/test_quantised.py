"""Quantised base models (QLoRA): the head is found, the reference computes as the policy does."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fastpref import models, trainers
from fastpref.models.adapters import own_names
from tests.support_trainers import config, pairs, tiny, train

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

BITS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "int8": {"load_in_8bit": True}}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "base"
    model, tokenizer = tiny()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return str(folder)


def loaded(folder, bits="nf4", **more):
    found = BitsAndBytesConfig(**BITS[bits], **more)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=found, dtype=torch.float32)


def test_a_quantised_head_is_named(base):
    for bits in BITS:
        assert models.output_head(loaded(base, bits)).weight.dtype == torch.float32
        with pytest.raises(ValueError, match=r"model: got a quantised output head \(Linear(4bit|8bitLt)\)"):
            models.output_head(loaded(base, bits, llm_int8_skip_modules=["q_proj"]))


@pytest.mark.parametrize("bits", BITS)
def test_our_trainer_is_at_log_2_before_it_moves(bits, base, tmp_path):
    """Its policy runs in training mode and its reference in evaluation mode: for int8 on a CPU, two products. What is
    trained whole stays in fp32, in which small steps move it."""
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    found = []
    for precompute in (True, False):
        args = config(trainers.DPOConfig, tmp_path, precompute_ref_log_probs=precompute)
        torch.manual_seed(0)
        trainer = trainers.DPOTrainer(
            base, args=args, train_dataset=pairs(8), peft_config=lora,
            quantization_config=BitsAndBytesConfig(**BITS[bits]),
        )  # fmt: skip
        found.append([entry["loss"] for entry in train(trainer)])
        assert found[-1][0] == pytest.approx(0.6931472, abs=1e-5) and found[-1][-1] < 0.693
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    dtypes = {name.rpartition(".default")[0].rpartition(".")[2]: p.dtype for name, p in trainer.model.named_parameters()
              if p.requires_grad}  # fmt: skip
    assert dtypes == {"lora_A": torch.bfloat16, "lora_B": torch.bfloat16, "modules_to_save": torch.float32}
    assert trainer.evaluate(pairs(4))["eval_loss"] < 0.693
    assert any(name.endswith("lora_A.default.weight") for name in own_names(trainer.model))


@pytest.mark.parametrize("bits", BITS)
def test_a_model_that_was_tried_before_had_no_gradients_through_its_layers(bits, base):
    """In evaluation mode bitsandbytes packs 4-bit weights for AVX512-BF16, and trains on them so, with no gradient."""
    found = []
    for tried in ("not", "by us", "by the user"):
        model = loaded(base, bits).eval()
        if tried == "by us":
            models.output_head(model)
        if tried == "by the user":
            with torch.no_grad():
                model(input_ids=torch.arange(8)[None])
        models.keep_arithmetic(model, for_good=True)
        model.eval().train()
        hidden = model.model.embed_tokens(torch.arange(8)[None]).detach().requires_grad_(True)
        model(inputs_embeds=hidden).logits.square().sum().backward()
        found.append(hidden.grad)
    assert torch.equal(found[0], found[1]) and found[0].abs().max() > 0
    # bitsandbytes itself rounded the scales to bf16; without gradients through the layers most of it was missing
    assert (found[2] - found[0]).norm() < 0.1 * found[0].norm()


@pytest.mark.parametrize("bits", BITS)
def test_trl_under_the_patch(bits, base, tmp_path):
    trl_hosts = pytest.importorskip("tests.trl_hosts")
    from fastpref.integrations import trl as fast_trl

    folder = trl_hosts.checkpoint()
    records = []
    for patch in (fast_trl.patched, trl_hosts.contextlib.nullcontext):
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **trl_hosts.LORA)
        options = {"model": loaded(folder, bits), "peft": lora, "learning_rate": 1e-2}
        records.append(trl_hosts.train("dpo", tmp_path / patch.__name__, patch=patch, **options))
    assert records[0].losses == pytest.approx(records[1].losses, rel=1e-5)
    assert len(set(records[0].losses)) == 3


@pytest.mark.parametrize("method", ["cpo", "orpo"])
@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["frozen head", "trained head"])
def test_the_patch_knows_the_bf16_head_that_trl_makes_under_fp32_norms(method, saved, tmp_path):
    """bf16 is the default of TRL's CPO and ORPO. They built logits on 4-bit models: the head was tried without
    autocast, where such a model's own forward raises."""
    trl_hosts = pytest.importorskip("tests.trl_hosts")
    from fastpref.integrations import trl as fast_trl

    records = []
    for patch in (fast_trl.patched, trl_hosts.contextlib.nullcontext):
        lora = peft.LoraConfig(task_type="CAUSAL_LM", modules_to_save=saved, **trl_hosts.LORA)
        model = loaded(trl_hosts.checkpoint(), bnb_4bit_compute_dtype=torch.bfloat16)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*builds logits")
            options = {"model": model, "peft": lora, "bf16": True, "learning_rate": 1e-2}
            records.append(trl_hosts.train(method, tmp_path / patch.__name__, patch=patch, **options))
    assert records[0].losses == pytest.approx(records[1].losses, rel=3e-4)
    assert records[1].losses[0] != pytest.approx(records[1].losses[-1], rel=1e-3)


@pytest.mark.parametrize("method", ["CPO", "ORPO"])
def test_without_a_reference_adapters_stay_in_fp32_as_in_trl(method, tmp_path):
    """They were held in bf16, as in TRL's DPO: in fp32 the gradients were 5e-3 off."""
    trl_hosts = pytest.importorskip("tests.trl_hosts")
    shared = (
        "max_steps", "learning_rate", "optim", "lr_scheduler_type", "per_device_train_batch_size", "max_length",
        "gradient_checkpointing", "seed",
    )  # fmt: skip
    lora = peft.LoraConfig(task_type="CAUSAL_LM", **trl_hosts.LORA)
    model = loaded(trl_hosts.checkpoint())
    theirs = trl_hosts.build(method.lower(), tmp_path / "trl", model=model, peft=lora, learning_rate=1e-2)
    args = config(getattr(trainers, f"{method}Config"), tmp_path, **{n: getattr(theirs.args, n) for n in shared})
    model, tokenizer = loaded(trl_hosts.checkpoint()), AutoTokenizer.from_pretrained(trl_hosts.checkpoint())
    ours = getattr(trainers, f"{method}Trainer")(
        model, args, train_dataset=trl_hosts.dataset("dpo"), peft_config=lora, processing_class=tokenizer
    )
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad:
            same = ours.model.get_parameter(name)
            assert same.dtype == parameter.dtype == torch.float32
            same.data.copy_(parameter)
    wanted, found = ([entry["loss"] for entry in train(trainer)] for trainer in (theirs, ours))
    assert found == pytest.approx(wanted, abs=2e-5)
    assert wanted[0] != pytest.approx(wanted[-1], abs=1e-3)
