"""DPO training end to end, fastpref's trainer beside TRL's: pairs per second and peak memory of the same steps.

    python -m benchmarks trainers --data pairs.json [--model smollm2] [--steps 8] [--json benchmarks/results]
    python -m benchmarks trainers --cases all --pairs-steps 3       all pairs of four responses, too

Each run is a process of its own, so that its peak is its own. The libraries take turns, `--repeats` times. Both get the
same model, data, order, truncation and options, and must end with the same mean loss.

The reference's log-probs are computed in every step, or before training; what that took is a column of its own, and is
not in the rate. The cases "all pairs" take all six pairs of four responses to a prompt as a batch, from
`benchmarks.rankings`, whatever `--data` is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import rankings, record
from benchmarks.measure import MIB, quantile
from benchmarks.suite import INTERRUPTED, take_interrupts
from fastpref.commands.demo.comparison import LIBRARIES, LOSS_TOLERANCE, Failed, Result, Run, train_in_process

CASES = {"online reference": False, "precomputed reference": True}
ALL_PAIRS = {"all pairs, online reference": False, "all pairs, precomputed reference": True}
PAIRS = 6  # of four responses
SIZES = {  # built from a config, with random weights: Llama-3.2-1B, Qwen2.5-0.5B, Llama-3.1-8B (their config.json)
    "llama-1b": ("Llama", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "qwen-0.5b": ("Qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }),
    "llama-8b": ("Llama", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }),
}  # fmt: skip
TARGETS = {  # pairs per second over TRL's, at least
    ("cpu", "online reference"): 2.4, ("cpu", "precomputed reference"): 2.5,
    ("cuda", "online reference"): 1.5, ("cuda", "precomputed reference"): 1.5,
    ("cpu", "all pairs, online reference"): 5.0, ("cpu", "all pairs, precomputed reference"): 5.0,
}  # fmt: skip
MEMORY_TARGET = {case: 0.75 for case in CASES} | {case: 0.6 for case in ALL_PAIRS}  # of TRL's, at most


def model_folder(name: str, folder: Path) -> Path:
    """A checkpoint with its tokenizer."""
    import torch
    import transformers

    from fastpref import models
    from fastpref.data.pairs import sample_pairs
    from fastpref.online.loading import default_device

    if name == "smollm2":
        return models.smollm2()
    if name not in SIZES and name != "tiny":
        return Path(name)
    target = folder / name
    if not target.exists():
        texts = [m["content"] for pair in sample_pairs()[0] for messages in pair for m in messages]
        model, tokenizer = models.tiny(texts)
        if name in SIZES:
            family, config = SIZES[name]
            ids = {n: getattr(tokenizer, n) for n in ("pad_token_id", "eos_token_id")}
            config = getattr(transformers, f"{family}Config")(**config, **ids, max_position_embeddings=4096)
            with default_device():  # a CPU takes four minutes for 8B random numbers
                model = transformers.AutoModelForCausalLM.from_config(config, dtype="bfloat16")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        del model
        torch.cuda.empty_cache()  # for the processes that train it
    return target


def measure(args: argparse.Namespace, save: Callable[[record.Record], object] | None = None) -> record.Record:
    """Runs case after case. `save` gets the record after each. A library that fails costs its case alone."""
    rows: list[record.Row] = []
    gate: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    names = ("model", "steps", "batch_size", "max_length", "device", "repeats", "checkpointing", "lora_r")
    settings = {name: getattr(args, name) for name in names} | {"all_pairs_steps": args.pairs_steps}
    settings["data"] = [Path(p).name for p in args.data] if args.data else "the sample"

    def so_far() -> record.Record:
        suite = "all-pairs" if args.cases == "all-pairs" else "trainers"
        return record.new(suite, settings=settings, rows=rows, gate=gate, targets=targets, absent=absent)

    with tempfile.TemporaryDirectory() as scratch:
        model = model_folder(args.model, Path(scratch))
        every_pair = str(rankings.pairs_file(Path(scratch)))
        for case, precompute in _cases(args.cases).items():
            found: dict[str, list[Result]] = {library: [] for library in LIBRARIES}
            run = _run_of(args, model, precompute)
            if case in ALL_PAIRS:
                run = replace(run, data=[every_pair], steps=args.pairs_steps, batch_size=PAIRS)
            try:
                for _ in range(args.repeats):
                    for library in LIBRARIES:
                        found[library].append(train_in_process(library, run, scratch))
                        print(f"{case}: {library} {found[library][-1]}", flush=True)
            except Failed as error:
                absent[case] = str(error)
                print(f"{case}: {error}", flush=True)
                continue
            except KeyboardInterrupt:
                absent[case] = INTERRUPTED
                break
            difference = abs(found["trl"][0].loss - found["fastpref"][0].loss)
            passed = difference <= LOSS_TOLERANCE[args.device]
            gate.append({"case": case, "provider": "fastpref", "errors": {"loss": difference}, "passed": passed})
            if not passed:
                absent[case] = f"the mean losses differ by {difference:.1e}: not comparing the times"
                continue
            rows += [_row(case, library, runs) for library, runs in found.items()]
            targets += _targets(case, rows[-2], rows[-1], args.device)
            if save is not None:
                save(so_far())
    return so_far()


def _cases(wanted: str) -> dict[str, bool]:
    return {"pair": CASES, "all-pairs": ALL_PAIRS, "all": CASES | ALL_PAIRS}[wanted]


def _run_of(args: argparse.Namespace, model: Path, precompute: bool) -> Run:
    return Run(
        str(model), args.data, args.steps, args.batch_size, args.max_length, args.device, precompute,
        args.checkpointing, args.lora_r,
    )  # fmt: skip


def _row(case: str, library: str, runs: list[Result]) -> dict[str, Any]:
    return {
        "case": case, "provider": library, "seconds": [s for run in runs for s in run.seconds],
        "peak_bytes": max(run.peak_bytes or 0 for run in runs), "setup_seconds": [run.setup_seconds for run in runs],
        "loss": runs[0].loss,
    }  # fmt: skip


def _targets(case: str, trl: dict[str, Any], ours: dict[str, Any], device: str) -> list[dict[str, Any]]:
    speed = sum(trl["seconds"]) / sum(ours["seconds"])
    best = min(trl["seconds"]) / min(ours["seconds"])
    memory = ours["peak_bytes"] / trl["peak_bytes"]
    most, found = MEMORY_TARGET[case], []
    if (device, case) in TARGETS:
        limit = TARGETS[device, case]
        found.append({"case": case, "quantity": "pairs per second / TRL's", "limit": limit, "at_most": False,
                      "value": speed, "best": best, "met": speed >= limit})  # fmt: skip
    return [
        *found,
        {"case": case, "quantity": "peak memory / TRL's", "limit": most, "at_most": True, "value": memory,
         "best": memory, "met": memory <= most},
    ]  # fmt: skip


def table(found: record.Record) -> str:
    """A Markdown table. A step's time is the mean over all, since steps differ in length."""
    lines = [
        "| reference | library | pairs/s | step, s (p20 to p80) | peak, MiB | setup, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        seconds = row["seconds"]
        pairs = PAIRS if row["case"] in ALL_PAIRS else found["settings"]["batch_size"]
        mean = sum(seconds) / len(seconds)
        spread = f"{mean:.2f} ({quantile(seconds, 0.2):.2f} to {quantile(seconds, 0.8):.2f})"
        setup = sum(row["setup_seconds"]) / len(row["setup_seconds"])
        lines.append(
            f"| {row['case'].removesuffix(' reference')} | {row['provider']} | {pairs / mean:.3f} | {spread} | "
            f"{row['peak_bytes'] / MIB:,.0f} | {setup:.1f} |"
        )
    lines += ["", *map(record.target_line, found["targets"])]
    lines += ["", *(f"- absent: {case}: {why}" for case, why in found["absent"].items())] if found["absent"] else []
    return "\n".join([*lines, "", record.provenance(found)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2", help=f"smollm2, tiny, {', '.join(SIZES)}, or a folder (default: %(default)s)")
    add("--data", nargs="+", help="preference data in any format (default: the sample that fastpref ships)")
    add("--steps", type=int, default=8)
    add("--batch-size", type=int, default=2)
    add("--max-length", type=int, default=512)
    add("--cases", default="pair", choices=["pair", "all-pairs", "all"], help="one pair a prompt, all pairs, or both")
    add("--pairs-steps", type=int, default=4, help="steps where a batch has all six pairs (default: %(default)s)")
    add("--repeats", type=int, default=1)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--lora-r", type=int, default=0, metavar="R", help="train LoRA adapters of this rank on all linear layers")
    add("--checkpointing", action="store_true", help="recompute activations in the backward (TRL's default)")
    add("--json", type=Path, help="file or folder for the record")
    args = parser.parse_args(argv)
    take_interrupts()
    found = record.make(measure, table, args)
    return 1 if found["absent"] else 0


if __name__ == "__main__":
    sys.exit(main())
