"""Metrics that stay on the device as sums and counts. They are gathered and read once, when they are logged."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

LOWEST = (torch.minimum, math.inf)
HIGHEST = (torch.maximum, -math.inf)
Extreme = tuple[Callable[[Tensor, Tensor], Tensor], float]  # of two values, and what is none


class MetricSums:
    """Weighted means of named values since the last `flush`, and extremes of batches. Adding costs no host sync."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._totals: set[str] = set()
        self._extremes: dict[str, tuple[Extreme, dict[int, Tensor]]] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._batch = 0
        self._ignoring = False

    @contextlib.contextmanager
    def batch(self, real: bool = True) -> Iterator[None]:
        """A `with` block around one batch. A batch that is not `real` adds all its names, and counts for nothing."""
        self._ignoring = not real
        try:
            yield
        finally:
            self._ignoring = False
            self._batch += 1

    def add(self, name: str, total: Tensor, count: Tensor | float = 1.0) -> None:
        """Adds `total`, the sum of `count` values. It may have any shape, the same in every call."""
        total = total.detach().float()
        if not isinstance(count, Tensor):
            count = torch.full((1,), float(count), device=total.device)
        found = torch.cat([total.reshape(-1), count.detach().float().reshape(1)])
        if self._ignoring:
            found = torch.zeros_like(found)
        self._sums[name] = found if name not in self._sums else self._sums[name] + found

    def add_mean(self, name: str, values: Tensor) -> None:
        """Adds all of `values`, for their mean."""
        self.add(name, values.detach().float().sum(), float(values.numel()))

    def add_total(self, name: str, total: Tensor) -> None:
        """Adds to something that is summed, not averaged."""
        self._totals.add(name)
        self.add(name, total, 0.0)

    def add_extreme(self, name: str, value: Tensor, extreme: Extreme) -> None:
        """Notes a batch's `LOWEST` or `HIGHEST` value, 0-d. It is taken over all ranks, then averaged over batches."""
        which, none = extreme
        value = torch.full_like(value, none, dtype=torch.float32) if self._ignoring else value.detach().float()
        batches = self._extremes.setdefault(name, (extreme, {}))[1]
        batches[self._batch] = which(batches[self._batch], value) if self._batch in batches else value

    def keep(self, name: str, rows: Tensor) -> None:
        """Keeps `[n, ...]` rows of a batch's examples, for what can only be computed from all of them; see `rows`."""
        rows = rows.detach()
        self._rows.setdefault(name, []).append(rows[:0] if self._ignoring else rows)

    def rows(self, accelerator: Any) -> dict[str, Tensor]:
        """All rows that were kept, of all ranks, in the order of the data, on the CPU. They are forgotten here."""
        kept = {name: torch.cat(some).cpu().split([len(rows) for rows in some]) for name, some in self._rows.items()}
        self._rows = {}
        by_rank = gather_object([kept]) if accelerator.num_processes > 1 else [kept]
        found = {}
        for name in kept:
            turns = itertools.zip_longest(*(ranks[name] for ranks in by_rank))
            found[name] = torch.cat([rows for turn in turns for rows in turn if rows is not None])
        return found

    def take(self) -> tuple[list[str], Tensor]:
        """The 0-d values since the last time, and forgets them. There must be some.

        An extreme is that of the single batch since then.

        Returns:
            (names, `[K, 2]`: the sum and the count of each).
        """
        found = dict(self._sums)
        for name, (_, batches) in self._extremes.items():
            (value,) = batches.values()
            found[name] = torch.stack([value, torch.ones_like(value)])
        self._clear()
        return list(found), torch.stack(list(found.values()))

    def take_total(self, name: str) -> Tensor | None:
        """A total since the last `flush`, of this rank alone, or None. It is forgotten here."""
        found = self._sums.pop(name, None)
        return None if found is None else found[0]

    def _clear(self) -> None:
        self._sums, self._extremes, self._batch = {}, {}, 0

    def flush(self, accelerator: Any, *, whole: bool = False) -> dict[str, Any]:
        """The means over all ranks, with one gather and one copy to the host. Names without values are left out.

        `whole`: an extreme is that of all batches, instead of the mean over batches.
        """
        extremes = {name: (extreme, list(values.values())) for name, (extreme, values) in self._extremes.items()}
        sums, totals = self._sums, self._totals
        self._clear()
        if not sums and not extremes:
            return {}
        pieces = [*sums.values(), *(torch.stack(values) for _, values in extremes.values())]
        by_rank = accelerator.gather(torch.cat(pieces)[None]).cpu()
        columns = dict(zip([*sums, *extremes], by_rank.split([len(p) for p in pieces], 1), strict=True))
        found: dict[str, Any] = {}
        for name in sums:
            *values, count = columns[name].double().sum(0).tolist()
            if name in totals:
                found[name] = values[0]
            elif count:
                found[name] = values[0] / count if len(values) == 1 else [value / count for value in values]
        for name, ((which, none), _) in extremes.items():
            over_ranks = functools.reduce(which, columns[name].unbind(0))
            real = over_ranks[over_ranks != none]
            if len(real):
                found[name] = (functools.reduce(which, real) if whole else real.mean()).item()
        return found
