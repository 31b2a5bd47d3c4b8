"""The load-balancing loss of mixture-of-experts models is TRL's, on the same tokens, whatever the layout."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from support_trainers import config, pairs, tiny
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

pytest.importorskip("trl")
from fastpref import models, trainers
from fastpref.integrations import trl as fast_trl
from tests import trl_hosts

SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_experts_per_tok=2, router_aux_loss_coef=0.5,
)  # fmt: skip
FAMILIES = {
    "qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
}


def mixture(tokenizer, family: str = "qwen3", **options):
    model_class, config_class, more = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = model_class(config_class(vocab_size=len(tokenizer), **SMALL, **more, **options))
        for name, parameter in model.named_parameters():
            if ".gate.weight" in name or "router" in name:
                parameter.data.mul_(30)  # routes that differ
    return model


def of_trl(method: str, tmp_path, patch=contextlib.nullcontext, **options):
    tokenizer = models.tiny(trl_hosts.TEXTS)[1]
    model = mixture(tokenizer, **options)
    with patch(), warnings.catch_warnings():
        warnings.simplefilter("error" if patch is not contextlib.nullcontext else "ignore", UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        trainer = trl_hosts.build(method, tmp_path / "trl", model=model)
        trainer.train()
    return trainer


def ours(method: str, tmp_path, options=None, **settings):
    tokenizer = models.tiny(trl_hosts.TEXTS)[1]
    name = method.upper()
    extra = {"ref_model": models.tiny(trl_hosts.TEXTS, 1)[0]} if method in ("dpo", "kto") else {}
    args = getattr(trainers, f"{name}Config")(
        output_dir=str(tmp_path / "ours"), max_steps=3, per_device_train_batch_size=2, optim="sgd", learning_rate=0.05,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=64, **settings,
    )  # fmt: skip
    trainer = getattr(trainers, f"{name}Trainer")(
        model=mixture(tokenizer, **(options or {})), args=args, train_dataset=trl_hosts.dataset(method),
        processing_class=tokenizer, **extra,
    )  # fmt: skip
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


CASES = [("dpo", layout, "qwen3") for layout in ("shared", "packed", "padded")]
CASES += [
    ("dpo", "shared", "mixtral"),
    ("kto", "packed", "qwen3"),
    ("orpo", "shared", "qwen3"),
    ("cpo", "shared", "qwen3"),
]


@pytest.mark.parametrize(("method", "layout", "family"), CASES)
def test_losses_of_three_steps_are_those_of_trl(method, layout, family, tmp_path):
    """A shared prompt's routes count once for each of its responses, padding not at all."""
    options = {"family": family, "output_router_logits": method in ("orpo", "cpo")}
    found, wanted = ours(method, tmp_path, options, layout=layout), of_trl(method, tmp_path, **options)
    assert found.aux_loss_enabled and wanted.aux_loss_enabled and found.data_collator.layout == layout
    assert logged(found, "loss") == pytest.approx(logged(wanted, "loss"), rel=1e-5)
    if method in ("dpo", "kto"):
        assert logged(found, "aux_loss") == pytest.approx(logged(wanted, "aux_loss"), rel=1e-5)
    assert min(logged(found, "aux_loss")) > 1.0


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_patch_packs_mixtures_of_experts(method, tmp_path):
    found, wanted = of_trl(method, tmp_path, fast_trl.patched), of_trl(method, tmp_path)
    assert found.packing is not None
    for name in ("loss", "aux_loss"):
        assert logged(found, name) == pytest.approx(logged(wanted, name), rel=1e-5)


def test_an_evaluation_balances_all_of_its_tokens(tmp_path):
    tokenizer = tiny()[1]
    found = []
    for size in (12, 5):
        args = config(trainers.ORPOConfig, tmp_path, per_device_eval_batch_size=size, router_aux_loss_coef=0.5)
        trainer = trainers.ORPOTrainer(
            mixture(tokenizer), args=args, train_dataset=pairs(12), eval_dataset=pairs(12), processing_class=tokenizer
        )
        found.append(trainer.evaluate())
    for key in ("eval_loss", "eval_aux_loss"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-6), key
    rest = found[0]["eval_nll_loss"] - trainer.args.beta * found[0]["eval_log_odds_ratio"]
    assert found[0]["eval_loss"] == pytest.approx(rest + 0.5 * found[0]["eval_aux_loss"], rel=1e-6)


def test_a_coefficient_without_experts_is_refused(tmp_path):
    model, tokenizer = tiny()
    args = config(trainers.DPOConfig, tmp_path, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: got 0\.1, .* is no mixture of experts"):
        trainers.DPOTrainer(model, args=args, train_dataset=pairs(4), processing_class=tokenizer)
