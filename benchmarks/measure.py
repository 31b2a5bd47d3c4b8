"""Measures seconds and bytes, and has the formulas that turn them into rates."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

MIB = 1 << 20
FLUSH_BYTES = {"cuda": 256 * MIB, "cpu": 64 * MIB}  # twice the last-level cache of a current GPU, of a laptop
BUSY_CYCLES = 2_000_000  # some 1 ms of a GPU: longer than a CPU needs to queue the 150 launches of a call
_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def quantile(samples: Sequence[float], q: float) -> float:
    """A quantile by linear interpolation between the sorted samples."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """(median over the rounds of a/b, best of a / best of b).

    What disturbs a round disturbs both sides of it.
    """
    return statistics.median(x / y for x, y in zip(a, b, strict=True)), min(a) / min(b)


def matmul_flops(n: int, d: int, vocab: int, products: int) -> int:
    """`products` products of `[n, d]` with a `[V, d]` head."""
    return products * 2 * n * d * vocab


def row_bytes(n: int, vocab: int, element_size: int, passes: int) -> int:
    """The bytes of `passes` reads or writes of `[n, V]` logits. The vectors `[n]` beside them do not count."""
    return passes * n * vocab * element_size


class Timer:
    """Times one call with a cold last-level cache: by wall clock on a CPU, by events around it on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        if not self._cuda:
            begin = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - begin
            del result  # freeing it is not the caller's cost
            return seconds
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY_CYCLES)  # the launches of the call queue up behind it: their dispatch is not timed
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3


def interleave(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """The seconds of every run, over `repeats` rounds of each of them once. First come `warm_up` rounds that do not
    count.

    A round starts one run further than the one before, so that no run always follows the same other run.
    """
    timer, names = Timer(device), list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, repeats) if names else ():
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = timer(runs[name])
            if turn >= 0:
                samples[name].append(seconds)
    return samples


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak_rss() -> bool:
    try:
        _CLEAR_REFS.write_text("5")  # the kernel's high-water mark of this process starts again, Linux only
    except OSError:
        return False
    return True


def return_freed_memory() -> None:
    """Has glibc give every freed buffer of a MiB or more back at once.

    So the resident set is what is in use.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        mmap_threshold = -3  # name of the parameter in malloc.h
        libc.mallopt(mmap_threshold, MIB)
        libc.malloc_trim(0)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The peak memory of a call beyond what was there before the first. Inputs do not count; kept buffers do.

    The call is made twice and the second is measured. So code that the first call loads is charged once, and what
    loading takes for a while is not.

    On a CPU this is the resident set. It needs a fresh process: freed memory that the allocator keeps would hide what a
    later call takes. Where the high-water mark cannot be reset, it is that of both calls.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_peak_rss():
        before = _max_rss()
        run()
        run()
        return _max_rss() - before
    before = _status_bytes("VmRSS")
    run()
    gc.collect()
    _reset_peak_rss()
    run()
    return _status_bytes("VmHWM") - before
