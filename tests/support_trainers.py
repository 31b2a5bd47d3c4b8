"""Tiny models and data for the trainers' tests."""

import warnings
from typing import Any

import torch
from datasets import Dataset

from fastpref import models, trainers
from fastpref.data.pairs import sample_pairs

QUIET = {
    "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "gradient_checkpointing": False, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 5e-4,
    "logging_steps": 1, "max_length": 192,
}  # fmt: skip


def tiny(seed: int = 0) -> tuple[Any, Any]:
    return models.tiny([m["content"] for pair in sample_pairs()[0] for ms in pair for m in ms], seed)


def pairs(number: int = 16) -> Dataset:
    return Dataset.from_list([pair._asdict() for pair in sample_pairs()[0][:number]])


def responses(number: int = 16) -> Dataset:
    """Single responses, good and bad ones in turn."""
    rows = [
        {"prompt": pair.prompt, "completion": getattr(pair, side), "label": side == "chosen"}
        for pair in sample_pairs()[0][: number // 2]
        for side in ("chosen", "rejected")
    ]
    return Dataset.from_list(rows)


def config(config_class: Any, tmp_path: Any, **options: Any) -> Any:
    return config_class(output_dir=str(tmp_path / "out"), **(QUIET | options))


def train(trainer: Any, **options: Any) -> list[dict[str, float]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(**options)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


METHODS = {
    "dpo": (trainers.DPOTrainer, trainers.DPOConfig, {}),
    "ipo": (trainers.IPOTrainer, trainers.IPOConfig, {}),
    "kto": (trainers.KTOTrainer, trainers.KTOConfig, {}),
    "orpo": (trainers.ORPOTrainer, trainers.ORPOConfig, {}),
    "cpo": (trainers.CPOTrainer, trainers.CPOConfig, {}),
    "simpo": (trainers.SimPOTrainer, trainers.SimPOConfig, {}),
    "tr-dpo": (trainers.DPOTrainer, trainers.DPOConfig, {"sync_ref_model": True, "ref_model_sync_steps": 2}),
    "mpo": (trainers.DPOTrainer, trainers.DPOConfig, {"loss_type": ["sigmoid", "sft"]}),
}


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
