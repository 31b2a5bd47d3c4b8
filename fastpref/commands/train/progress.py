"""Shows the progress of a training run: a live bar on a terminal, some ten plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from fastpref.common import memory, terminal

# metric -> its name in a line and how it is written; those that a method logs are shown
SHOWN = {
    "loss": ("loss", ".4f"),
    "rewards/margins": ("margin", "+.3f"),
    "margin": ("margin", "+.3f"),
    "rewards/accuracies": ("accuracy", "4.0%"),
    "accuracy": ("accuracy", "4.0%"),
    "kl": ("KL", ".4f"),
    "reward": ("reward", "+.3f"),
    "kl/exact": ("exact KL", ".3f"),
}


def line_of(logs: Mapping[str, float], prefix: str = "") -> str:
    """The metrics in `logs` that are shown, in one line."""
    found = ((name, style, logs.get(prefix + key)) for key, (name, style) in SHOWN.items())
    return "  ".join(f"{name} {value:{style}}" for name, style, value in found if value is not None)


class TrainingProgress(TrainerCallback):
    """Replaces the printing callbacks of transformers. It reads what was logged, and never asks the device.

    Use it as a context manager around `trainer.train()`, so that an error leaves the terminal as it was.
    """

    def __init__(self) -> None:
        self.tokens = 0.0
        self.seconds = 0.0  # of training: evaluations are left out
        self.nan_step: int | None = None  # where the loss was first seen to be NaN
        self._bar: Any = None
        self._printed = 0

    @property
    def tokens_per_second(self) -> float | None:
        """The mean up to the last log."""
        return self.tokens / self.seconds if self.seconds > 0 and self.tokens else None

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin, self._first = time.perf_counter(), state.global_step
        self._tokens_before = state.num_input_tokens_seen  # by the run that is resumed
        self._shown = state.is_world_process_zero and not args.disable_tqdm
        if self._shown and sys.stdout.isatty():
            self._bar = terminal.live_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=state.max_steps, completed=self._first)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not hasattr(self, "_begin"):
            return  # evaluated before training
        if any(math.isnan(logs.get(name, 0.0)) for name in ("loss", "train_loss")) and self.nan_step is None:
            self.nan_step = state.global_step
            control.should_training_stop = True
        if "loss" not in logs:
            self._begin += logs.get("eval_runtime", 0.0)
            if self._shown and (text := line_of(logs, "eval_")) and state.global_step < state.max_steps:
                self._print(f"  evaluation after step {state.global_step}: {text}")
            return
        tokens, seconds = logs["num_tokens"] - self._tokens_before, time.perf_counter() - self._begin
        speed = (tokens - self.tokens) / max(seconds - self.seconds, 1e-9)
        self.tokens, self.seconds = tokens, seconds
        text = f"{line_of(logs)}  {speed:,.0f} tokens/s"
        if (peak := memory.peak_bytes(args.device)) is not None:
            text += f"  peak {peak / 2**30:.1f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif self._shown:
            self._print_line(state, text)

    def _print_line(self, state: Any, text: str) -> None:
        done, total = state.global_step, state.max_steps
        if done * terminal.LINES // total == self._printed and done < total:
            return
        self._printed = done * terminal.LINES // total
        left = self.seconds / max(1, done - self._first) * (total - done)
        ending = f"  {_duration(left)} left" if done < total else ""
        self._print(f"  step {done:{len(str(total))}}/{total}  {text}{ending}")

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
