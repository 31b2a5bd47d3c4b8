"""How much memory is free or in use, and large scratch buffers that are kept from call to call."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIB = 1 << 20
KEPT_AT_MOST = 200 * MIB


class Workspace(NamedTuple):
    """Bytes that a plan may keep from its forward to its backward (see `fastpref.plans.plans`).

    `preferred` is for plans that choose their own group size. `most` is the limit where less would cost another
    matrix product.
    """

    preferred: int
    most: int

    def told(self, workspace_bytes: int | None) -> int | None:
        """What an operator is given as `workspace_bytes`, so that it need not ask for the free memory again.

        The two limits differ on a CPU alone. There asking costs nothing, so the caller's own value is passed on.
        """
        return self.most if self.preferred == self.most else workspace_bytes


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`. 4 GiB where nobody can say."""
    if device.type == "cuda":
        in_use = torch.cuda.memory_stats_as_nested_dict(device)
        return _capacity(device, in_use) - _current(in_use, "allocated_bytes")
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4096 * MIB


READINGS = 256  # the driver is asked for the free memory once in so many calls
_capacities: dict[torch.device, tuple[int, int]] = {}  # device -> (bytes, for how many calls more)


def _capacity(device: torch.device, in_use: dict[str, Any]) -> int:
    """Bytes that this process could allocate in all: those that are free, and those that PyTorch has reserved.

    Only other processes change that number. The driver may take a millisecond to answer, so it is asked seldom.
    """
    known, left = _capacities.get(device, (0, 0))
    if not left:
        known, left = torch.cuda.mem_get_info(device)[0] + _current(in_use, "reserved_bytes"), READINGS
    _capacities[device] = (known, left - 1)
    return known


def _current(in_use: dict[str, Any], what: str) -> int:
    return in_use[what]["all"]["current"] if in_use else 0  # nothing before the first allocation


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that is freed, for the whole process. Does nothing on other systems.

    PyTorch has no caching allocator on a CPU. Every large tensor would be fresh pages from the system, and a training
    step can spend more time on page faults than on arithmetic.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, mmap_max = -1, -4  # names of parameters in malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes that this process has used so far: of a GPU's memory, or on a CPU resident.

    None where nobody counts.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("VmHWM")


def resident_bytes(field: str) -> int | None:
    """Resident memory of this process as Linux counts it, in bytes: `VmRSS` now, `VmHWM` at most. None elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(f"{field}:"))


def workspace(device: torch.device, workspace_bytes: int | None) -> Workspace:
    """What the caller allows, or by default a quarter of the free memory.

    A CPU prefers 192 MiB. On 2 cores with the SmolLM2 head, groups of 960 rows were 3 % faster than groups of 480, and
    larger ones gained no more.
    """
    if workspace_bytes is not None:
        return Workspace(workspace_bytes, workspace_bytes)
    most = available_bytes(device) // 4
    return Workspace(min(192 * MIB, most) if device.type == "cpu" else most, most)


class _Kept(threading.local):
    buffer: Tensor | None = None  # flat bytes


_kept = _Kept()


@contextlib.contextmanager
def borrowed(*shape: int, like: Tensor) -> Iterator[Tensor]:
    """An uninitialised tensor of this shape, of the dtype and on the device of `like`, for a `with` block.

    On a CPU each thread keeps one buffer of up to 200 MiB for the next call. PyTorch has no caching allocator there: a
    large buffer is fresh memory, whose pages fault one by one while the first matrix product writes them (a 180 MiB
    output took 202 ms instead of 154).
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size > KEPT_AT_MOST:
        yield like.new_empty(shape)
        return
    buffer, _kept.buffer = _kept.buffer, None  # taken: a nested call gets its own
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8)
    try:
        yield buffer[:size].view(like.dtype).view(shape)
    finally:
        _kept.buffer = buffer
