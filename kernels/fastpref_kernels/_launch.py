"""What every launcher needs: the right device, tile sizes, the accumulator dtype."""

import contextlib
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

CONFIGS = Path(__file__).parent / "configs"


def on_device_of(tensor: torch.Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type in ("cuda", "xpu"):
        return getattr(torch, tensor.device.type).device(tensor.device)
    return contextlib.nullcontext()


def accumulator(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def dense(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Arguments of one number a row, a sequence or a column, as the kernels read them: one behind the other. What has
    gaps or repeats (a view `[::2]`, the expanded gradient of a sum) is copied."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def readable(logits: torch.Tensor) -> torch.Tensor:
    """Logits whose rows lie anywhere, each in one piece; a copy of those whose columns have gaps."""
    return logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()


def check_writable(name: str, rows: torch.Tensor) -> None:
    """What is written in place cannot be copied first.

    Raises:
        ValueError: columns with gaps, or several rows in one place.
    """
    shared = any(size > 1 and stride == 0 for size, stride in zip(rows.shape, rows.stride(), strict=True))
    if shared or (rows.shape[-1] > 1 and rows.stride(-1) != 1):
        raise ValueError(
            f"{name}: got strides {rows.stride()} for shape {tuple(rows.shape)}, want columns side by side and each "
            "row in a place of its own: it is written in place"
        )


def row_strides(logits: torch.Tensor) -> tuple[int, int, int]:
    """(inner, stride_outer, stride_inner) of `[N, V]` or `[B, T, V]` logits: `logits[:, :-1]` needs no copy."""
    if logits.ndim == 2:
        return max(1, logits.shape[0]), 0, logits.stride(0)
    return max(1, logits.shape[1]), logits.stride(0), logits.stride(1)


def config_name(device_name: str) -> str:
    """The file of a GPU's tile sizes: 'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@functools.cache
def tile_sizes(device: torch.device) -> dict:
    """Kernel -> rows of (most columns or None, BLOCK, num_warps): measured on this GPU (`python -m benchmarks.tune`),
    or the default. Read from a file: a kernel that works in place cannot be tried out at run time."""
    sizes = json.loads((CONFIGS / "default.json").read_text())
    if device.type in ("cuda", "xpu"):
        name = getattr(torch, device.type).get_device_name(device)
        tuned = CONFIGS / f"{config_name(name)}.json"
        sizes |= json.loads(tuned.read_text()) if tuned.exists() else {}
    return sizes


def row_block(columns: int, kernel: str, device: torch.device) -> tuple[int, int]:
    """(BLOCK, num_warps) of a loop over one row, no larger than the row."""
    sizes = tile_sizes(device)[kernel]
    block, warps = next((block, warps) for most, block, warps in sizes if most is None or columns <= most)
    block = min(block, max(128, triton.next_power_of_2(columns)))
    return block, max(1, min(warps, block // 256))
