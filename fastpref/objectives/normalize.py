"""Reward normalisation with statistics that survive checkpoints and merge exactly across ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpref.common import checks
from fastpref.common.precision import wide
from fastpref.common.ranks import gather_over_ranks

METHODS = ("running", "batch", "ema", "percentile")


def _merge_moments(a: Tensor, b: Tensor) -> Tensor:
    """(weight, mean, sum of squared deviations) of two samples together, from those of each (Chan et al. 1979)."""
    weight = a[0] + b[0]
    share = torch.where(weight > 0, b[0] / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)
    delta = b[1] - a[1]
    return torch.stack([weight, a[1] + delta * share, a[2] + b[2] + delta**2 * a[0] * share])


def _merge_averages(a: Tensor, b: Tensor) -> Tensor:
    """(weight, low, high) of two samples: both percentiles averaged by weight."""
    weight = a[0] + b[0]
    share = torch.where(weight > 0, b[0] / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0)
    return torch.cat([weight[None], torch.lerp(a[1:], b[1:], share)])


class RewardNormalizer(nn.Module):
    """Brings rewards to mean 0 and standard deviation 1, or to a range of about 1.

    Args:
        method:
            `"running"`: mean and standard deviation of all rewards seen (Welford/Chan; the unbiased one, n - 1).
            `"batch"`: those of the last `update`, or of the rewards themselves if there was none.
            `"ema"`: their exponential moving averages, without bias towards the start.
            `"percentile"`: divides by the moving average of the distance between two percentiles, or by `floor` if
                that distance is less. Subtracts nothing (DreamerV3, arXiv 2301.04104).
        clip: bound on the absolute value of the result; None is no bound.
        decay: weight of the past in the moving averages at each update, in [0, 1).
        percentiles: the two of `"percentile"`, in [0, 100].
        floor: the least divisor of `"percentile"`, > 0.
        eps: a standard deviation of at most `eps * max(1, |mean|)` counts as none: such rewards are only centred.

    A call updates the statistics when training (always with `"batch"`), then normalises. The statistics are fp64
    buffers, so `state_dict` holds them. `.to(dtype)` leaves them fp64. The result is fp32, or fp64 for fp64 rewards.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    def __init__(
        self,
        method: str = "running",
        clip: float | None = None,
        *,
        decay: float = 0.99,
        percentiles: tuple[float, float] = (5.0, 95.0),
        floor: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        checks.choice("method", method, METHODS)
        if clip is not None:
            checks.positive("clip", clip)
        checks.within("decay", decay, 0.0, 1.0)
        checks.positive("floor", floor)
        checks.positive("eps", eps)
        low, high = percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles: got {percentiles}, want two ascending numbers in [0, 100]")
        self.method, self.clip, self.decay, self.floor, self.eps = method, clip, decay, floor, eps
        self.percentiles = (float(low), float(high))
        self.merged: Tensor  # what all ranks have agreed on
        self.pending: Tensor  # what this rank has seen since
        for name in ("merged", "pending"):
            self.register_buffer(name, torch.zeros(3, dtype=torch.float64))

    def extra_repr(self) -> str:
        return f"method={self.method!r}, clip={self.clip}"

    def _apply(self, fn: Any, recurse: bool = True) -> RewardNormalizer:
        exact = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def _merge(self, a: Tensor, b: Tensor) -> Tensor:
        return (_merge_averages if self.method == "percentile" else _merge_moments)(a, b)

    @property
    def _statistics(self) -> Tensor:
        return self._merge(self.merged, self.pending)

    def _of(self, rewards: Tensor) -> Tensor:
        """The statistics of these rewards. Each weighs 1; for the moving averages all weigh 1 together."""
        values = rewards.detach().reshape(-1).to(self.pending)
        if self.method == "percentile":
            low, high = torch.quantile(values, values.new_tensor(self.percentiles) / 100)
            return torch.stack([torch.ones_like(low), low, high])
        mean = values.mean()
        squares = (values - mean).square()
        if self.method == "ema":
            return torch.stack([torch.ones_like(mean), mean, squares.mean()])
        return torch.stack([torch.full_like(mean, values.numel()), mean, squares.sum()])

    @torch.no_grad()
    def update(self, rewards: Tensor) -> None:
        """Add rewards of any shape and float dtype to the statistics.

        Raises:
            ValueError: there is a NaN among them (found on a CPU, or with `FASTPREF_DEBUG=1`).
        """
        checks.tensor("rewards", rewards, dtypes=checks.FLOATS)
        if checks.free_to_read(rewards) and bool(rewards.isnan().any()):
            raise ValueError(f"rewards: got {int(rewards.isnan().sum())} NaN, want numbers")
        if rewards.numel() == 0:
            return
        new = self._of(rewards)
        if self.method == "batch":
            self.merged, self.pending = torch.zeros_like(new), new
        elif self.method == "running":
            self.pending = self._merge(self.pending, new)
        else:
            self.merged, self.pending = self._weighed(self.merged, self.decay), self._weighed(self.pending, self.decay)
            self.pending = self._merge(self.pending, self._weighed(new, 1 - self.decay))

    def _weighed(self, statistics: Tensor, factor: float) -> Tensor:
        scaled = statistics.clone()
        scaled[0] *= factor
        if self.method == "ema":
            scaled[2] *= factor
        return scaled

    @property
    def mean(self) -> Tensor:
        """The mean of the rewards seen (0-d, fp64). With `"percentile"` it is the middle of the range."""
        statistics = self._statistics
        return statistics[1:].mean() if self.method == "percentile" else statistics[1]

    @property
    def std(self) -> Tensor:
        """The standard deviation of the rewards seen (0-d, fp64). With `"percentile"` it is the averaged range."""
        return self._spread(self._statistics)

    def _spread(self, statistics: Tensor) -> Tensor:
        if self.method == "percentile":
            return statistics[2] - statistics[1]
        weight = statistics[0] if self.method == "ema" else statistics[0] - 1
        some = weight > 0
        return torch.where(some, statistics[2] / weight.where(some, 1), 0).sqrt()

    def normalize(self, rewards: Tensor) -> Tensor:
        """Normalise rewards of any shape without updating anything.

        Before the first update rewards stay as they are, except with `"batch"`, which then takes their own statistics.
        """
        checks.tensor("rewards", rewards, dtypes=checks.FLOATS)
        dtype = wide(rewards.dtype)
        if rewards.numel() == 0:
            return rewards.to(dtype)
        statistics = self._statistics
        if self.method == "batch":
            statistics = torch.where(statistics[0] > 0, statistics, self._of(rewards))
        spread = self._spread(statistics)
        values = rewards.to(torch.float64)
        if self.method == "percentile":
            values = values / spread.clamp(min=self.floor)
        else:
            mean = statistics[1]
            varies = spread > self.eps * mean.abs().clamp(min=1)
            values = (values - mean) / spread.where(varies, 1)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        return values.to(dtype)

    def forward(self, rewards: Tensor) -> Tensor:
        """`update` when training (always with `"batch"`), then `normalize`: any shape -> the same shape."""
        if self.training or self.method == "batch":
            self.update(rewards)
        return self.normalize(rewards)

    @torch.no_grad()
    def merge(self, other: RewardNormalizer) -> None:
        """Add what another normaliser has seen.

        Raises:
            ValueError: it has another method.
        """
        if other.method != self.method:
            raise ValueError(f"other: got method {other.method!r}, want {self.method!r}")
        self.pending = self._merge(self.pending, other._statistics.to(self.pending))

    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add what the other ranks have seen since the last call. All ranks then hold the same, to the bit.

        With `"running"` and `"batch"` the result is that of one process that has seen everything. The moving averages
        take the mean of the ranks' batches. With `"ema"` that is the result of one process if batches have equal
        sizes. With `"percentile"` the ranks' percentiles are averaged.

        Call it once for each update or less often, on every rank of `group` (by default all).
        """
        everyone = gather_over_ranks(self.pending, group)
        factor = 1 / len(everyone) if self.method in ("ema", "percentile") else 1
        for pending in everyone:
            self.merged = self._merge(self.merged, self._weighed(pending, factor))
        self.pending = torch.zeros_like(self.pending)
