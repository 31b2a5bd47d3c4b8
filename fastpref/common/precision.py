"""In what precision sums are formed and results returned: fp32, or fp64 for fp64 inputs."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results from inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(value: Tensor) -> Tensor:
    """The same values in `wide` precision."""
    return value.to(wide(value.dtype))
