"""What online training logs of a round of samples, with TRL's names, and the completions themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastpref.objectives.advantages import Advantages, nan_std, weighted

COMPLETIONS = "completions.jsonl"


def length_metrics(lengths: Tensor, finished: Tensor) -> dict[str, Tensor]:
    """Of the responses of all ranks: `lengths` and `finished` are `[G]`."""
    lengths, ended = lengths.float(), lengths[finished].float()
    ended = ended if len(ended) else lengths.new_zeros(1)
    found = {"clipped_ratio": 1 - finished.float().mean()}
    for name, some in (("", lengths), ("terminated_", ended)):
        found |= {f"mean_{name}length": some.mean(), f"min_{name}length": some.min(), f"max_{name}length": some.max()}
    return {f"completions/{name}": value for name, value in found.items()}


def reward_metrics(rewards: Tensor, names: Sequence[str], weights: Tensor, advantages: Advantages) -> dict[str, Tensor]:
    """Of the rewards `[G, F]` of all ranks."""
    found = function_metrics(rewards, names, "rewards")
    total = weighted(rewards, weights)
    return found | {
        "reward": total.nanmean(), "reward_std": nan_std(total),
        "frac_reward_zero_std": advantages.no_spread.float().mean(),
    }  # fmt: skip


def function_metrics(rewards: Tensor, names: Sequence[str], prefix: str) -> dict[str, Tensor]:
    """Mean and standard deviation of the rewards `[G, F]` by each function, where it gave any."""
    found = {}
    for i, name in enumerate(names):
        found[f"{prefix}/{name}/mean"] = rewards[:, i].nanmean()
        found[f"{prefix}/{name}/std"] = nan_std(rewards[:, i])
    return found


def sampler_metrics(difference: Tensor, ratio: Tensor) -> dict[str, Tensor]:
    """How far a sampler's log-probs are from the trainer's `[N]`, and the ratios that correct for it `[N]`."""
    known = difference[~difference.isnan()].abs()
    none = torch.full((1,), torch.nan)  # where no response is learnt from
    known, ratio = (some if len(some) else none for some in (known, ratio))
    return {
        "sampling/sampling_logp_difference/mean": known.mean(), "sampling/sampling_logp_difference/max": known.max(),
        "sampling/importance_sampling_ratio/min": ratio.min(), "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
    }  # fmt: skip


def logged_numbers(pending: Mapping[str, Sequence[float]], world: int) -> dict[str, tuple[float, int]]:
    """Sum and count of the numbers that reward functions logged on this rank, with the names of all ranks."""
    names = gather_object(sorted(pending)) if world > 1 else list(pending)
    return {name: (sum(pending.get(name, ())), len(pending.get(name, ()))) for name in sorted(set(names))}


class CompletionLog:
    """Prints responses, and writes them to `completions.jsonl`, one a line with its rewards."""

    def __init__(self, folder: str, shown: int | None, unique_prompts: bool) -> None:
        self.path, self.shown, self.unique_prompts = Path(folder) / COMPLETIONS, shown, unique_prompts

    @property
    def size(self) -> int:
        """Bytes that are written."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def cut(self, size: int) -> None:
        """Drops what was written since the file had that size."""
        if self.size > size:
            os.truncate(self.path, size)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds the rows of a round."""
        rows = gather_object(list(rows)) if torch.distributed.is_initialized() else list(rows)
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        if self.unique_prompts:
            rows = list({json.dumps(row["prompt"], default=str): row for row in rows}.values())
        for row in rows[: self.shown]:
            print(f"step {row['step']}  {_text(row['prompt'])!r} -> {_text(row['completion'])!r}  {row['rewards']}")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value[-1]["content"])
