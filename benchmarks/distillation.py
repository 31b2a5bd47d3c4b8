"""Distillation, fastpref's trainer and operator beside TRL's: seconds of a step, peak memory, the same loss.

    python -m benchmarks.distillation [--model smollm2] [--steps 8] [--json benchmarks/results]

There are two cases. `step` is updates on the data's completions by TRL's `GKDTrainer` (lmbda 0) and by fastpref's
`DistillationTrainer`, with the teacher in every step and with its hidden states cached; a run is a process of its own.
`head` is the forward and backward of the divergence from both models' hidden states, by the loss of TRL's
`DistillationTrainer` and by `linear_token_kl`.

The teacher is the student with noise on its weights. Losses must agree before times are compared.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.measure import MIB, interleave, quantile
from benchmarks.suite import INTERRUPTED, take_interrupts
from benchmarks.trainers import model_folder
from fastpref.commands.demo.comparison import Failed, report, result_of, step_clock

PROVIDERS = ("trl", "fastpref", "fastpref, cached teacher")
NOISE = 0.2  # of each weight's standard deviation, added to the teacher's
TOKENS = 512  # rows of the head's case
LOSS_TOLERANCE = {"cpu": 2e-4, "cuda": 2e-2}  # relative: a divergence is a difference of logs (TRL: of rounded logits)


def teacher_folder(student: Path, folder: Path) -> Path:
    """The student with noise on its weights, and its tokenizer."""
    import torch

    from fastpref import models

    model, tokenizer = models.load(student)
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value += NOISE * value.std().nan_to_num() * torch.randn_like(value)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "teacher")
    return folder / "teacher"


def conversations(tokenizer: Any, max_length: int, number: int) -> Any:
    """The sample's prompts with their chosen responses, those that are within `max_length` tokens."""
    from datasets import Dataset

    from fastpref.data.pairs import sample_pairs

    rows = [[*pair.prompt, *pair.chosen] for pair in sample_pairs()[0]]
    short = [row for row in rows if len(tokenizer.apply_chat_template(row)["input_ids"]) <= max_length]
    return Dataset.from_list([{"messages": short[i % len(short)]} for i in range(number)])


def train(provider: str, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Trains by one provider, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpref.common.memory import peak_bytes

    on_gpu, clock = settings["device"] == "cuda", step_clock(settings["device"])
    tokenizer = AutoTokenizer.from_pretrained(settings["student"])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=dtype) for name in ("student", "teacher")
    )
    data = conversations(tokenizer, settings["max_length"], settings["steps"] * settings["batch_size"])
    options: dict[str, Any] = {
        "output_dir": f"{scratch}/out", "per_device_train_batch_size": settings["batch_size"],
        "max_steps": settings["steps"], "logging_steps": 1, "bf16": on_gpu, "use_cpu": not on_gpu,
        "learning_rate": 1e-6, "max_length": settings["max_length"], "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "beta": settings["beta"], "lmbda": 0.0,
        "train_sampling_strategy": "sequential", "temperature": 1.0,
    }  # fmt: skip
    begin = time.perf_counter()
    if provider == "trl":
        os.environ["CI"] = "1"  # no telemetry
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        trainer: Any = GKDTrainer(student, teacher, GKDConfig(**options), None, data, processing_class=tokenizer,
                                  callbacks=[clock])  # fmt: skip
    else:
        from fastpref.trainers import DistillationConfig, DistillationTrainer

        cached: dict[str, Any] = (
            {"cache_teacher": True, "teacher_cache": f"{scratch}/cache"} if "cached" in provider else {}
        )
        config = DistillationConfig(**options, **cached)
        trainer = DistillationTrainer(student, teacher, config, data, processing_class=tokenizer, callbacks=[clock])
        del student, teacher  # a cached teacher is freed
    ready = time.perf_counter()
    loss = trainer.train().training_loss
    peak = peak_bytes(torch.device(settings["device"])) or 0
    return {"seconds": clock.seconds[1:], "setup_seconds": ready - begin, "peak_bytes": peak, "loss": loss}


def train_in_process(provider: str, settings: dict[str, Any], scratch: str) -> dict[str, Any]:
    """Trains by one provider, in a process of its own.

    Raises:
        Failed: it stopped with an error.
    """
    folder = tempfile.mkdtemp(dir=scratch)
    try:
        return result_of("benchmarks.distillation", "--worker", provider, json.dumps(settings), folder)
    except Failed as error:
        raise Failed(f"{provider}: {error}") from None


def measure_step(settings: dict[str, Any], scratch: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of the case `step`."""
    runs: dict[str, list[dict[str, Any]]] = {provider: [] for provider in PROVIDERS}
    for _ in range(repeats):
        for provider, found in runs.items():
            found.append(train_in_process(provider, settings, scratch))
            print(f"step: {provider} {found[-1]}", flush=True)
    return [
        {"case": "step", "provider": provider, "seconds": [s for run in found for s in run["seconds"]],
         "peak_bytes": max(run["peak_bytes"] for run in found), "loss": found[0]["loss"],
         "setup_seconds": [run["setup_seconds"] for run in found]}
        for provider, found in runs.items()
    ]  # fmt: skip


def measure_head(settings: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Rows of the case `head`: forward and backward on random hidden states of the models' heads."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    from fastpref import linear_token_kl

    device = torch.device(settings["device"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight, ref_weight = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=dtype).get_output_embeddings().weight.detach()
        for name in ("student", "teacher")
    )
    weight, ref_weight = weight.to(device).requires_grad_(), ref_weight.to(device)
    torch.manual_seed(0)
    hidden = torch.randn(1, TOKENS, weight.shape[1], device=device, dtype=dtype).requires_grad_()
    ref_hidden = hidden.detach() + 0.1 * torch.randn_like(hidden)
    mask = torch.ones(1, TOKENS, device=device, dtype=torch.long)
    beta = settings["beta"]
    direction = {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd")

    def trl() -> Any:
        return _chunked_divergence_loss(hidden, ref_hidden, weight, ref_weight, mask, beta)[0]

    def ours() -> Any:
        return linear_token_kl(hidden, weight, ref_hidden, ref_weight, direction=direction, beta=beta).kl.mean()

    def step(loss: Callable[[], Any]) -> None:
        hidden.grad = weight.grad = None
        loss().backward()

    calls = {"trl": trl, "fastpref": ours}
    losses = {name: float(call().detach()) for name, call in calls.items()}
    found = interleave({name: functools.partial(step, call) for name, call in calls.items()}, repeats, device)
    return [
        {"case": "head", "provider": name, "seconds": seconds, "peak_bytes": 0, "loss": losses[name],
         "setup_seconds": [0.0]}
        for name, seconds in found.items()
    ]  # fmt: skip


def measure(args: argparse.Namespace, save: Callable[[record.Record], object] | None = None) -> record.Record:
    """Runs case after case. `save` gets the record after each. One that fails, or whose losses differ, is absent."""
    rows: list[record.Row] = []
    gate: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    settings = {name: getattr(args, name) for name in ("model", "steps", "batch_size", "max_length", "device", "beta")}
    with tempfile.TemporaryDirectory() as scratch:
        student = model_folder(args.model, Path(scratch))
        given = settings | {"student": str(student), "teacher": str(teacher_folder(student, Path(scratch)))}
        cases: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "head": lambda: measure_head(given, args.head_repeats),
            "step": lambda: measure_step(given, scratch, args.repeats),
        }
        for case, run in cases.items():
            try:
                found = run()
            except (RuntimeError, ImportError) as error:
                absent[case] = str(error)
                continue
            except KeyboardInterrupt:
                absent[case] = INTERRUPTED
                break
            losses = [row["loss"] for row in found]
            difference = (max(losses) - min(losses)) / max(losses)
            passed = math.isfinite(difference) and difference <= LOSS_TOLERANCE[args.device]
            gate.append({"case": case, "provider": "fastpref", "errors": {"loss": difference}, "passed": passed})
            if not passed:
                absent[case] = f"the losses differ by a share of {difference:.1e}: not comparing the times"
                continue
            rows += found
            if save is not None:
                save(record.new("distillation", settings=settings, rows=rows, gate=gate, absent=absent))
    return record.new("distillation", settings=settings, rows=rows, gate=gate, absent=absent)


def table(found: record.Record) -> str:
    """A Markdown table."""
    lines = ["| case | library | s (p20 to p80) | over TRL | peak, MiB | setup, s |", "|---|---|---|---|---|---|"]
    means = {(row["case"], row["provider"]): sum(row["seconds"]) / len(row["seconds"]) for row in found["rows"]}
    for row in found["rows"]:
        mean, seconds = means[row["case"], row["provider"]], row["seconds"]
        peak = f"{row['peak_bytes'] / MIB:,.0f}" if row["peak_bytes"] else "-"
        lines.append(
            f"| {row['case']} | {row['provider']} | {mean:.3f} ({quantile(seconds, 0.2):.3f} to "
            f"{quantile(seconds, 0.8):.3f}) | {means[row['case'], 'trl'] / mean:.2f} x | {peak} | "
            f"{max(row['setup_seconds']):.1f} |"
        )
    lines += ["", *(f"- absent: {case}: {why}" for case, why in found["absent"].items())] if found["absent"] else []
    return "\n".join([*lines, "", record.provenance(found)])


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--worker"]:
        warnings.simplefilter("ignore")
        report(train(argv[1], json.loads(argv[2]), argv[3]))
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, a size of `benchmarks.trainers`, or a folder")
    add("--steps", type=int, default=8)
    add("--batch-size", type=int, default=2)
    add("--max-length", type=int, default=512)
    add("--beta", type=float, default=0.5)
    add("--repeats", type=int, default=1, help="processes of each library in the case `step`")
    add("--head-repeats", type=int, default=5)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--json", type=Path, help="file or folder for the record")
    args = parser.parse_args(argv)
    take_interrupts()
    found = record.make(measure, table, args)
    return 1 if found["absent"] else 0


if __name__ == "__main__":
    sys.exit(main())
