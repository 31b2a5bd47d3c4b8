"""What every rank of the distributed tests runs: a few updates, and their losses and gradients, whole.

As a program (under torchrun): `python -m tests.support_distributed FOLDER BATCH WRAPPER CASE ...`; rank 0 leaves what
it found in `FOLDER/found.pt`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from datasets import concatenate_datasets
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastpref
from fastpref import models, trainers
from fastpref.data.collate import tokenize_pairs
from fastpref.data.pairs import Pair
from fastpref.integrations import trl as fast_trl
from fastpref.integrations.transformers import batch_loss, pair_batch, reference_logps
from tests import trl_hosts
from tests.support_distillation import distilled
from tests.support_distributed_vision import mixed, pictured
from tests.support_ranks import (
    LAYER,
    STEPS,
    ZERO,
    SameBlocksKTO,
    classifier,
    evaluated_twice,
    fresh,
    options,
    tiny,
    trained,
    whole,
)

LOOP_LEARNING_RATE = 0.4  # so that what SGD adds is not lost in the last bits of the weights
PATIENCE = 150  # seconds


# our trainers

OURS = {
    "dpo": ("DPO", {"precompute_ref_log_probs": True}),
    "online-dpo": ("DPO", {"precompute_ref_log_probs": False}),
    "untied-dpo": ("DPO", {"precompute_ref_log_probs": True}),
    "accumulated-dpo": ("DPO", {"precompute_ref_log_probs": False, "gradient_accumulation_steps": 2}),
    "budget-dpo": ("DPO", {"token_budget": 8}),
    "tr-dpo": ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "apo": ("KTO", {"loss_type": "apo_zero_unpaired"}),
    "kto": ("KTO", {}),
    "reward": ("Reward", {}),
    "orpo": ("ORPO", {}),
    "lists": ("DPO", {"loss_type": "davidson"}),
}


def ours(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    name, more = OURS[case]
    if more.get("gradient_accumulation_steps"):
        batch //= 2
    model, tokenizer = tiny(tied=case != "untied-dpo")
    if case == "reward":
        model = classifier()
    trainer_class = SameBlocksKTO if case == "kto" else getattr(trainers, f"{name}Trainer")
    args = getattr(trainers, f"{name}Config")(
        output_dir=str(folder), **options(wrapper, batch, reference_cache=str(folder / "reference"), **more)
        if name in ("DPO", "KTO")
        else options(wrapper, batch, **more),
    )  # fmt: skip
    extra = {"ref_model": tiny(seed=1)[0]} if name in ("DPO", "KTO") and case not in ("tr-dpo", "untied-dpo") else {}
    trainer = trainer_class(
        model=model, args=args, train_dataset=rankings() if case == "lists" else trl_hosts.dataset(name.lower()),
        processing_class=tokenizer, **extra,
    )  # fmt: skip
    return trained(trainer, wrapper)


def rankings() -> Any:
    """Pairs as lists of two, three or four responses, with ties."""
    pairs = trl_hosts.dataset("dpo")
    others = [*pairs["chosen"], *pairs["rejected"]]
    return pairs.map(
        lambda row, i: {"responses": [row["chosen"], row["rejected"], *others[i : i + i % 3]],
                        "ranks": [0, 1, 1, 0][: 2 + i % 3]},
        with_indices=True, remove_columns=["chosen", "rejected"],
    )  # fmt: skip


def resumed(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """TR-DPO whose second step is another trainer's, from a checkpoint of the first."""
    found: dict[str, Any] = {}
    for steps in (1, STEPS):
        model, tokenizer = tiny()
        more = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "sync_ref_model": True}
        # torch cannot load the state of an optimizer that has none; this Adam does not blow up rounding
        more |= {"optim": "adamw_torch", "adam_epsilon": 1.0}
        args = trainers.DPOConfig(output_dir=str(folder), **options(wrapper, batch, ref_model_sync_steps=1, **more))
        trainer = trainers.DPOTrainer(
            model=model, args=args, train_dataset=trl_hosts.dataset("dpo"), processing_class=tokenizer
        )
        found = trained(trainer, wrapper, resume_from_checkpoint=str(folder / "checkpoint-1") if steps > 1 else None)
        trainer.save_model(str(folder / "saved"))
    torch.distributed.barrier() if wrapper != "one" else None
    saved = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved")
    before = dict(tiny()[0].named_parameters())
    found["saved"] = {n: (p - before[n]).detach() for n, p in saved.named_parameters()}
    return found


def evaluated(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """Adapters whose reference is precomputed, then an evaluation of data that the constructor did not see: fewer
    batches than ranks to compute a reference with."""
    from peft import LoraConfig

    model, tokenizer = tiny()
    more = options(wrapper, batch, precompute_ref_log_probs=True, reference_cache=str(folder / "reference"))
    args = trainers.DPOConfig(output_dir=str(folder), per_device_eval_batch_size=batch, **more)
    torch.manual_seed(0)
    trainer = trainers.DPOTrainer(
        model=model, args=args, train_dataset=trl_hosts.dataset("dpo"), processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )  # fmt: skip
    found = trained(trainer, wrapper)
    data = trl_hosts.dataset("dpo").select(range(3, -1, -1))
    return found | {"logs": [*found["logs"], {"loss": trainer.evaluate(data)["eval_loss"]}]}


def adapted(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """Adapters, and norms that train beside them in the layers and in the root: the reference is the model as it was,
    with the adapters it came with or with the new ones off."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = tiny()
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    extra = {}
    if case == "goes-on-dpo":
        model = get_peft_model(model, config)
    else:
        extra = {"peft_config": config}
    args = trainers.DPOConfig(output_dir=str(folder), **options(wrapper, batch, precompute_ref_log_probs=False))
    trainer = trainers.DPOTrainer(
        model=model, args=args, train_dataset=trl_hosts.dataset("dpo"), processing_class=tokenizer, **extra
    )
    if case != "goes-on-dpo":
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "norm" in name)
    return trained(trainer, wrapper)


def refused(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """What sharding cannot give, as the error's text."""
    more = options(wrapper, batch, **({"token_budget": 8} if case == "budget" else {"precompute_ref_log_probs": True}))
    more["fsdp_config"] |= {"cpu_ram_efficient_loading": case == "precompute"}
    model, tokenizer = tiny()
    args = trainers.DPOConfig(output_dir=str(folder), **more)
    try:
        trainers.DPOTrainer(model=model, args=args, train_dataset=trl_hosts.dataset("dpo"), processing_class=tokenizer)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    return {"error": None}


UNEVEN = {
    "dpo": {}, "ipo": {}, "kto": {}, "orpo": {}, "cpo": {}, "simpo": {}, "reward": {"center_rewards_coefficient": 0.1},
    "prm": {}, "mpo": {"loss_type": ["sigmoid", "sft"], "gradient_accumulation_steps": 2},
}  # fmt: skip
NAMES = {"simpo": "SimPO", "reward": "Reward", "mpo": "DPO"}


def uneven(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """An epoch over one example more than comes out even, and its evaluation, as a data set and as a stream."""
    name = NAMES.get(case, case.upper())
    data = trl_hosts.dataset("dpo" if case in ("ipo", "simpo", "mpo") else case)
    data = concatenate_datasets([data, data.select([1])])
    model, tokenizer = tiny()
    if case in ("reward", "prm"):
        model = classifier() if case == "reward" else classifier(labels=2)
    more: dict[str, Any] = {**UNEVEN[case], "max_steps": -1, "num_train_epochs": 1}
    if case == "mpo":
        batch //= 2
    extra = {}
    if name in ("DPO", "IPO", "KTO"):
        extra["ref_model"] = tiny(seed=1)[0]
    args = getattr(trainers, f"{name}Config")(
        output_dir=str(folder), per_device_eval_batch_size=batch, **options(wrapper, batch, **more)
    )
    trainer_class = SameBlocksKTO if case == "kto" else getattr(trainers, f"{name}Trainer")
    trainer = trainer_class(model=model, args=args, train_dataset=data, processing_class=tokenizer, **extra)
    return evaluated_twice(trainer, data, trained(trainer, wrapper))


def uneven_resumed(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """Two updates of two batches, of which the very last is filled up; then the second again, from a checkpoint."""
    data = trl_hosts.dataset("dpo")
    data = concatenate_datasets([data, data.select([1, 3, 1])])
    found = []
    for checkpoint in (None, str(folder / "checkpoint-1")):
        model, tokenizer = tiny()
        more = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 1}
        more |= {"optim": "adamw_torch", "adam_epsilon": 1.0, "gradient_accumulation_steps": 2}  # as in `resumed`
        args = trainers.DPOConfig(output_dir=str(folder), **options(wrapper, batch // 2, **more))
        trainer = trainers.DPOTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer, ref_model=tiny(seed=1)[0]
        )
        found.append(trained(trainer, wrapper, resume_from_checkpoint=checkpoint))
    return found[0] | {"resumed": found[1]["gradients"]}


# TRL's

TRL = {"dpo": {}, "apo": {"loss_type": "apo_zero_unpaired"}, "kto": {}, "reward": {}}


def trl(case: str, wrapper: str, batch: int, folder: Path, patch: Any = fast_trl.patched) -> dict[str, Any]:
    method = "kto" if case == "apo" else case
    with patch():
        more = options(wrapper, batch, **TRL[case])
        model = classifier() if case == "reward" else None
        return trained(trl_hosts.build(method, folder, model=model, **more), wrapper)


# loops


def pairs(tokenizer: Any) -> list:
    def message(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = zip(trl_hosts.QUESTIONS, trl_hosts.GOOD, trl_hosts.BAD, strict=True)
    found = [Pair(message("user", q), message("assistant", g), message("assistant", b)) for q, g, b in rows]
    return tokenize_pairs(found, tokenizer, max_length=64)


def loop(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """One loop of one's own over DPO, KTO or reward; on ranks, each has its share of the examples."""
    kind, _, objective = case.partition("-")
    model, tokenizer = tiny(tied=kind != "head")
    reference = tiny(seed=1)[0]
    data = pairs(tokenizer)
    rank = torch.distributed.get_rank() if wrapper != "one" else 0
    inputs = pair_batch(data[rank * batch : (rank + 1) * batch], tokenizer.pad_token_id)
    inputs["ref_logps"] = reference_logps(reference, inputs)
    loss_fn = {"dpo": fastpref.DPOLoss(), "kto": fastpref.KTOLoss()}[objective]
    if objective == "kto":
        inputs["desirable"] = torch.arange(2 * batch) < batch
        inputs["kl"] = torch.tensor(0.1)
    models.output_head(model)
    before = {n: whole(p) for n, p in model.named_parameters()}
    optimizer, accelerator = torch.optim.SGD(model.parameters(), lr=LOOP_LEARNING_RATE), None
    if wrapper != "one" and kind == "accelerate":
        plugin = None
        if wrapper == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[LAYER]
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model, optimizer = accelerator.prepare(model, optimizer)
    elif wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif wrapper == "fsdp2":
        units = [*model.model.layers, *([model.lm_head] if kind == "head" else [])]
        for unit in (*units, model):
            fully_shard(unit)
        optimizer = torch.optim.SGD(model.parameters(), lr=LOOP_LEARNING_RATE)
    losses, gradients = [], []
    for _ in range(STEPS):
        loss = batch_loss(loss_fn, model, inputs, accelerator).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        named = models.unwrapped(model).named_parameters()
        gradients.append({name: whole(p.grad) for name, p in named})
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if wrapper != "one":
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        losses.append({"loss": float(mean)})
    parameters = dict(models.unwrapped(model).named_parameters())
    return {
        "logs": losses, "gradients": gradients, "update": {n: whole(p) - before[n] for n, p in parameters.items()},
        "sharded": {n for n, p in parameters.items() if hasattr(p, "full_tensor")},
        "wrapped": type(model).__name__,
    }  # fmt: skip


LOOPS = ("plain-dpo", "plain-kto", "head-dpo", "accelerate-dpo", "accelerate-kto")
KINDS: dict[str, Callable] = {
    "ours": ours, "trl": trl, "unpatched": functools.partial(trl, patch=contextlib.nullcontext), "loop": loop,
    "resumed": resumed, "evaluated": evaluated, "refused": refused, "uneven": uneven,
    "uneven-resumed": uneven_resumed,
    "adapted": adapted, "distilled": distilled, "pictured": pictured, "mixed": mixed,
    "unpatched-pictured": functools.partial(pictured, patch=contextlib.nullcontext),
}  # fmt: skip


def measure(name: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """`name` is a kind and a case of it, such as `ours:dpo`."""
    kind, case = name.split(":")
    with fresh(wrapper), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return KINDS[kind](case, wrapper, batch, folder / f"{kind}-{case}-{wrapper}")


def main(folder: str, batch: str, *cases: str) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a rank that waits for the other shows where
    if cases[0].split("/")[0] in ZERO:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a minute of C++ to make gloo faster
    gc.freeze()  # as in conftest.py
    torch.distributed.init_process_group("gloo")
    found = {}
    for entry in cases:
        wrapper, _, name = entry.partition("/")
        print(entry, flush=True)  # the last one is where it failed
        found[entry] = measure(name, wrapper, int(batch), Path(folder))
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
