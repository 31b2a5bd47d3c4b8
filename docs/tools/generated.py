"""Pages that are made of the code: commands from their parsers, tables from their records, lists from their files."""

from __future__ import annotations

import argparse
import importlib
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import matrix

ROOT = Path(__file__).resolve().parents[2]
LINKS = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


def pages() -> dict[str, str]:
    """Path below docs/ -> Markdown."""
    return {
        "matrix.md": matrix.page(),
        "measured.md": measured(),
        "reference/commands.md": commands(),
        "reference/papers.md": (ROOT / "fastpref" / "papers.md").read_text(),
        "develop/contributing.md": _without_links(ROOT / "CONTRIBUTING.md"),
        "develop/changelog.md": _without_links(ROOT / "CHANGELOG.md"),
    }


def _without_links(path: Path) -> str:
    """A file of the repository: its links to other files would lead nowhere from the site."""
    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)[^)]+\)", r"\1", path.read_text())


# what was measured


def measured() -> str:
    from benchmarks import hosts, record, report, summary, trainers, training_table

    head = summary.newest(summary.HEAD)
    parts = [
        "# Measured",
        "Every table here is made of records in `benchmarks/results/`, which hold the machine, the commit, the "
        "versions and every raw time. **Speed on a GPU is not measured yet**: no machine with one has been available.",
        "## At the head",
        report.head_table(head),
        _picture(ROOT / report.PICTURE, "time by provider"),
        "## Training, end to end",
        "DPO beside TRL's own `DPOTrainer`: the same pairs in the same order, the same mean loss.",
        *_tables(trainers, "trainers"),
        "All six pairs of four responses to a prompt, a batch a prompt:",
        *_tables(trainers, "all-pairs"),
        "## In the trainers of others",
        "A step of the host as it comes, and with fastpref's one line, on the same trainer and batch, after a "
        'comparison of losses and gradients. "head" is the step\'s peak less that of the backbone alone.',
        *_tables(hosts, "hosts-cpu"),
        "## What the runs learn",
        f"SmolLM2-135M-Instruct on the pairs of the sample, judged on its held-out ones ({_trained(record)}). Each "
        "run's settings and every logged value are in `benchmarks/results/training/METHOD/training.json`.",
        re.sub(r" \[plot\]\([^)]*\) \|", " |", training_table.table()).replace("| steps | |", "| steps |").replace(
            "|---|---|---|---|---|---|", "|---|---|---|---|---|"),
        "KTO learns from single responses and does not count pairs. SimPO and ORPO have no reference and start behind: "
        "the base model prefers most of the rejected responses.",
    ]  # fmt: skip
    parts += [f"![{name}, trained: its curves](assets/training/{name}.png)" for name in training_table.METHODS]
    return "\n\n".join(parts) + "\n"


def _tables(module: Any, suite: str) -> list[str]:
    """Of the newest record of each suite's settings."""
    from benchmarks import record

    newest: dict[str, tuple[str, Path]] = {}
    for path in (ROOT / "benchmarks" / "results").glob(f"*-{suite}-*.json"):
        found = record.read(path)
        settings = str({name: value for name, value in found["settings"].items() if name not in ("steps", "repeats")})
        if not found["dirty"]:
            newest[settings] = max(newest.get(settings, ("", path)), (found["date"], path))
    if not newest:
        return ["Not measured."]
    return [f"{module.table(record.read(path))}\n\n`{path.name}`" for _, path in sorted(newest.values(), reverse=True)]


def _trained(record: Any) -> str:
    import json

    runs = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results/training").glob("*/training.json")]
    machines = sorted({f"{r['machine']['threads']} cores of an {r['machine']['cpu']}" for r in runs})
    commits = sorted({r["machine"]["commit"][:8] for r in runs})
    return f"{', '.join(machines)}; commits {', '.join(commits)}"


def _picture(path: Path, text: str) -> str:
    return f"![{text}](assets/{path.name})"


def pictures() -> dict[str, Path]:
    """Path below docs/ -> a picture of a recorded run."""
    from benchmarks import report, training_table

    found = {f"assets/{Path(report.PICTURE).name}": ROOT / report.PICTURE}
    found["assets/rlhf-and-dpo.png"] = ROOT / "benchmarks/results/rlhf/rlhf-and-dpo.png"
    for name in training_table.METHODS:
        found[f"assets/training/{name}.png"] = ROOT / "benchmarks/results/training" / name / "summary.png"
    return found


# commands


def commands() -> str:
    from fastpref.commands.cli import COMMANDS

    index = ["| command | |", "|---|---|"]
    index += [f"| [`fastpref {name}`](#fastpref-{name}) | {text} |" for name, (_, text) in COMMANDS.items()]
    parts = [
        "# Commands",
        "Made of the commands' own parsers. `fastpref COMMAND --help` prints the same.",
        "\n".join(index),
    ]
    for name, (module, text) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"fastpref {name}")
        importlib.import_module(module).add_arguments(parser)
        parts += [f"## fastpref {name}", f"{text[0].upper()}{text[1:]}.", _options(parser)]
        if name == "train":
            parts += _methods()
    return "\n\n".join(parts) + "\n"


def _options(parser: argparse.ArgumentParser) -> str:
    lines = ["| argument | default | |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(f"`{text}`" for text in action.option_strings) or f"`{action.metavar or action.dest}`"
        values = "" if not action.choices else f" ({', '.join(f'`{c}`' for c in action.choices)})"
        given = action.default if action.option_strings and action.nargs != 0 else None
        help_text = ((action.help or "") % {"default": action.default, "prog": parser.prog}).strip()
        lines.append(f"| {names}{values} | {_value(given)} | {_cell(help_text)} |")
    return "\n".join(lines)


def _methods() -> list[str]:
    """The fields that fastpref's configurations add to `transformers.TrainingArguments`, or change."""
    from transformers import TrainingArguments

    from fastpref.commands.train.job import METHODS
    from fastpref.commands.train.options import OnlineOptions, RunOptions
    from fastpref.trainers.config import PreferenceConfig

    theirs = {f.name: f for f in fields(TrainingArguments)}
    shared = {f.name: f for f in fields(PreferenceConfig)}
    own = [f for name, f in shared.items() if name not in theirs or _default(f) != _default(theirs[name])]
    parts = [
        "### What is trained on what", _fields(fields(RunOptions)),
        "### Every method",
        "Every field of `transformers.TrainingArguments` is an option too; these are added, or have another default.",
        _fields(own),
    ]  # fmt: skip
    for name, method in METHODS.items():
        rest = [f for f in fields(method.config) if f.name not in shared or _default(f) != _default(shared[f.name])]
        if name in ("rloo", "grpo"):
            known = {f.name for f in fields(RunOptions)}
            rest = [f for f in fields(OnlineOptions) if f.name not in known] + rest
        parts += [f"### fastpref train {name}", _fields(rest)]
    return parts


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _fields(some: Any) -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for field in some:
        lines.append(f"| `--{field.name}` | {_value(_default(field))} | {_cell(field.metadata.get('help', ''))} |")
    return "\n".join(lines)


def _value(value: Any) -> str:
    return "" if value in (None, "", MISSING) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
