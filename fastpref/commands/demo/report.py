"""What the demo prints: progress of a training run, scores on held-out pairs, the comparison table."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, NamedTuple

from fastpref.commands.demo.comparison import GradientErrors, Measurement
from fastpref.common.terminal import LINES, live_bar

WINDOW = 8  # steps that the shown figures are means over


class Progress:
    """A live bar on a terminal (with rich installed), and some ten plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._tokens = total, 0, 0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._bar: Any = live_bar() if sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=self._total)
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, loss: float, margin: float, accuracy: float, tokens: int) -> None:
        self._recent.append((loss, margin, accuracy))
        self._done += 1
        self._tokens += tokens
        loss, margin, accuracy = (sum(column) / len(self._recent) for column in zip(*self._recent, strict=True))
        speed = self._tokens / (time.perf_counter() - self._begin)
        text = f"loss {loss:.4f}  margin {margin:+.3f}  reward accuracy {accuracy:4.0%}  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=text)
        elif self._done == self._total or self._done % max(1, self._total // LINES) == 0:
            print(f"  step {self._done:4d}/{self._total}  {text}", flush=True)


class Scores(NamedTuple):
    """Shares and means over pairs."""

    reward_accuracy: float  # the policy raised chosen more than rejected, against the reference
    margin: float
    prefers_chosen: float  # the policy itself gives chosen more probability
    prefers_chosen_per_token: float


def show_scores(pairs: int, before: Scores, after: Scores) -> None:
    print(f"{f'held out: {pairs} pairs':34}{'before':>9}{'after':>9}")
    print(f"{'  reward accuracy':34}{'-':>9}{after.reward_accuracy:9.1%}  (before: policy and reference are the same)")
    print(f"{'  mean reward margin':34}{before.margin:9.3f}{after.margin:9.3f}")
    rows = {"summed log-probs": 2, "log-probs per token": 3}
    for name, i in rows.items():
        print(f"{f'  chosen ahead by {name}':34}{before[i]:9.1%}{after[i]:9.1%}")


def show_gradients(errors: dict[str, GradientErrors], limit: float) -> bool:
    """Whether the fused ones are within the limit."""
    print(f"Gradients in fp32, their relative error against fp64 (limit {limit:.1e}):")
    passed = max(errors["fused"]) <= limit
    for way, error in errors.items():
        verdict = "  WRONG" if way == "fused" and not passed else ""
        print(f"  {way}: hidden states {error.hidden:.1e}, head {error.weight:.1e}{verdict}", flush=True)
    return passed


def show_comparison(found: dict[tuple[str, bool], Measurement]) -> None:
    print(f"{'forward and backward:':22}{'time':>9}{'':>19}{'peak memory beyond inputs':>28}")
    print(f"{'':22}{'eager':>9}{'fused':>10}{'':>9}{'eager':>12}{'fused':>12}")
    for trainable in (True, False):
        eager, fused = found["eager", trainable], found["fused", trainable]
        name = f"  {'trainable' if trainable else 'frozen'} head"
        line = f"{name:20}{_seconds(eager)}{_seconds(fused)}{eager.seconds / fused.seconds:7.1f} x"
        print(line + _mebibytes(eager) + _mebibytes(fused))


def _seconds(measurement: Measurement) -> str:
    return f"{measurement.seconds:8.2f} s" if measurement.seconds >= 0.1 else f"{measurement.seconds * 1e3:7.2f} ms"


def _mebibytes(measurement: Measurement) -> str:
    return f"{'?' if measurement.peak_bytes is None else f'{measurement.peak_bytes / 2**20:.0f}':>8} MiB"
