"""Fixtures of the pytest-benchmark suite: the device, and timings with their rates beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def rated(benchmark, device) -> Callable[..., None]:
    """Times a call and notes GFLOP/s and GB/s, of its median, for the operations and bytes that it is said to cost."""

    def run(call: Callable[[], object], *, flops: int = 0, bytes: int = 0) -> None:
        def finished() -> None:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark(finished)
        if benchmark.stats is None:  # --benchmark-disable
            return
        median = benchmark.stats.stats.median
        rates = {"GFLOP/s": flops, "GB/s": bytes}
        benchmark.extra_info |= {name: work / median / 1e9 for name, work in rates.items() if work}

    return run
