"""What every rank of the distributed tests runs of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import concatenate_datasets

from fastpref import trainers
from tests import support_ranks as support
from tests import trl_hosts

CASES = {
    "online": {"lmbda": 0.0, "beta": 0.5},
    "cached": {"lmbda": 0.0, "cache_teacher": True},
    "on-policy": {"lmbda": 1.0, "max_completion_length": 6},
}


def distilled(case: str, wrapper: str, batch: int, folder: Path) -> dict[str, Any]:
    """An epoch over one example more than comes out even, and an evaluation."""
    data = trl_hosts.dataset("dpo")
    data = concatenate_datasets([data, data.select([1])])
    model, tokenizer = support.tiny()
    more = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.3, "teacher_cache": str(folder / "cache")}
    options = support.options(wrapper, batch, per_device_eval_batch_size=batch, **more, **CASES[case])
    args = trainers.DistillationConfig(output_dir=str(folder), **options)
    teacher = support.tiny(seed=1)[0]
    teacher.get_output_embeddings().weight.data *= 8  # far from the student: a small KL is known to fewer digits
    trainer = trainers.DistillationTrainer(model, teacher, args, data, data, processing_class=tokenizer)
    found = support.trained(trainer, wrapper)
    return found | {"loss": trainer.evaluate()["eval_loss"]}
