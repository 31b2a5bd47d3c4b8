"""Draws a reliability diagram."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def reliability_diagram(calibration: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws accuracy over confidence, with 95 % intervals, above the number of pairs.

    `calibration` is what `statistics.calibration` gives.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = calibration["bins"]
    figure = Figure(figsize=(5, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    confidence, accuracy = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    spread = [[abs(b["accuracy"] - b["interval"][end]) for b in bins] for end in (0, 1)]
    upper.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", label="calibrated")
    upper.errorbar(confidence, accuracy, yerr=spread, fmt="o-", capsize=3, label="model, 95 % interval")
    upper.set(ylabel="share that is right", xlim=(0.49, 1.01), ylim=(-0.02, 1.02))
    upper.set_title(f"ECE {calibration['ece']:.3f}, Brier {calibration['brier']:.3f}", fontsize="medium")
    upper.legend(loc="lower right")
    centres, widths = [(b["low"] + b["high"]) / 2 for b in bins], [0.9 * (b["high"] - b["low"]) for b in bins]
    lower.bar(centres, [b["count"] for b in bins], widths, color="0.6")
    lower.set(xlabel="confidence, sigmoid(|margin|)", ylabel="pairs")
    figure.savefig(path, dpi=150)
