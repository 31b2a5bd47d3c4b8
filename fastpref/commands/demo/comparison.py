"""Trains with DPO by fastpref's trainer and by TRL's, step for step: seconds, peak memory, the same loss.

Each run is a process of its own, so that its peak is its own:

    python -m fastpref.commands.demo.comparison LIBRARY RUN SCRATCH
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

LIBRARIES = ("trl", "fastpref")
NAMES = {"trl": "TRL", "fastpref": "fastpref"}
LOSS_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-3}  # of the mean loss: fp32; bf16, where TRL rounds its logits
MIB = 1 << 20
RESULT = "RESULT "  # what the line of a process begins with that has its result


@dataclass(frozen=True)
class Run:
    """What both libraries are given."""

    model: str
    data: list[str] | None  # files in any format; None: the sample
    steps: int
    batch_size: int
    max_length: int
    device: str
    precompute: bool = False  # the reference's log-probs before training, instead of in every step
    checkpointing: bool = False
    lora_r: int = 0  # 0: all parameters


@dataclass(frozen=True)
class Result:
    """What one run took."""

    seconds: list[float]  # of every step but the first, which warms up
    setup_seconds: float
    peak_bytes: int | None
    loss: float  # mean over the steps


class Failed(RuntimeError):
    """A library is not installed, or stopped with an error."""


def step_clock(device: str) -> Any:
    """A callback for a trainer; its `seconds` are those of each step, on a GPU until its work is done."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.begun = 0.0

        def _now(self) -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = self._now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(self._now() - self.begun)

    return Clock()


def report(result: dict[str, Any]) -> None:
    """Prints what `result_of` reads in the process that has started this one."""
    print(RESULT + json.dumps(result), flush=True)


def result_of(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What `python -m module arguments` reports, in a process of its own.

    Raises:
        Failed: it stopped with an error, or without a result. The message is its last line.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        raise Failed((done.stderr.strip().splitlines() or ["no result"])[-1])
    return json.loads(lines[-1].removeprefix(RESULT))


def pairs_of(files: list[str] | None) -> Any:
    """`prompt`, `chosen`, `rejected` of preference data in any format, in its order.

    Without files it is the sample that comes with fastpref.
    """
    from datasets import Dataset

    from fastpref.data.files import load_records
    from fastpref.data.formats import paired
    from fastpref.data.pairs import sample_pairs

    if files is None:
        return Dataset.from_list([pair._asdict() for pair in sample_pairs()[0]])
    return paired(load_records(files)).select_columns(["prompt", "chosen", "rejected"])


def train(library: str, run: Run, scratch: str) -> Result:
    """Trains with one library, in this process."""
    import torch
    from transformers import AutoTokenizer

    from fastpref.common.memory import peak_bytes

    on_gpu = run.device == "cuda"
    extra: dict[str, Any] = {}
    if library == "trl":
        os.environ["CI"] = "1"  # no telemetry
        from trl import DPOConfig, DPOTrainer
    else:
        from fastpref.trainers import DPOConfig, DPOTrainer  # type: ignore[assignment]

        extra = {"reference_cache": scratch}
    dataset = pairs_of(run.data)
    wanted = run.steps * run.batch_size
    dataset = dataset.select([i % len(dataset) for i in range(wanted + wanted // 2 + 2)])

    config = DPOConfig(
        output_dir=f"{scratch}/{library}", per_device_train_batch_size=run.batch_size, max_steps=run.steps,
        logging_steps=10, bf16=on_gpu, use_cpu=not on_gpu, learning_rate=1e-6, max_length=run.max_length,
        gradient_checkpointing=run.checkpointing, save_strategy="no", disable_tqdm=True, report_to="none",
        train_sampling_strategy="sequential", precompute_ref_log_probs=run.precompute,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"}, **extra,
    )  # fmt: skip
    adapter = None
    if run.lora_r:
        from peft import LoraConfig

        adapter = LoraConfig(task_type="CAUSAL_LM", r=run.lora_r, target_modules="all-linear")
    clock, begin = step_clock(run.device), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    trainer = DPOTrainer(
        run.model, None, config, None, dataset, processing_class=tokenizer, callbacks=[clock], peft_config=adapter
    )
    ready = time.perf_counter()
    loss = trainer.train().training_loss
    return Result(clock.seconds[1:], ready - begin, peak_bytes(torch.device(run.device)), loss)


def train_in_process(library: str, run: Run, scratch: str) -> Result:
    """Trains with one library, in a process of its own.

    Raises:
        Failed: the library is not installed, or stopped with an error.
    """
    folder = tempfile.mkdtemp(dir=scratch)  # its own, and so no cache of an earlier run
    try:
        return Result(**result_of("fastpref.commands.demo.comparison", library, json.dumps(asdict(run)), folder))
    except Failed as error:
        raise Failed(f"{NAMES[library]}: {error}") from None


def compare(run: Run) -> dict[str, Result]:
    """The results by name: "trl", "fastpref" and "fastpref, cached reference".

    Raises:
        Failed: a library is not installed, or stopped with an error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        found = {library: train_in_process(library, run, scratch) for library in LIBRARIES}
        cached = replace(run, precompute=True)
        return found | {"fastpref, cached reference": train_in_process("fastpref", cached, scratch)}


def same_loss(found: dict[str, Result], device: str) -> bool:
    """Whether both libraries computed the same mean loss, within the device's tolerance."""
    return abs(found["trl"].loss - found["fastpref"].loss) <= LOSS_TOLERANCE[device]


def show(found: dict[str, Result], run: Run) -> None:
    """Prints a table, and says whether both computed the same loss."""
    print(f"{'':28}{'pairs per second':>17}{'':>8}{'peak memory':>14}{'':>8}{'mean loss':>11}")
    rates = {name: run.batch_size * len(r.seconds) / sum(r.seconds) for name, r in found.items()}
    for name, result in found.items():
        rate, speed = rates[name], f"{rates[name] / rates['trl']:.2f} x"
        peak, of_trl = result.peak_bytes, found["trl"].peak_bytes
        memory = ("?", "") if peak is None or not of_trl else (f"{peak / MIB:,.0f} MiB", f"{peak / of_trl:.2f} x")
        print(f"{NAMES.get(name, name):28}{rate:17.3f}{speed:>8}{memory[0]:>14}{memory[1]:>8}{result.loss:11.6f}")
    if not same_loss(found, run.device):
        print("The mean losses are NOT the same.")


def main(library: str, run: str, scratch: str) -> None:
    report(asdict(train(library, Run(**json.loads(run)), scratch)))


if __name__ == "__main__":
    main(*sys.argv[1:])
