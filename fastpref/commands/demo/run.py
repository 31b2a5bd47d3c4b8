"""`fastpref demo`: checks this machine's numerics, trains a small model with DPO, compares its next steps to TRL's.

The training is that of `fastpref train dpo`. A prompt runs once for its two responses, and the reference's log-probs
are kept on disk. `examples/plain_loop.py` shows a loop of your own around the same loss.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.common import terminal
from fastpref.online.command import at_least

QUICK_STEPS = 12
COMPARED_STEPS = 2  # the first of them warms up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, positive = parser.add_argument, partial(at_least, least=0, exclusive=True)
    add("--data", metavar="FILE", help="preference pairs, as `fastpref train dpo` takes them (default: the sample)")
    add("--model", metavar="PATH", help="a transformers checkpoint, or smollm2 (the default) or tiny (with --quick)")
    add("--output", default="demo-model", metavar="DIR", help="where the trained model goes (default: %(default)s)")
    add("--epochs", type=positive(int), default=1, help="passes over the training pairs (default: %(default)s)")
    add("--steps", type=positive(int), help="optimizer steps, in place of --epochs")
    add("--batch-size", type=positive(int), default=4, help="pairs a step (default: %(default)s)")
    add("--max-length", type=positive(int), default=512, help="tokens a sequence (default: %(default)s)")
    add("--lr", type=positive(float), help="peak learning rate (default: 2e-5; 2e-3 for the tiny model)")
    add("--beta", type=positive(float), default=0.1, help="strength of the KL constraint (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the pairs (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--quick", action="store_true", help=f"{QUICK_STEPS} steps, on a tiny random model unless --model is given")
    add("--no-validate", dest="validate", action="store_false", help="skip the check of the numerics")
    add("--no-compare", dest="compare", action="store_false", help="skip the comparison with TRL")


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    try:
        from fastpref.commands.train import job as training

        job = training.prepare("dpo", options_of(args))
    except ModuleNotFoundError as error:
        print(f"fastpref demo: {error}; run `pip install 'fastpref[demo]'`", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"fastpref demo: {error}", file=sys.stderr)
        return 2
    if args.validate and not validate():
        print("The numerics are wrong on this machine (above): not training on them.", file=sys.stderr)
        return 1
    terminal.heading(
        f"DPO on {len(job.trainer.train_dataset)} pairs, {args.batch_size} a step, beta {args.beta}, "
        f"on {job.trainer.args.device}"
    )
    status = training.run(job)
    if status == 0 and args.compare:
        status = compare(args, job)
    terminal.heading(f"Done in {time.perf_counter() - begin:.0f} s")
    picture = Path(args.output, "summary.png")
    if picture.exists():
        print(f"What it learnt, as a picture: {picture}; with every setting: {picture.with_suffix('.html')}")
    return status


def options_of(args: argparse.Namespace) -> list[str]:
    """The arguments as `fastpref train dpo` takes them."""
    model = args.model or ("tiny" if args.quick else "smollm2")
    if model == "smollm2":
        print("Loading SmolLM2-135M-Instruct (the first time it is converted, half a minute)", flush=True)
    values = {
        "model": model, "output_dir": args.output, "num_train_epochs": args.epochs, "max_length": args.max_length,
        "per_device_train_batch_size": args.batch_size, "per_device_eval_batch_size": args.batch_size,
        "learning_rate": args.lr or (2e-3 if model == "tiny" else 2e-5), "warmup_steps": 0.1, "beta": args.beta,
        "seed": args.seed, "save_strategy": "no",
    }  # fmt: skip
    if args.data is not None:
        values |= {"data": args.data, "eval_split": 0.1}
    if args.steps or args.quick:
        values["max_steps"] = args.steps or QUICK_STEPS
    if args.device == "cpu":
        values["use_cpu"] = True
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def validate() -> bool:
    """Checks the numerics of this machine. Returns whether all is right."""
    from fastpref.commands.cli import main

    terminal.heading("Numerics on this machine, against fp64")
    return main(["validate", "--quick"]) == 0


def compare(args: argparse.Namespace, job: Any) -> int:
    """Runs the trained model's next steps with fastpref and with TRL.

    Returns 1 if the two do not compute the same loss.
    """
    from fastpref.commands.demo import comparison

    device = job.trainer.args.device.type
    terminal.heading(
        f"The next {COMPARED_STEPS} steps beside TRL's DPOTrainer: the same model, pairs, order and settings"
    )
    run = comparison.Run(
        model=args.output, data=[args.data] if args.data else None, steps=COMPARED_STEPS, batch_size=args.batch_size,
        max_length=args.max_length, device=device,
    )  # fmt: skip
    try:
        found = comparison.compare(run)
    except comparison.Failed as error:
        print(f"Not compared: {error}")
        return 0
    comparison.show(found, run)
    return 0 if comparison.same_loss(found, device) else 1
