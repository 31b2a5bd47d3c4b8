"""Writes what a training run leaves beside the model: `training.json`, `summary.png` and `summary.html`."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastpref.commands.train.options import RunOptions
from fastpref.commands.train.plot import overoptimization, training_curves
from fastpref.commands.train.progress import TrainingProgress
from fastpref.common import memory
from fastpref.validate.machine import machine

PACKAGES = ("transformers", "accelerate", "datasets", "peft")
TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")  # of Trainer.evaluate
ALWAYS = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "beta")  # shown
# not the user's, or without effect on a result
HIDDEN = ("output_dir", "logging_dir", "run_name", "pad_to_multiple_of", "accelerator_config")


@dataclass
class Run:
    """All that is known of a finished run."""

    method: str
    model: str
    data: list[str]  # files; empty for the sample
    records: dict[str, int]
    settings: dict[str, Any]  # the whole configuration
    changed: dict[str, Any]  # what of it is not the default, and the run's own options
    history: list[dict[str, float]]  # of the Trainer, with the evaluations before and after
    evaluations: dict[str, dict[str, float]]  # "before" and "after", or nothing
    steps: int
    seconds: float | None
    tokens: float
    tokens_per_second: float | None
    peak_bytes: int | None
    device: str
    machine: dict[str, Any]

    @classmethod
    def of(
        cls, method: str, options: RunOptions, trainer: Any, progress: TrainingProgress,
        before: Mapping[str, float] | None, after: Mapping[str, float] | None,
    ) -> Run:  # fmt: skip
        args, state = trainer.args, trainer.state
        ends = {} if before is None or after is None else {"before": dict(before), "after": dict(after)}
        entries = [ends["before"] | {"step": 0}] if ends else []
        entries += [dict(entry) for entry in state.log_history]
        settings = json.loads(args.to_json_string())
        defaults = json.loads(type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu).to_json_string())
        own_defaults = asdict(type(options)())
        own = {name: value for name, value in asdict(options).items() if value != own_defaults[name]}
        changed = {n: v for n, v in settings.items() if n in ALWAYS or (v != defaults.get(n) and n not in HIDDEN)}
        return cls(
            method=method, model=options.model, data=options.data or [],
            records={"training": len(trainer.train_dataset)}
            | ({} if trainer.eval_dataset is None else {"held out": len(trainer.eval_dataset)}),
            settings=settings, changed={n: v for n, v in own.items() if n not in ("model", "data")} | changed,
            history=entries, evaluations=ends, steps=state.global_step,
            seconds=next((e["train_runtime"] for e in reversed(entries) if "train_runtime" in e), None),
            tokens=progress.tokens, tokens_per_second=progress.tokens_per_second,
            peak_bytes=memory.peak_bytes(args.device), device=str(args.device),
            machine=machine(args.device) | {name: _version(name) for name in PACKAGES},
        )  # fmt: skip

    @property
    def title(self) -> str:
        return f"{self.method.upper() if len(self.method) <= 4 else self.method.capitalize()} · {_short(self.model)}"

    def evaluation_rows(self) -> list[tuple[str, str, str]]:
        """(metric, before, after)."""
        before, after = self.evaluations["before"], self.evaluations["after"]
        names = [name for name in after if name.startswith("eval_") and name.removeprefix("eval_") not in TIMINGS]
        return [(n.removeprefix("eval_"), _number(before.get(n)), _number(after[n])) for n in names]

    def evaluation_lines(self) -> list[str]:
        rows = [(f"held out: {self.records['held out']} records", "before", "after"), *self.evaluation_rows()]
        return [f"{name:32}{before:>12}{after:>12}" for name, before, after in rows]

    def speed_rows(self) -> list[tuple[str, str]]:
        speed, peak = self.tokens_per_second, self.peak_bytes
        memory_of = "GPU memory" if self.device.startswith("cuda") else "memory of the process"
        return [
            ("steps", f"{self.steps:,}"),
            ("time", "-" if self.seconds is None else f"{self.seconds:,.1f} s"),
            ("tokens", f"{self.tokens:,.0f}"),
            ("tokens per second", "-" if speed is None else f"{speed:,.0f}"),
            (f"peak {memory_of}", "-" if peak is None else f"{peak / 2**30:.2f} GiB"),
        ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _short(model: str) -> str:
    return Path(model.rstrip("/")).name


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.4f}"


def _finite(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(run: Run, folder: Path) -> tuple[list[str], str | None]:
    """Writes the files. Returns (their names, what could not be made or None)."""
    text = json.dumps(_finite(asdict(run)), indent=1, allow_nan=False)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    plot, problem, more = folder / "summary.png", None, []
    try:
        training_curves(run.history, plot, run.title)
        if any("kl/exact" in entry for entry in run.history):
            overoptimization({run.title: run.history}, folder / "reward-kl.png")
            more = ["reward-kl.png"]
    except ImportError as error:
        problem = f"no plots: {error}; run `pip install matplotlib`"
        plot.unlink(missing_ok=True)  # an earlier run's
    image = plot.read_bytes() if plot.exists() else None
    (folder / "summary.html").write_text(page(run, image), encoding="utf-8")
    return ["training.json", *(["summary.png"] if image else []), *more, "summary.html"], problem


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { color: #666; margin: .2rem 0 1.5rem; }
img { width: 100%; height: auto; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 3rem; align-items: start; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
th { font-weight: 600; } td { overflow-wrap: anywhere; }
.figures td:not(:first-child), .figures th:not(:first-child) {
  text-align: right; font-variant-numeric: tabular-nums; padding-right: 0; }
details { margin-top: 2rem; } summary { cursor: pointer; color: #555; }
"""


def page(run: Run, image: bytes | None) -> str:
    """One HTML file that needs no other file and no network."""
    data = ", ".join(_short(path) for path in run.data) or "the sample of fastpref"
    counts = ", ".join(f"{number:,} {name}" for name, number in run.records.items())
    figure = ""
    if image is not None:
        text = base64.b64encode(image).decode()
        figure = f'<img alt="Loss, margins, accuracy and log-probs over steps" src="data:image/png;base64,{text}">'
    evaluation = ""
    if run.evaluations:
        evaluation = _section("Held out", [("metric", "before", "after"), *run.evaluation_rows()], figures=True)
    versions = [(name, str(value)) for name, value in run.machine.items() if value is not None]
    tables = [
        evaluation,
        _section("Speed", run.speed_rows(), figures=True, head=False),
        _section("Settings", [(name, _text(value)) for name, value in run.changed.items()], head=False),
        _section("Machine and versions", versions, head=False),
    ]
    every = _table([(name, _text(value)) for name, value in run.settings.items()], head=False)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.title)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        f'<h1>{html.escape(run.title)}</h1>\n<p class="lead">{html.escape(data)}: {counts} records</p>\n{figure}\n'
        f'<div class="tables">{"".join(tables)}</div>\n'
        f"<details><summary>All settings</summary>{every}</details>\n</body></html>\n"
    )


def _section(title: str, rows: Sequence[tuple[str, ...]], figures: bool = False, head: bool = True) -> str:
    return f"<section><h2>{title}</h2>{_table(rows, figures, head)}</section>\n"


def _table(rows: Sequence[tuple[str, ...]], figures: bool = False, head: bool = True) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(cells, "th" if head and i == 0 else "td") for i, cells in enumerate(rows)]
    return f"<table{' class=figures' if figures else ''}>{''.join(lines)}</table>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
