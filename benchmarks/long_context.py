"""Long context: memory and time of one DPO step with LoRA, measured on this machine and by formula beyond.

    python -m benchmarks long_context [--lengths 2048,4096,8192] [--json benchmarks/results]

A step is one pair: a prompt and two responses, half of each sequence (`--prompt-share`). It runs with gradient
checkpointing, activation offload, adapters on all linear layers and cached reference log-probs, in a process of its
own. Measured is what the step adds to the process; the model's weights are in it before. The formula is of the same
quantity. It must be within 25 % of every measured point; then it is printed for models and lengths that do not fit.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.trainers import SIZES, model_folder
from fastpref.commands.demo.comparison import Failed, report, result_of, step_clock

WIDE = 4  # bytes of fp32, in which adapters train
TOLERANCE = 0.25
TILE = {"cpu": 80 << 20, "gpu": 1 << 30}  # bytes of logits at once: `fastpref.plans.head.tile_rows`
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # glibc gives freed tensors back, so that a peak is what is in use
BEYOND = (16384, 32768, 65536, 131072)
GB = 1e9
GPU = 80 * GB


class Shape(NamedTuple):
    """What the formula needs of a model."""

    layers: int
    d: int
    kv: int  # width of the keys of a token, and of its values
    inner: int  # of the feed-forward layer
    vocab: int
    rank: int = 16

    @classmethod
    def of(cls, config: Any, rank: int = 16) -> Shape:
        heads = config.num_attention_heads
        kv = (getattr(config, "num_key_value_heads", None) or heads) * config.hidden_size // heads
        return cls(config.num_hidden_layers, config.hidden_size, kv, config.intermediate_size, config.vocab_size, rank)

    @property
    def linear(self) -> int:
        """Weights of all layers' matrices."""
        return self.layers * (2 * self.d * self.d + 2 * self.d * self.kv + 3 * self.d * self.inner)

    @property
    def adapter(self) -> int:
        """Weights of LoRA on all linear layers."""
        return self.layers * self.rank * (2 * 2 * self.d + 2 * (self.d + self.kv) + 3 * (self.d + self.inner))


class Step(NamedTuple):
    """One pair: tokens of its prompt and of each of its two responses."""

    prompt: int
    response: int

    @classmethod
    def of(cls, length: int, share: float) -> Step:
        """Sequences of `length` tokens, of which a `share` is prompt."""
        prompt = round(length * share)
        return cls(prompt, length - prompt)

    @property
    def nodes(self) -> int:
        """Tokens that run."""
        return self.prompt + 2 * self.response

    @property
    def seen(self) -> float:
        """Pairs of a query and a key that it sees."""
        return self.prompt**2 / 2 + 2 * (self.prompt * self.response + self.response**2 / 2)


def memory(
    shape: Shape, step: Step, element: int, tile: float = TILE["gpu"], *, expanded: bool = False, moments: bool = True
) -> dict[str, float]:
    """Bytes of a step beyond the model's weights, by what takes them.

    `checkpoints`: a layer's input for each token. With activation offload they are in the host's memory.
    `layer`: what one layer keeps while it is run again for its backward, and the gradients beside it: of each token 10
    vectors of the hidden size, 4 of keys or values, 8 of the feed-forward layer's; and the gathered keys and values
    (on a CPU `expanded` to all heads) with their gradients.
    `head`: hidden states of the scored rows, their gradient and U W in fp32.
    `tile`: of logits, at most so large. It is gone when the layers' backward begins.
    `adapter`: gradients, and from the first update on AdamW's two `moments`.
    """
    gathered = 2 * (step.prompt + step.response) * 2 * (shape.d if expanded else shape.kv) * element
    numbers = 10 * shape.d + 4 * shape.kv + 8 * shape.inner
    return {
        "checkpoints": shape.layers * step.nodes * shape.d * element,
        "layer": step.nodes * numbers * element + 2 * gathered,
        "head": 2 * step.response * shape.d * (2 * WIDE + element),
        "tile": min(tile, 2 * step.response * shape.vocab * element),
        "adapter": shape.adapter * WIDE * (3 if moments else 1),
    }


def peak(sizes: dict[str, float]) -> float:
    """Bytes at the worst moment: a tile of logits, or a layer's backward."""
    rest = sum(value for name, value in sizes.items() if name not in ("layer", "tile"))
    return rest + max(sizes.get("layer", 0), sizes.get("tile", 0))


def flops(shape: Shape, step: Step) -> float:
    """Of a step: layers run twice (checkpointing) and once more for the gradient of their inputs; attention 4.5 times
    its forward; the frozen head 2 products."""
    linear = 3 * 2 * shape.linear * step.nodes
    attention = 4.5 * 4 * shape.d * shape.layers * step.seen
    return linear + attention + 2 * 2 * 2 * step.response * shape.d * shape.vocab


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _step(model: str, prompt: int, response: int, rank: int, scratch: str) -> None:
    """Measures one step in this process, and prints it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig

    from fastpref.common.memory import peak_bytes
    from fastpref.trainers import DPOConfig, DPOTrainer

    draw, vocab = torch.Generator().manual_seed(0), AutoConfig.from_pretrained(model).vocab_size
    ids = torch.randint(100, min(40000, vocab), (3, max(prompt, response)), generator=draw).tolist()
    example = {
        "prompt_ids": ids[0][:prompt], "chosen_ids": ids[1][:response], "rejected_ids": ids[2][:response],
        "ref_chosen_logps": -10.0 * response, "ref_rejected_logps": -10.0 * response,
    }  # fmt: skip
    clock = step_clock("cpu")
    config = DPOConfig(
        output_dir=scratch, per_device_train_batch_size=1, max_steps=1, bf16=False, use_cpu=True, max_length=None,
        gradient_checkpointing=True, activation_offloading=True, save_strategy="no", disable_tqdm=True,
        statistics="never", keep_freed_memory=False, precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list([example]), callbacks=[clock],
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"),
    )  # fmt: skip
    before = _resident()
    trainer.train()
    shape = Shape.of(trainer.inner.config, rank)
    found = {"seconds": clock.seconds[0], "bytes": (peak_bytes(torch.device("cpu")) or 0) - before}
    report({**found, "shape": shape, "layout": trainer.data_collator.layout})


def measure(args: argparse.Namespace) -> record.Record:
    """Runs the lengths, from the shortest on."""
    rows: list[record.Row] = []
    gate: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = str(model_folder(args.model, Path(scratch)))
        for length in args.lengths:
            step = Step.of(length, args.prompt_share)
            given = [model, str(step.prompt), str(step.response), str(args.rank), scratch]
            try:
                found = result_of("benchmarks.long_context", "--child", *given, environment=os.environ | RETURNED)
            except Failed as error:
                absent[f"{length} tokens"] = str(error)
                break
            shape = Shape(*found["shape"])
            predicted = peak(memory(shape, step, WIDE, TILE["cpu"], expanded=True, moments=False))
            rows.append(
                {
                    "case": f"{length} tokens", "provider": "fastpref", "seconds": [found["seconds"]],
                    "peak_bytes": found["bytes"], "predicted_bytes": predicted, "flops": flops(shape, step),
                    "axis": "tokens of a sequence", "x": length, "shape": found["shape"], "layout": found["layout"],
                }
            )  # fmt: skip
            off = abs(found["bytes"] / predicted - 1)
            gate.append(
                {"case": f"{length} tokens", "provider": "formula", "errors": {"memory": off},
                 "passed": off <= TOLERANCE}
            )  # fmt: skip
            print(f"{length} tokens: {found['seconds']:.1f} s, {found['bytes'] / GB:.2f} GB", flush=True)
    settings = {"model": args.model, "lengths": args.lengths, "prompt_share": args.prompt_share, "rank": args.rank}
    return record.new("long_context", settings=settings, rows=rows, gate=gate, targets=[], absent=absent)


def table(found: record.Record) -> str:
    """The measured points beside the formula, and the formula alone beyond them."""
    lines = ["| tokens | seconds | by formula | GB of the step | by formula |", "|---|---|---|---|---|"]
    rows, share = found["rows"], found["settings"]["prompt_share"]
    for row in rows:  # at the rate of the first
        seconds = rows[0]["seconds"][0] * row["flops"] / rows[0]["flops"]
        lines.append(
            f"| {row['x']:,} | {row['seconds'][0]:.1f} | {seconds:.1f} | {row['peak_bytes'] / GB:.2f} | "
            f"{row['predicted_bytes'] / GB:.2f} |"
        )
    if rows:
        shape = Shape(*rows[0]["shape"])
        for length in (n for n in BEYOND if n > rows[-1]["x"]):
            step = Step.of(length, share)
            seconds = rows[0]["seconds"][0] * flops(shape, step) / rows[0]["flops"]
            size = peak(memory(shape, step, WIDE, TILE["cpu"], expanded=True))
            lines.append(f"| {length:,} | | {seconds:,.0f} | | {size / GB:.1f} |")
    lines += ["", *(f"- absent: {case}: {why}" for case, why in found["absent"].items())] if found["absent"] else []
    return "\n".join([*lines, "", recipe(), "", record.provenance(found)])


def recipe() -> str:
    """What DPO with LoRA of an 8B model takes on one 80 GB GPU, by formula: bf16, checkpoints in the host's memory."""
    shape = Shape.of(argparse.Namespace(**SIZES["llama-8b"][1]))
    frozen = {"bf16": 2 * (shape.linear + 2 * shape.vocab * shape.d), "4 bit": 0.0}
    frozen["4 bit"] = (
        0.55 * shape.linear + 2 * 2 * shape.vocab * shape.d
    )  # NF4 with its scales; head and embeddings bf16
    lines = [
        "| sequence | responses | weights | GB on the GPU | GB of the host | fits 80 GB |",
        "|---|---|---|---|---|---|",
    ]
    for length, response in ((32768, 16384), (32768, 4096), (131072, 4096), (131072, 65536)):
        step = Step(length - response, response)
        sizes = memory(shape, step, 2)
        host = sizes.pop("checkpoints")
        for name, weights in frozen.items():
            total = weights + shape.adapter * WIDE + peak(sizes)
            lines.append(
                f"| {length:,} | {response:,} | {name} | {total / GB:.0f} | {host / GB:.0f} | "
                f"{'yes' if total <= 0.95 * GPU else 'no'} |"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        model, prompt, response, rank, scratch = argv[1:]
        _step(model, int(prompt), int(response), int(rank), scratch)
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2, tiny, a size of benchmarks.trainers, or a folder")
    add("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[2048, 4096, 8192],
        help="tokens of a sequence, the shortest first")  # fmt: skip
    add("--prompt-share", type=float, default=0.5)
    add("--rank", type=int, default=16, help="of the adapters")
    add("--json", type=Path, help="file or folder for the record")
    args = parser.parse_args(argv)
    found = measure(args)
    print("\n" + table(found))
    if args.json is not None:
        print(f"\n{record.write(found, args.json)}")
    return 1 if found["absent"] or not all(g["passed"] for g in found["gate"]) else 0


if __name__ == "__main__":
    sys.exit(main())
