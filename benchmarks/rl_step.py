"""An update of GRPO or RLOO, fastpref's trainer beside TRL's: time, peak memory and what was multiplied.

    python -m benchmarks.rl_step [--method grpo] [--model smollm2] [--samples 8] [--json benchmarks/results]

Both get the same model, prompts and scripted responses, so that no sampling is in it: what is measured is the log-probs
before the update (by policy and reference), the loss, its gradients and the optimizer. Each run is a process of its
own; the libraries take turns. Both must have the same losses.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.trainers import model_folder
from fastpref.commands.demo.comparison import Failed, report, result_of
from fastpref.common.memory import peak_bytes

LIBRARIES = ("trl", "fastpref")
LOSS_TOLERANCE = 1e-4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, those inside of fastpref's operators too. Attention's are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            self.flops += 2 * found.numel() * left.shape[-1]
        return found


def responses(number: int, end: int, longest: int) -> list[list[int]]:
    """Responses of a round, the same for both libraries."""
    source = random.Random(number)
    lengths = [source.randrange(longest // 4, longest) for _ in range(256)]
    return [[*(source.randrange(300, 1000) for _ in range(n)), end] for n in lengths]


def one(library: str, method: str, folder: str, samples: int, tokens: int, steps: int) -> dict[str, Any]:
    """Runs some updates in this process."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from fastpref.data.pairs import sample_pairs

    warnings.simplefilter("ignore")
    home = importlib.import_module("trl" if library == "trl" else "fastpref.trainers")
    tokenizer, rounds = AutoTokenizer.from_pretrained(folder), itertools.count()
    end = tokenizer.eos_token_id
    if library == "trl":

        def generated(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            found = responses(next(rounds), end, tokens)[: len(prompt_ids)]
            return (found, None) if method == "grpo" else found

        more: dict[str, Any] = {}
    else:
        from fastpref.trainers.rollouts import Sampled

        more = {"sampler": lambda prompts, sampling, numbers: [
            Sampled(ids, True) for ids in responses(next(rounds), end, tokens)[: len(prompts)]]}  # fmt: skip
    trainer_class, config_class = (getattr(home, f"{method.upper()}{kind}") for kind in ("Trainer", "Config"))
    if library == "trl":
        trainer_class._generate_single_turn = generated
    options = {"vllm_importance_sampling_correction": False} if method == "grpo" or library == "fastpref" else {}
    args = config_class(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=samples, num_generations=samples, beta=0.04,
        max_steps=steps + 1, max_completion_length=tokens, learning_rate=1e-6, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, bf16=False, use_cpu=not torch.cuda.is_available(), num_iterations=1,
        disable_dropout=True, **options,
    )  # fmt: skip
    products = Products()

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                products.flops = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                products.__exit__(None, None, None)

    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], args=args,
        train_dataset=Dataset.from_list([{"prompt": pair.prompt} for pair in sample_pairs()[0]]),
        processing_class=tokenizer, callbacks=[Count()], **more,
    )  # fmt: skip
    products.__enter__()  # for the first update, which is not timed
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "seconds": [entry["step_time"] for entry in logs[1:]], "losses": [entry["loss"] for entry in logs],
        "peak_bytes": peak_bytes(device) or 0, "flops": products.flops,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rl_step", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--method", choices=("grpo", "rloo"), default="grpo")
    add("--model", default="tiny", help="smollm2, tiny or a folder (default: %(default)s)")
    add("--samples", type=int, default=8, help="of the prompt of an update (default: %(default)s)")
    add("--tokens", type=int, default=128, help="at most, of a response (default: %(default)s)")
    add("--steps", type=int, default=4, help="that are timed (default: %(default)s)")
    add("--repeats", type=int, default=1, help="of both libraries (default: %(default)s)")
    add("--json", type=Path, help="write the record to this file or folder")
    add("--one", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        report(one(args.one, args.method, args.model, args.samples, args.tokens, args.steps))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(model_folder(args.model, Path(scratch)))
        runs: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
        for _, library in itertools.product(range(args.repeats), LIBRARIES):
            settings = [f"--{name}={getattr(args, name)}" for name in ("method", "samples", "tokens", "steps")]
            try:
                found = result_of("benchmarks.rl_step", f"--one={library}", f"--model={folder}", *settings)
            except Failed as error:
                print(f"{library}: {error}", file=sys.stderr)
                return 1
            runs[library].append(found)
    losses = [runs[library][0]["losses"] for library in LIBRARIES]
    furthest = max(abs(a - b) for a, b in zip(*losses, strict=True))
    rows = []
    for library in LIBRARIES:
        seconds = [s for run in runs[library] for s in run["seconds"]]
        row = {"case": args.method, "provider": library, "seconds": seconds, "flops": runs[library][0]["flops"],
               "peak_bytes": min(run["peak_bytes"] for run in runs[library])}  # fmt: skip
        rows.append(row)
        print(f"{library:10} {min(seconds):8.3f} s an update  {row['peak_bytes'] / 2**20:8.0f} MiB  "
              f"{row['flops'] / 1e9:10.2f} GFLOP of products")  # fmt: skip
    print(f"largest difference of losses {furthest:.1e}")
    if furthest > LOSS_TOLERANCE:
        print(f"losses: got a difference of {furthest:.1e}, want at most {LOSS_TOLERANCE}", file=sys.stderr)
        return 1
    if args.json:
        kept = {n: getattr(args, n) for n in ("method", "model", "samples", "tokens", "steps", "repeats")}
        print(record.write(record.new("rl-step", settings=kept, rows=rows), args.json))
    return 0


if __name__ == "__main__":
    sys.exit(main())
