"""DPO steps on pairs about images: fastpref's trainer and TRL's under our patch, beside TRL's own. Time and memory.

    python -m benchmarks.vision [--device cuda] [--size 2b] [--json benchmarks/results]

The model is a Qwen2-VL with random weights. Each run is a process of its own, so that its peak is its own; the
libraries take turns, `--repeats` times. All get the same model, pairs, order and options, with the reference's
log-probs computed in every step, and must end with the same mean loss. A step's time includes its batch, images and
all. The tokens and images that run through the policy are counted over the run.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.measure import MIB
from benchmarks.suite import take_interrupts
from fastpref.commands.demo.comparison import Failed, report, result_of

LIBRARIES = ("trl", "patched", "fastpref")
TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, dict[str, Any]] = {  # text and vision; 2b as Qwen2-VL-2B's config.json
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 512},
        "vision": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "section": [2, 3, 3],
    },
    "small": {
        "text": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
                 "num_key_value_heads": 2, "vocab_size": 32768},
        "vision": {"embed_dim": 256, "depth": 8, "num_heads": 4}, "section": [8, 12, 12],
    },
    "2b": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                 "num_key_value_heads": 2, "vocab_size": 151936},
        "vision": {"embed_dim": 1280, "depth": 32, "num_heads": 16}, "section": [16, 24, 24],
    },
}  # fmt: skip


def model_and_processor(size: str, dtype: str) -> tuple[Any, Any]:
    """A Qwen2-VL with random weights, and a processor whose tokens are bytes. It needs no torchvision."""
    import torch
    from transformers import (
        ProcessorMixin,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        Qwen2VLProcessor,
    )  # fmt: skip

    from fastpref.models.small_vision import byte_tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKENS]
    tokenizer = byte_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids: Any = tokenizer.convert_tokens_to_ids(list(TOKENS))
    start, end, image, video = ids

    class Processor(Qwen2VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
            self.image_token, self.image_token_id = TOKENS[2], image
            self.video_token, self.video_token_id = TOKENS[3], video
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    shape = SIZES[size]
    rope = {"rope_type": "default", "mrope_section": shape["section"], "rope_theta": 1e6}
    config = Qwen2VLConfig(
        text_config={
            **shape["text"], "rope_parameters": rope, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
        },
        vision_config={**shape["vision"], "hidden_size": shape["text"]["hidden_size"], "mlp_ratio": 4},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).to(getattr(torch, dtype))
    return model, Processor(Qwen2VLImageProcessorPil(), tokenizer, TEMPLATE)


def pairs(args: argparse.Namespace) -> Any:
    from datasets import Dataset

    from fastpref.data.shapes import shape_pairs

    found = shape_pairs(args.steps * args.batch_size, args.pixels)
    for i, row in enumerate(found):  # as long as people's responses are
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            row[side][0]["content"] = (text + " I am sure of it.") * (3 + (i + len(text)) % 4)
    return Dataset.from_list(found)


def train(library: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains with one library in this process, and measures its steps."""
    import torch
    import trl
    from transformers import TrainerCallback

    from fastpref import trainers
    from fastpref.common.memory import peak_bytes
    from fastpref.integrations import trl_trainers

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if args.device == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    half = args.device == "cuda"
    model, processor = model_and_processor(args.size, "bfloat16" if half else "float32")
    kinds = {
        "trl": (trl.DPOTrainer, trl.DPOConfig),
        "patched": (trl_trainers.DPOTrainer, trl.DPOConfig),
        "fastpref": (trainers.DPOTrainer, trainers.DPOConfig),
    }
    trainer_class, config_class = kinds[library]
    clock, begin = Clock(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            folder, per_device_train_batch_size=args.batch_size, max_steps=args.steps, learning_rate=1e-6,
            logging_steps=1, report_to="none", save_strategy="no", use_cpu=not half, bf16=half,
            disable_tqdm=True, max_length=None,
            gradient_checkpointing=args.checkpointing, train_sampling_strategy="sequential", dataloader_num_workers=0,
            precompute_ref_log_probs=False,
        )  # fmt: skip
        trainer = trainer_class(
            model, ref_model=copy.deepcopy(model), args=config, train_dataset=pairs(args), processing_class=processor,
            callbacks=[clock],
        )  # fmt: skip
        setup = time.perf_counter() - begin
        counts = count(trainer)
        if half:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": [end - begin for begin, end in itertools.pairwise(clock.ends)],
        "peak_bytes": peak_bytes(torch.device(args.device)) or 0, "setup_seconds": setup,
        "loss": sum(losses) / len(losses), **counts,
    }  # fmt: skip


def count(trainer: Any) -> dict[str, int]:
    """Counts the tokens and images of the policy's forwards while it trains. The dictionary fills up then."""
    counts = {"tokens": 0, "images": 0}
    body = trainer.accelerator.unwrap_model(trainer.model).model

    def tokens(module: Any, args: Any, kwargs: Any) -> None:
        counts["tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    def images(module: Any, args: Any, kwargs: Any) -> None:
        counts["images"] += len(kwargs["grid_thw"])

    body.language_model.register_forward_pre_hook(tokens, with_kwargs=True)
    body.visual.register_forward_pre_hook(images, with_kwargs=True)
    return counts


def measure(args: argparse.Namespace, save: Any = None) -> record.Record:
    """Runs the libraries in turns, each in a process of its own. `save` gets the record after each turn."""
    found: dict[str, list[dict[str, Any]]] = {library: [] for library in LIBRARIES}
    names = ("size", "steps", "batch_size", "pixels", "device", "repeats", "checkpointing")
    settings = {name: getattr(args, name) for name in names}
    absent: dict[str, str] = {}

    def so_far() -> record.Record:
        rows = [row(library, runs) for library, runs in found.items() if runs]
        losses = {library: runs[0]["loss"] for library, runs in found.items() if runs}
        limit = 1e-4 if args.device == "cpu" else 1e-2  # in bf16 the hosts round differently
        gate = [
            {"case": "mean loss", "provider": library, "errors": {"loss": abs(loss - losses["trl"])},
             "passed": abs(loss - losses["trl"]) <= limit}
            for library, loss in losses.items() if "trl" in losses
        ]  # fmt: skip
        return record.new("vision", settings=settings, rows=rows, gate=gate, absent=absent)

    for _ in range(args.repeats):
        for library in LIBRARIES:
            options = [f"--{name.replace('_', '-')}={settings[name]}" for name in names[:-1]]
            options += ["--checkpointing"] * args.checkpointing
            try:
                found[library].append(result_of("benchmarks.vision", "--only", library, *options))
            except Failed as error:
                absent[library] = str(error)
                print(f"{library}: {error}", flush=True)
                continue
            print(f"{library} {found[library][-1]}", flush=True)
        if save is not None:
            save(so_far())
    return so_far()


def row(library: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "case": "online reference", "provider": library, "seconds": [s for run in runs for s in run["seconds"]],
        "peak_bytes": max(run["peak_bytes"] for run in runs), "setup_seconds": [run["setup_seconds"] for run in runs],
        "loss": runs[0]["loss"], "tokens": runs[0]["tokens"], "images": runs[0]["images"],
    }  # fmt: skip


def table(found: record.Record) -> str:
    """A Markdown table. A step's time is the mean over all, without the first of each run."""
    lines = [
        "| library | step, s | peak, MiB | policy tokens | policy images | setup, s |",
        "|---|---|---|---|---|---|",
    ]
    for entry in found["rows"]:
        seconds, setup = entry["seconds"], entry["setup_seconds"]
        mean = sum(seconds) / max(1, len(seconds))
        lines.append(
            f"| {entry['provider']} | {mean:.3f} | {entry['peak_bytes'] / MIB:,.0f} | {entry['tokens']} | "
            f"{entry['images']} | {sum(setup) / len(setup):.1f} |"
        )
    lines += [f"- losses of {gate['provider']} and TRL differ: {gate['errors']}" for gate in found["gate"]
              if not gate["passed"]]  # fmt: skip
    lines += [f"- absent: {library}: {why}" for library, why in found["absent"].items()]
    return "\n".join([*lines, "", record.provenance(found)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="small", help="of the model (default: %(default)s)")
    add("--steps", type=int, default=6)
    add("--batch-size", type=int, default=2)
    add("--pixels", type=int, default=224, help="width and height of a picture (default: %(default)s)")
    add("--repeats", type=int, default=1)
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--checkpointing", action="store_true", help="recompute activations in the backward (TRL's default)")
    add("--only", choices=LIBRARIES, help="one library, in this process")
    add("--json", type=Path, help="file or folder for the record")
    args = parser.parse_args(argv)
    if args.only is not None:
        report(train(args.only, args))
        return 0
    take_interrupts()
    found = record.make(measure, table, args)
    return 1 if found["absent"] or not all(gate["passed"] for gate in found["gate"]) else 0


if __name__ == "__main__":
    sys.exit(main())
