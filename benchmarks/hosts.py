"""A step of the trainers that people have, as it comes and with fastpref's one line: time, memory, the same gradients.

    python -m benchmarks.hosts [--data pairs.json] [--model smollm2] [--json benchmarks/results]

A step is the loss and its backward pass, with references and metrics, without the optimizer. Both run in one process,
in turn, on the same trainer and batches. First the losses and gradients of both are compared with those that the host
computes in fp64.

Memory is measured in a process of its own for each. The step's peak is what it takes beyond the model. The head's peak
is that, less the peak of the backbone's forward and backward pass alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, record, suite
from benchmarks.measure import MIB
from benchmarks.suite import relative_error
from benchmarks.trainers import model_folder
from fastpref import DPOLoss, models
from fastpref.commands.demo.comparison import pairs_of, report, result_of
from fastpref.integrations import trl as fast_trl
from fastpref.integrations.transformers import batch_loss, reference_logps
from fastpref.models.attention import KWARG, packed_rows

OWN, FAST, BACKBONE = "own", "fastpref", " backbone"  # the last one behind one of the others
# (loss, gradients), relative, of fastpref against fp64: fp32 through 30 layers; bf16, where the backbone rounds
TOLERANCES = {"cpu": (1e-5, 1e-4), "cuda": (2e-3, 5e-2)}
TRAINERS = {  # host -> (module, trainer, options)
    "TRL DPOTrainer": ("trl", "DPOTrainer", {}),
    "TRL KTOTrainer": ("trl", "KTOTrainer", {}),
    "TRL SFTTrainer": ("trl", "SFTTrainer", {}),
    "TRL CPOTrainer (SimPO)": ("trl.experimental.cpo", "CPOTrainer", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "TRL ORPOTrainer": ("trl.experimental.orpo", "ORPOTrainer", {}),
}
LOOP = "plain PyTorch loop (DPO)"
HOSTS = (*TRAINERS, LOOP)
Step = Callable[[bool, int], Tensor]  # (with fastpref, number of the batch) -> loss; gradients in .grad


def trainer_step(host: str, args: argparse.Namespace, folder: Path, scratch: str) -> tuple[list[Any], Step]:
    """A step of one of TRL's trainers, built under the patch, and run under it or not.

    Returns:
        (the policy and perhaps the reference, step).
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module, name, options = TRAINERS[host]
    home, rows = importlib.import_module(module), pairs_of(args.data).to_list()
    config = getattr(home, name.replace("Trainer", "Config"))
    size = args.pairs
    if name == "KTOTrainer":
        size *= 2
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows for side in ("chosen", "rejected")
        ]  # fmt: skip
    elif name == "SFTTrainer":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    on_gpu = args.device == "cuda"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16" if on_gpu else "float32")
    with fast_trl.patched(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(home, name)(
            model=model, processing_class=AutoTokenizer.from_pretrained(folder), train_dataset=Dataset.from_list(rows),
            args=config(
                output_dir=scratch, per_device_train_batch_size=size, max_length=args.max_length, use_cpu=not on_gpu,
                bf16=on_gpu, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
                train_sampling_strategy="sequential", **options,
            ),
        )  # fmt: skip
    batches = list(itertools.islice(trainer.get_train_dataloader(), args.batches))
    trainer.model.train()
    packing = getattr(trainer, "packing", None)

    def step(with_fastpref: bool, number: int) -> Tensor:
        trainer.model.zero_grad()
        if packing is not None:
            trainer.packing = packing if with_fastpref else None  # without, the loss is TRL's
        with fast_trl.patched() if with_fastpref else contextlib.nullcontext():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batches[number % len(batches)]))
            loss.backward()
        return loss.detach()

    reference = getattr(trainer, "ref_model", None)
    return [trainer.model, *([] if reference is None else [reference])], step


def loop_step(args: argparse.Namespace, folder: Path) -> tuple[list[Any], Step]:
    """A step of a loop over logits, and of the same loop with `batch_loss`.

    Returns:
        (policy and reference, step).
    """
    from fastpref.data.collate import tokenize_pairs
    from fastpref.data.pairs import Pair
    from fastpref.integrations.transformers import pair_batch

    (model, tokenizer), (reference, _) = models.load(folder), models.load(folder)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model.to(args.device, dtype), reference.to(args.device, dtype)
    pairs = tokenize_pairs(
        [Pair(**row) for row in pairs_of(args.data).to_list()], tokenizer, max_length=args.max_length
    )
    pairs = [pairs[i % len(pairs)] for i in range(args.pairs * args.batches)]
    parts = [pairs[i : i + args.pairs] for i in range(0, len(pairs), args.pairs)]
    batches = [
        {name: value.to(args.device) for name, value in pair_batch(part, model.config.pad_token_id).items()}
        for part in parts
    ]
    loss_fn = DPOLoss(beta=0.1)

    def sums(of: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["shift_labels"]
        logps = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        del logits
        return (logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)

    def step(with_fastpref: bool, number: int) -> Tensor:
        model.zero_grad()
        batch = batches[number % len(batches)]
        if with_fastpref:
            loss = batch_loss(loss_fn, model, batch | {"ref_logps": reference_logps(reference, batch)}).loss
        else:
            with torch.no_grad():
                wanted = sums(reference, batch)
            chosen, rejected = (sums(model, batch) - wanted).chunk(2)
            loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        return loss.detach()

    return [model, reference], step


def prepare(host: str, args: argparse.Namespace, folder: Path, scratch: str) -> tuple[list[Any], Step]:
    return loop_step(args, folder) if host == LOOP else trainer_step(host, args, folder, scratch)


def check(modules: list[Any], step: Step) -> dict[str, dict[str, float]]:
    """Relative errors of the loss and of the gradients against the host's in fp64: the host's own, and those with
    fastpref."""

    def run(with_fastpref: bool) -> tuple[float, Tensor]:
        loss = step(with_fastpref, 0)
        return float(loss), torch.cat([p.grad.flatten() for p in modules[0].parameters()])

    found, dtype = {OWN: run(False), FAST: run(True)}, next(modules[0].parameters()).dtype
    for model in modules:
        model.double()
    wanted_loss, wanted = run(False)
    for model in modules:
        model.zero_grad(), model.to(dtype)
    return {
        name: {"loss": abs(loss / wanted_loss - 1), "gradients": relative_error(gradients, wanted)}
        for name, (loss, gradients) in found.items()
    }


def seconds(step: Step, args: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of every batch, `repeats` times, with and without fastpref in turn."""
    counts = {OWN: itertools.count(), FAST: itertools.count()}
    runs = {name: lambda name=name: step(name == FAST, next(counts[name])) for name in counts}
    return measure.interleave(runs, args.repeats * args.batches, torch.device(args.device), warm_up=0)


def peak(what: str, model: Any, step: Step, device: torch.device) -> int:
    """The peak memory of a step, or of the backbone's part in it.

    Packed batches change the backbone's memory, not the head's.
    """
    with_fastpref = what.startswith(FAST)
    if not what.endswith(BACKBONE):
        return measure.peak_bytes(lambda: step(with_fastpref, 0), device)
    body, calls = models.backbone(models.inner_model(model)), []

    def remember(module: Any, positional: tuple, named: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            calls.append((positional, named))

    hook = body.register_forward_pre_hook(remember, with_kwargs=True)
    step(with_fastpref, 0)
    hook.remove()
    model.zero_grad()

    def run() -> None:
        model.zero_grad()
        for positional, named in calls:
            with packed_rows() if KWARG in named else contextlib.nullcontext():
                body(*positional, **named).last_hidden_state.sum().backward()

    return measure.peak_bytes(run, device)


def child(args: argparse.Namespace) -> None:
    measure.return_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        (model, *_), step = prepare(args.host, args, Path(args.model), scratch)
        report({"bytes": peak(args.child, model, step, torch.device(args.device))})


def peak_in_process(what: str, host: str, args: argparse.Namespace, folder: Path) -> int:
    options = ["--child", what, "--host", host, "--model", str(folder), "--device", args.device]
    options += ["--pairs", str(args.pairs), "--max-length", str(args.max_length), "--batches", "1"]
    options += ["--data", *args.data] if args.data else []
    return result_of("benchmarks.hosts", *options)["bytes"]


def run(args: argparse.Namespace, save: Callable[[record.Record], object] | None = None) -> record.Record:
    """Runs host after host. `save` gets the record after each. A host that fails is listed with its error."""
    rows: list[record.Row] = []
    gate: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    settings = {n: getattr(args, n) for n in ("model", "pairs", "max_length", "batches", "repeats", "device")}
    settings["data"] = [Path(p).name for p in args.data] if args.data else "the sample"

    def so_far() -> record.Record:
        name = f"hosts-{args.device}"
        return record.new(name, settings=settings, rows=rows, gate=gate, targets=targets, absent=absent)

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(args.model, Path(scratch))
        for host in args.host or HOSTS:
            try:
                checks, measured, why = run_host(host, args, folder, scratch)
            except KeyboardInterrupt:
                absent[host] = suite.INTERRUPTED
                break
            except Exception as error:  # memory, say; the other hosts are still worth their record
                absent[host] = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{host}: {absent[host]}", flush=True)
                continue
            gate += checks
            if why:
                absent[host] = why
                continue
            rows += measured
            targets += judge(*measured)
            if save is not None:
                save(so_far())
    return so_far()


def run_host(
    host: str, args: argparse.Namespace, folder: Path, scratch: str
) -> tuple[list[dict[str, Any]], list[record.Row], str | None]:
    """(gate, rows of the host as it comes and with fastpref, why there are none)."""
    modules, step = prepare(host, args, folder, scratch)
    errors, limits = check(modules, step), TOLERANCES[args.device]
    gate = [
        {"case": host, "provider": name, "errors": found,
         "passed": all(e <= limit for e, limit in zip(found.values(), limits, strict=True))}
        for name, found in errors.items()
    ]  # fmt: skip
    if not gate[-1]["passed"]:  # fastpref's; what the host's own is stays with the host
        return gate, [], f"errors of {errors[FAST]}, want at most {limits}: times are not compared"
    times = seconds(step, args)
    del modules, step
    rows: list[record.Row] = []
    for what in (OWN, FAST):
        whole, body = (peak_in_process(what + part, host, args, folder) for part in ("", BACKBONE))
        rows.append({"case": host, "provider": what, "seconds": times[what], "peak_bytes": whole,
                     "head_bytes": whole - body})  # fmt: skip
    print(f"{host}: {errors} {[statistics.median(t) for t in times.values()]}", flush=True)
    return gate, rows, None


def judge(own: record.Row, fast: record.Row) -> list[dict[str, Any]]:
    """The project's target for TRL's DPO. The figures of the others stand without one."""
    if own["case"] != "TRL DPOTrainer":
        return []
    speed, best = sum(own["seconds"]) / sum(fast["seconds"]), min(own["seconds"]) / min(fast["seconds"])
    memory = fast["head_bytes"] / own["head_bytes"]
    return [
        {"case": own["case"], "quantity": "time / time with fastpref", "limit": 1.5, "at_most": False,
         "value": speed, "best": best, "met": speed >= 1.5},
        {"case": own["case"], "quantity": "head's memory with fastpref / without", "limit": 0.5, "at_most": True,
         "value": memory, "best": memory, "met": memory <= 0.5},
    ]  # fmt: skip


def table(found: record.Record) -> str:
    """A Markdown table. Times are means over all steps, since batches differ."""
    lines = [
        "| host | step, s | with fastpref | faster | head, MiB | with fastpref | step's peak, MiB | with fastpref |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for own, fast in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        a, b = (statistics.mean(row["seconds"]) for row in (own, fast))
        memory = [f"{row[n] / MIB:,.0f}" for n in ("head_bytes", "peak_bytes") for row in (own, fast)]
        lines.append(f"| {own['case']} | {a:.2f} | {b:.2f} | {a / b:.2f} | {' | '.join(memory)} |")
    lines += ["", *(f"- absent: {host}: {why}" for host, why in found["absent"].items())] if found["absent"] else []
    return "\n".join([*lines, "", *map(record.target_line, found["targets"]), "", record.provenance(found)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, or a folder (default: %(default)s)")
    add("--data", nargs="+", help="preference data in any format (default: the sample that fastpref ships)")
    add("--host", action="append", choices=HOSTS, help="this one (may be repeated; default: all)")
    add("--pairs", type=int, default=2, help="pairs in a batch")
    add("--batches", type=int, default=3, help="different batches")
    add("--repeats", type=int, default=1, help="rounds over the batches")
    add("--max-length", type=int, default=512)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--json", type=Path, help="file or folder for the record")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    suite.take_interrupts()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("CI", "1")  # TRL: no telemetry
    if args.child:
        args.host = args.host[0]
        child(args)
        return 0
    record.make(run, table, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
