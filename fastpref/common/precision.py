"""In what precision things are accumulated and returned."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(value: Tensor) -> Tensor:
    return value.to(wide(value.dtype))
