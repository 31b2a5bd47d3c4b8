"""What `fastpref train` does: makes a trainer from options, evaluates, trains, evaluates again, writes files."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref import models, trainers
from fastpref.commands.train import adapters, rewards, summary
from fastpref.commands.train.options import LAST, OnlineOptions, RunOptions, read_options
from fastpref.commands.train.progress import TrainingProgress
from fastpref.common import memory, terminal
from fastpref.data import formats, pairs
from fastpref.data.files import load_records
from fastpref.data.weights import repeated_by_weight
from fastpref.models.adapters import adapter_config
from fastpref.online.servers import ServerError
from fastpref.trainers.config import PreferenceConfig
from fastpref.trainers.policy import ReferencedTrainer

LOGS = 50  # of a run, at least, if no more often than every step
OURS = ("smollm2", "tiny")
HOLD_OUT_SEED = 0  # not the run's: runs of other seeds are compared on the same records


class Method(NamedTuple):
    """A method's trainer, and the task of its adapters."""

    trainer: Any
    task: str  # PEFT's name

    @property
    def config(self) -> type[PreferenceConfig]:
        return self.trainer.config_class


METHODS = {
    "dpo": Method(trainers.DPOTrainer, "CAUSAL_LM"),
    "ipo": Method(trainers.IPOTrainer, "CAUSAL_LM"),
    "kto": Method(trainers.KTOTrainer, "CAUSAL_LM"),
    "orpo": Method(trainers.ORPOTrainer, "CAUSAL_LM"),
    "cpo": Method(trainers.CPOTrainer, "CAUSAL_LM"),
    "simpo": Method(trainers.SimPOTrainer, "CAUSAL_LM"),
    "distill": Method(trainers.DistillationTrainer, "CAUSAL_LM"),
    "reward": Method(trainers.RewardTrainer, "SEQ_CLS"),
    "prm": Method(trainers.PRMTrainer, "TOKEN_CLS"),
    "rloo": Method(trainers.RLOOTrainer, "CAUSAL_LM"),
    "grpo": Method(trainers.GRPOTrainer, "CAUSAL_LM"),
}


class Job(NamedTuple):
    """A run that is ready to start."""

    method: str
    options: RunOptions
    trainer: Any
    progress: TrainingProgress
    checkpoint: str | None

    def say(self, text: str) -> None:
        if self.trainer.is_world_process_zero():
            print(text, flush=True)


def prepare(method: str, argv: Sequence[str]) -> Job:
    """Makes a run ready to start. All that can be refused is refused here.

    Raises:
        ValueError, TypeError, OSError: an option, a file or a model is wrong; in one line or more.
        ImportError: names the package that is missing.
    """
    from transformers import PrinterCallback, ProgressCallback

    terminal.hide_library_bars()
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    options, fields = read_options(method, {name: known.config for name, known in METHODS.items()}, argv)
    train, heldout = load_data(method, options)
    args = configuration(method, options, fields)
    if "logging_steps" not in fields:
        args.logging_steps = _logging_steps(args, len(train))
    if args.device.type == "cpu":
        memory.keep_freed_memory()
        if args.process_index == 0:
            print(f"Training on the CPU in {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}", flush=True)
    checkpoint = find_checkpoint(options.resume, args)
    going_on = adapter_of(options.model)
    peft_config = adapters.lora(options, METHODS[method].task, going_on)
    if going_on is not None:
        _go_on(going_on, method, options.model, args, fields)
    progress = TrainingProgress()
    more, callbacks = rewards.online_arguments(options, args) if isinstance(options, OnlineOptions) else ({}, [])
    trainer = METHODS[method].trainer(
        model=load_model(options.model, args), args=args, train_dataset=train, eval_dataset=heldout,
        peft_config=peft_config, quantization_config=adapters.quantization(options, args),
        callbacks=[progress, *callbacks], **more,
    )  # fmt: skip
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    return Job(method, options, trainer, progress, checkpoint)


def _go_on(config: Any, method: str, model: str, args: PreferenceConfig, fields: dict[str, Any]) -> None:
    """Goes on with an adapter, which keeps the dropout that it was trained with. This is said once."""
    if getattr(config, "lora_dropout", 0.0) and "disable_dropout" not in fields:
        args.disable_dropout = False
    if args.process_index == 0:
        print(adapters.describe(model, config, issubclass(METHODS[method].trainer, ReferencedTrainer)), flush=True)


def load_data(method: str, options: RunOptions) -> tuple[Any, Any]:
    """(training data, held-out data or None). Without `--data`, the pairs that come with fastpref."""
    if options.data is None and method == "prm":
        raise ValueError("--data: got none, want solutions with labelled steps; fastpref comes with pairs only")
    if options.data is None:
        from datasets import Dataset

        train, heldout = (Dataset.from_list([pair._asdict() for pair in part]) for part in pairs.sample_pairs())
    else:
        train, heldout = load_records(options.data), None
    if options.eval_data is not None:
        heldout = load_records(options.eval_data)
    elif options.eval_split is not None:
        if len(train) < 2:
            raise ValueError(f"--eval-split: got {len(train)} record, want at least 2, one of them to hold out")
        parts = train.train_test_split(max(1, round(options.eval_split * len(train))), seed=HOLD_OUT_SEED)
        train, heldout = parts["train"], parts["test"]
    train = repeated_by_weight(train)  # after the split: a copy of a held-out record is no training data
    if method == "kto":
        train, heldout = _single_responses(train), _single_responses(heldout)
    return train, heldout


def _single_responses(dataset: Any) -> Any:
    """Pairs as two records each, mixed. KTO takes data in order, and unmixed all chosen responses come first."""
    if dataset is None or "chosen" not in dataset.column_names:
        return dataset
    return formats.unpaired(dataset).shuffle(seed=HOLD_OUT_SEED)


def configuration(method: str, options: RunOptions, fields: dict[str, Any]) -> PreferenceConfig:
    """The method's configuration. A CPU gets other defaults than a GPU."""
    name = Path(options.model.rstrip("/")).name
    defaults: dict[str, Any] = {"output_dir": f"{method}-{name}", "save_total_limit": 1}
    if options.lora_dropout:
        defaults["disable_dropout"] = False  # the adapters' is dropout, too
    if fields.get("use_cpu", not torch.accelerator.is_available()):
        defaults |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    return METHODS[method].config(**(defaults | fields))


def _logging_steps(args: PreferenceConfig, records: int) -> int:
    """As configured, and more often in a short run."""
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(records / per_step * args.num_train_epochs)
    return max(1, min(int(args.logging_steps), steps // LOGS))


def find_checkpoint(resume: str | None, args: PreferenceConfig) -> str | None:
    """The folder to resume from.

    transformers writes `trainer_state.json` last, so a checkpoint without it is not whole.
    """
    folder = Path(args.output_dir or "")
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    if resume is None:
        if whole:
            raise ValueError(
                f"--output_dir: got {folder}, which has checkpoints of an earlier run; want --resume to go on from "
                "them, or another folder"
            )
        return None
    if resume != LAST:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(f"--resume: got {resume}, want a checkpoint's folder, with trainer_state.json")
        return resume
    if not whole:
        raise ValueError(f"--resume: got no checkpoint in {folder}, want one: checkpoint-*/trainer_state.json")
    return str(max(whole, key=lambda path: int(path.name.partition("-")[2])))


def adapter_of(name: str) -> Any | None:
    """The configuration of the adapter that `--model` names. None if it is a whole model."""
    if name in OURS:
        return None
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise ValueError(f"--model: got {name!r}, which is no folder")
    return adapter_config(name)


def load_model(name: str, args: PreferenceConfig) -> str:
    """What the trainer gets as its model: a folder or a hub id, which it reads itself."""
    if name == "smollm2":
        return str(models.smollm2())
    if name == "tiny":
        folder = Path(args.output_dir or "") / "tiny"  # adapters name the model that they belong to
        with args.main_process_first(desc="making the tiny model"):
            texts = [message["content"] for pair in pairs.sample_pairs()[0] for part in pair for message in part]
            for part in models.tiny(texts):
                part.save_pretrained(folder)
        return str(folder)
    return name


def run(job: Job) -> int:
    """Runs it. Returns the exit status."""
    try:
        return _run(job)
    except ServerError as error:  # of responses or of rewards
        folder = job.trainer.args.output_dir
        print(
            f"fastpref train: {error}; --resume goes on from the last checkpoint in {folder}, if any", file=sys.stderr
        )
        return 1


def _run(job: Job) -> int:
    trainer, folder = job.trainer, job.trainer.args.output_dir
    before = None if trainer.eval_dataset is None else trainer.evaluate()
    if before is not None and isinstance(trainer, ReferencedTrainer):
        before.pop("eval_rewards/accuracies", None)  # the policy is the reference: signs of rounding errors
    try:
        with job.progress:
            trainer.train(resume_from_checkpoint=job.checkpoint)
    except KeyboardInterrupt:
        print(
            f"fastpref train: stopped; --resume goes on from the last checkpoint in {folder}, if any", file=sys.stderr
        )
        return 130
    if job.progress.nan_step is not None:
        print(
            f"fastpref train: the loss is NaN at step {job.progress.nan_step} (seen when it was logged, every "
            f"{trainer.state.logging_steps or trainer.args.logging_steps} steps); stopped, and nothing saved but "
            f"checkpoints in {folder}, if any; want a smaller --learning_rate, another precision, or other data",
            file=sys.stderr,
        )
        return 1
    after = None if before is None else _evaluated_at_the_end(trainer) or trainer.evaluate()
    trainer.save_model(folder)
    if trainer.is_world_process_zero():
        _finish(job, summary.Run.of(job.method, job.options, job.trainer, job.progress, before, after))
    if after is not None and math.isnan(after["eval_loss"]):
        print("fastpref train: the loss of the held-out data is NaN", file=sys.stderr)
        return 1
    return 0


def _evaluated_at_the_end(trainer: Any) -> dict[str, float] | None:
    """The evaluation after the last step, if training made one of the weights that are saved."""
    if trainer.args.load_best_model_at_end:
        return None
    entries = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    return next((entry for entry in entries if entry["step"] == trainer.state.global_step), None)


def _finish(job: Job, done: summary.Run) -> None:
    if done.evaluations:
        print("\n".join(done.evaluation_lines()))
    written, problem = summary.write(done, Path(job.trainer.args.output_dir))
    if problem:
        print(f"fastpref train: {problem}", file=sys.stderr)
    print(f"Saved in {job.trainer.args.output_dir}/: the model, {', '.join(written)}")
