"""Metrics that stay on the device: sums and counts, reduced together and read once, when they are logged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MetricSums:
    """Weighted means of named values since the last `flush`. Adding costs no host sync."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._totals: set[str] = set()

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """`total` is the sum of `count` values, 0-d."""
        count = count if isinstance(count, Tensor) else torch.full_like(total, count, dtype=torch.float32)
        found = torch.stack([total.detach().float(), count.detach().float()])
        self._sums[name] = found if name not in self._sums else self._sums[name] + found

    def add_mean(self, name: str, values: Tensor) -> None:
        self.add(name, values.detach().float().sum(), float(values.numel()))

    def add_total(self, name: str, total: Tensor) -> None:
        """Something that is summed, not averaged."""
        self._totals.add(name)
        self.add(name, total, 0.0)

    def take(self) -> tuple[list[str], Tensor]:
        """(names, the sum and the count of each `[K, 2]`), which are forgotten; there must be some."""
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        self._sums.clear()
        return names, sums

    def flush(self, accelerator: Any) -> dict[str, float]:
        """The means over all ranks: one reduction, one copy to the host. What has no values is left out."""
        if not self._sums:
            return {}
        names, sums = self.take()
        sums = accelerator.reduce(sums, "sum")
        pairs = dict(zip(names, sums.tolist(), strict=True))
        found = {name: total / count for name, (total, count) in pairs.items() if count}
        return found | {name: pairs[name][0] for name in self._totals if name in pairs}
