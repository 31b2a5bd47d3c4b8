"""Draws the curves of a training run in one figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, NamedTuple

BLUE, GREEN, RED, INK, GRID = "#2b6cb0", "#2f855a", "#c2502e", "#333333", "#e3e3e3"
SMOOTH_FROM = 20  # points: fewer are drawn as they are
History = Sequence[Mapping[str, float]]


class Panel(NamedTuple):
    """One plot of the figure."""

    title: str
    series: dict[str, tuple[str, str]]  # metric -> (name, colour)
    level: float | None = None  # where nothing was learnt
    percent: bool = False
    legend: str = "best"


TRAINING = ("training", BLUE)
MARGIN = "Reward margin, chosen minus rejected"
PANELS = (
    Panel("Loss", {"loss": TRAINING}, legend="upper right"),
    Panel(MARGIN, {"rewards/margins": TRAINING}, level=0.0, legend="upper left"),
    Panel(MARGIN, {"margin": TRAINING}, level=0.0, legend="upper left"),
    Panel("Pairs ranked right", {"rewards/accuracies": TRAINING}, level=0.5, percent=True, legend="lower right"),
    Panel("Accuracy", {"accuracy": TRAINING}, level=0.5, percent=True, legend="lower right"),
    Panel("KL estimate z0", {"kl": TRAINING}, level=0.0),
    Panel("Log-probs of responses", {"logps/chosen": ("chosen", GREEN), "logps/rejected": ("rejected", RED)}),
    Panel("Log-probs of tokens", {"logps/student": ("student", BLUE), "logps/teacher": ("teacher", GREEN)}),
    Panel("Reward of sampled responses", {"reward": TRAINING}, legend="lower right"),
    Panel("Exact KL from the reference, nats a response", {"kl/exact": TRAINING}, level=0.0, legend="upper left"),
    Panel("Tokens of a response", {"completions/mean_length": TRAINING}),
    Panel(
        "Rewards in a batch",
        {"max_reward": ("highest", GREEN), "mean_reward": ("mean", BLUE), "min_reward": ("lowest", RED)},
    ),
)


def points(history: History, metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a metric, where it was logged and is finite."""
    found = [(entry["step"], entry[metric]) for entry in history if metric in entry and math.isfinite(entry[metric])]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Centred means over a tenth of the run. Near its ends they are over fewer points."""
    reach = max(1, len(values) // 20)
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def training_curves(history: History, path: str | os.PathLike[str], title: str) -> None:
    """Draws the panels that `history` (a Trainer's, with `eval_` entries) has values for.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the history has none of the metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = (*PANELS, *heldout_panels(history))
    panels = [panel for panel in known if any(points(history, metric)[0] for metric in panel.series)]
    if not panels:
        raise ValueError("history: got no logged losses, want at least 1")
    columns = 2 if len(panels) < 5 else 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.3 * rows + 0.5))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, x=0.01, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, history)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step", color=INK)
    figure.savefig(path, dpi=150, facecolor="white")


def heldout(history: History) -> list[str]:
    """The metrics of scorers that online training only looks at."""
    names = {name for entry in history for name in entry}
    return sorted(name for name in names if name.startswith("heldout/") and name.endswith("/mean"))


def heldout_panels(history: History) -> list[Panel]:
    return [Panel(f"Held-out scorer: {name.split('/')[1]}", {name: TRAINING}) for name in heldout(history)]


def overoptimization(histories: Mapping[str, History], path: str | os.PathLike[str]) -> None:
    """Draws the reward and held-out scores of runs over their exact KL from the reference, and their length over steps.

    Args:
        histories: what runs logged, by name. They need `track_kl`.
        path: the picture to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: nothing logged an exact KL.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any("kl/exact" in entry for history in histories.values() for entry in history):
        raise ValueError("histories: got no kl/exact, want runs with track_kl=True")
    titles = {"reward": "reward that is trained on"}
    for history in histories.values():
        titles |= {name: f"held-out: {name.split('/')[1]}" for name in heldout(history)}
    names = list(titles)
    figure = Figure(figsize=(4.6 * (len(names) + 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(names) + 1), [*names, "completions/mean_length"], strict=True):
        for (name, history), colour in zip(histories.items(), cycle((BLUE, RED, GREEN, INK)), strict=False):
            x = "kl/exact" if metric in titles else "step"
            found = [(e[x], e[metric]) for e in history if x in e and metric in e and "kl/exact" in e]
            xs, ys = ([pair[i] for pair in found] for i in (0, 1))
            axes.plot(smooth(xs) if x != "step" else xs, smooth(ys), ".-", color=colour, markersize=3, label=name)
        _frame(axes, titles.get(metric, "tokens of a response"))
        axes.set_xlabel("exact KL, nats a response" if metric in titles else "step", color=INK)
        if len(histories) > 1:
            axes.legend(frameon=False, fontsize=9.5)
    figure.savefig(path, dpi=150, facecolor="white")


def _frame(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Any, panel: Panel, history: History) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if panel.level is not None:
        axes.axhline(panel.level, color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    marked = False
    for metric, (name, colour) in panel.series.items():
        steps, values = points(history, metric)
        if len(values) >= SMOOTH_FROM:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=1, zorder=2)
            axes.plot(steps, smooth(values), color=colour, linewidth=2.2, label=name, zorder=3)
        else:
            axes.plot(steps, values, color=colour, linewidth=2, marker=".", markersize=7, label=name, zorder=3)
        steps, values = points(history, f"eval_{metric}")
        if steps:
            marked = True
            axes.plot(
                steps, values, color=colour, linewidth=1, linestyle=":" if len(steps) > 2 else "", marker="D",
                markersize=6.5, markeredgecolor="white", markeredgewidth=1, clip_on=False, zorder=4,
            )  # fmt: skip
    if marked:
        axes.plot([], [], color=INK, linestyle="", marker="D", markersize=6, label="held out")
    _frame(axes, panel.title)
    axes.set_axisbelow(True)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    axes.tick_params(colors=INK, labelsize=9.5, length=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.ticklabel_format(axis="y", useOffset=False)
    if panel.percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if marked or len(panel.series) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc=panel.legend)
