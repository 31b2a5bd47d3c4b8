"""What every launcher needs: the right device, tile sizes, the accumulator dtype."""

import contextlib
import functools
import json
import re
from pathlib import Path

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
