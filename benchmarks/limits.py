"""What this machine can do at most: copying memory and matrix products, measured in the same run as all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import measure

COPY_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}  # read + written; far beyond any last-level cache
PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # of square products
QUICK_DIVISOR = 2
REPEATS = 5


class Limits(NamedTuple):
    """The rates of one machine."""

    copy_bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype

    def seconds(self, flops: int, bytes: int, dtype: str) -> float:
        """The least time that such work can take here: the larger of its two floors."""
        compute = flops / self.flops_per_second[dtype] if flops else 0.0
        return max(compute, bytes / self.copy_bytes_per_second)


def best(a: Limits, b: Limits) -> Limits:
    """The best of two measurements. Other work on the machine can only have slowed one down."""
    rates = {dtype: max(rate, b.flops_per_second[dtype]) for dtype, rate in a.flops_per_second.items()}
    return Limits(max(a.copy_bytes_per_second, b.copy_bytes_per_second), rates)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    return min(measure.interleave({"": call}, REPEATS, device, warm_up=2)[""])


def copy_rate(device: torch.device, quick: bool = False) -> float:
    """Bytes read and written a second by `copy_` between two buffers."""
    size = COPY_BYTES[device.type] // (QUICK_DIVISOR if quick else 1)
    source = torch.ones(size // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return size / _least_seconds(lambda: target.copy_(source), device)


def product_rate(device: torch.device, dtype: torch.dtype, quick: bool = False) -> float:
    """FLOP/s of the fastest of a few square products."""

    def rate(n: int) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return measure.matmul_flops(n, n, n, 1) / _least_seconds(lambda: torch.mm(a, b, out=out), device)

    sizes = PRODUCT_SIZES[device.type]
    return max(map(rate, sizes[:1] if quick else sizes))


def find(device: torch.device, dtypes: set[torch.dtype], quick: bool = False) -> Limits:
    rates = {str(dtype).removeprefix("torch."): product_rate(device, dtype, quick) for dtype in sorted(dtypes, key=str)}
    return Limits(copy_rate(device, quick), rates)
