"""What every launcher needs: the right device, readable strides, tile sizes, the dtype to add up in."""

import contextlib
import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

CONFIGS = Path(__file__).parent / "configs"
MOST_THREADS = 1024  # of a program
# The most bytes of rows that a program sweeps twice and still finds in the L2 cache. An H100's L2 holds about half of
# its 50 MB near each SM. Up to this size one or two programs of 1,024 threads on each SM have at most 28 MB of rows in
# flight, and the second sweep finds its row in the cache. So there are two passes over memory. Eight small programs on
# each SM (100 to 200 MB in flight) make three.
# From 128 k tokens on (256 KiB for a row) one row on each SM is too much. It would take a cluster of two programs for
# each row, each with half of it (17 MB in flight; 0.6 of 1.9 ms saved at 8192 x 128 k, of about 37). Triton has no
# reduction across a cluster: with num_ctas=2 the kernel does not compile (3.7.1: TritonGPUPlanCTAPass fails).
REREAD_BYTES = 128 << 10


def on_device_of(tensor: torch.Tensor):
    """A `with` block in which the tensor's device is the current one: that is where Triton launches."""
    if tensor.device.type in ("cuda", "xpu"):
        return getattr(torch, tensor.device.type).device(tensor.device)
    return contextlib.nullcontext()


def accumulator(dtype: torch.dtype):
    """Triton's dtype to add up in: fp64 for fp64, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Arguments with one number for each row, sequence or column, without gaps: kernels read them one after the other.

    Those with gaps or repeats (a view `[::2]`, the expanded gradient of a sum) are copied.
    """
    return tuple(None if t is None else t.contiguous() for t in tensors)


def readable(logits: torch.Tensor) -> torch.Tensor:
    """The logits if each row is in one piece, wherever it lies. A copy if their columns have gaps."""
    return logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()


def check_writable(name: str, rows: torch.Tensor) -> None:
    """Check rows that a kernel writes in place: these cannot be copied first.

    Raises:
        ValueError: their columns have gaps, or several rows share one place.
    """
    shared = any(size > 1 and stride == 0 for size, stride in zip(rows.shape, rows.stride(), strict=True))
    if shared or (rows.shape[-1] > 1 and rows.stride(-1) != 1):
        raise ValueError(
            f"{name}: got strides {rows.stride()} for shape {tuple(rows.shape)}, want columns side by side and each "
            "row in a place of its own: it is written in place"
        )


def row_strides(logits: torch.Tensor) -> tuple[int, int, int]:
    """(inner, stride_outer, stride_inner) of `[N, V]` or `[B, T, V]` logits, so that `logits[:, :-1]` needs no copy.

    Row r begins at `(r // inner) * stride_outer + (r % inner) * stride_inner`.
    """
    if logits.ndim == 2:
        return max(1, logits.shape[0]), 0, logits.stride(0)
    return max(1, logits.shape[1]), logits.stride(0), logits.stride(1)


def config_name(device_name: str) -> str:
    """The file of a GPU's tile sizes: 'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@functools.cache
def tile_sizes(device: torch.device) -> dict:
    """Kernel -> a list of (most columns or None, BLOCK, num_warps), of which the first that fits is taken.

    They were measured on this GPU (`python -m benchmarks.tune`), or are the default. They are read from a file, since a
    kernel that works in place cannot be tried out at run time.
    """
    sizes = json.loads((CONFIGS / "default.json").read_text())
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
        tuned = CONFIGS / f"{config_name(name)}.json"
        sizes |= json.loads(tuned.read_text()) if tuned.exists() else {}
    return sizes


def row_block(columns: int, kernel: str, device: torch.device, nbytes: int | None = None) -> tuple[int, int]:
    """(BLOCK, num_warps) of a loop over one row. BLOCK is not much larger than the row.

    The table is in columns of 2-byte elements. For other rows, `nbytes` of all the rows of a program decide.
    """
    size = columns if nbytes is None else nbytes // 2
    block, warps = next(
        (block, warps) for most, block, warps in tile_sizes(device)[kernel] if most is None or size <= most
    )
    block = min(block, max(128, triton.next_power_of_2(columns)))
    threads = min(MOST_THREADS, block // 8)  # 8 elements a thread or more: a 16-byte load of 2-byte elements
    return block, max(1, min(warps, threads // warp_size(device)))


class Tile(NamedTuple):
    """How a program holds a block of a row: see `_lanes.py`."""

    block: int
    lanes: int
    vector: int
    num_warps: int


@functools.cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, on some AMD GPUs 64."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


def _vector(rows: torch.Tensor) -> int:
    """Elements of a 16-byte load, or 1 where a row may begin anywhere: Triton then loads them one by one."""
    aligned = rows.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in row_strides(rows)[1:])
    return 16 // rows.element_size() if aligned else 1


def row_tile(kernel: str, *rows: torch.Tensor) -> Tile:
    """The tile of a kernel that sweeps over rows of one or several tensors, all of one length."""
    device = rows[0].device
    block, num_warps = row_block(rows[0].shape[-1], kernel, device, row_bytes(*rows))
    lanes = num_warps * warp_size(device)
    return Tile(block, lanes, max(1, min(block // lanes, *map(_vector, rows))), num_warps)


def row_bytes(*rows: torch.Tensor) -> int:
    """Bytes that one program sweeps over."""
    return sum(t.shape[-1] * t.element_size() for t in rows)


def stays_in_cache(*rows: torch.Tensor) -> bool:
    """Does the second sweep over a row find it in the L2 cache? See `REREAD_BYTES`."""
    return row_bytes(*rows) <= REREAD_BYTES
