"""What every rank of the distributed tests runs of records with images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fastpref import models, trainers
from fastpref.integrations import trl as fast_trl
from fastpref.models.vision import sequence_classifier
from tests import support_ranks as support
from tests.support_vision import picture, records

SOME = (1, 1, 0, 0, 2)  # images of each record: in the first step the second rank has none
EACH = (1, 2, 1, 1, 1)


def pictures(method: str, counts: Sequence[int]) -> Dataset:
    rows = records(len(counts))
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        row["images"] = [picture(i + 7 * k) for k in range(count)] or None
        if method == "kto":
            chosen, rejected = row.pop("chosen"), row.pop("rejected")
            row |= {"completion": rejected if i % 2 else chosen, "label": i % 2 == 0}
    return Dataset.from_list(rows)


def classifier(model: Any) -> Any:
    """A reward model, in fp64: the hidden states of a pair's two ends differ by little."""
    model.config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = sequence_classifier(type(model.config)).from_config(model.config)
    return found.double()


def pictured(case: str, wrapper: str, batch: int, folder: Path, patch: Any = fast_trl.patched) -> dict[str, Any]:
    """An epoch over one record more than comes out even, and where the trainer is ours its evaluation.

    A case is a method. Before it may stand "trl" (its own trainer), "each" (has images), "accumulated", "budget".
    """
    host, _, method = case.rpartition("-")
    model, processor = models.tiny_vision()
    more: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 1, "max_length": 128, "learning_rate": 0.1}
    if wrapper == "ddp":  # as people leave both
        more |= {"ddp_find_unused_parameters": None, "gradient_checkpointing": True}
    if wrapper == "fsdp2":
        more["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": [support.LAYER, "CLIPEncoderLayer"]}
    options = support.options(wrapper, batch, per_device_eval_batch_size=batch, **more)
    extra = {} if method == "reward" else {"ref_model": models.tiny_vision(seed=1)[0]}
    if method == "reward":
        model = classifier(model)
    if host == "trl":
        import trl

        with patch():
            args = trl.DPOConfig(output_dir=str(folder), **options)
            data = pictures(method, EACH)
            trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=processor, **extra)
            return support.trained(trainer, wrapper)
    name = {"dpo": "DPO", "kto": "KTO", "reward": "Reward"}[method]
    trainer_class = support.SameBlocksKTO if method == "kto" else getattr(trainers, f"{name}Trainer")
    if host == "budget":
        options["token_budget"] = 100
    if host == "accumulated":  # the second batch of the first update has images on neither rank
        options |= {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": 2}
    args = getattr(trainers, f"{name}Config")(output_dir=str(folder), **options)
    data = pictures(method, EACH if host == "each" else SOME)
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=processor, **extra)
    return support.evaluated_twice(trainer, data, support.trained(trainer, wrapper))


def mixed(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """What is said of records without images beside others with some, as data or as a stream."""
    try:
        pictured(case, wrapper, batch, folder)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}
