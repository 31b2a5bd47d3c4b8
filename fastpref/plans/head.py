"""The output layer as the plans see it: its parameters, which gradients are wanted, and buffers for its logits."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from fastpref.backends import backend_for
from fastpref.common import memory
from fastpref.common.memory import MIB
from fastpref.reference import LogitTransform


class Head(NamedTuple):
    """The output layer, `transform(hidden @ weight.T + bias)`, and the label of rows that do not count."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    transform: LogitTransform
    ignore_index: int

    @property
    def vocab(self) -> int:
        """V, the number of tokens."""
        return self.weight.shape[0]


class Gradients(NamedTuple):
    """dH, dW and db, formed before the upstream gradient is known. None where not needed.

    They are in fp32 (fp64). The backward scales them, then rounds them.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def tile_rows(head: Head, rows: int, workspace_bytes: int | None) -> int:
    """How many rows of logits exist at once in a plan that keeps none.

    They take up to 1 GiB on an accelerator: 4096 rows of a 128 k vocabulary in bf16, enough for a product at full
    speed. On a CPU they take 80 MiB. All tiles have about the same size, in multiples of 16: on a CPU, products of 481
    rows were 5 % slower than of 496.
    """
    tile = 80 * MIB if head.weight.device.type == "cpu" else 1024 * MIB
    limit = max(1, min(tile, workspace_bytes or tile) // (head.vocab * head.weight.element_size()))
    even = math.ceil(rows / max(1, math.ceil(rows / limit)))
    return max(1, min(math.ceil(even / 16) * 16, limit, rows))


def row_stride(columns: int, like: Tensor) -> int:
    """Elements from one row to the next in logits that we allocate. The backend says where rows should begin."""
    return backend_for(like).row_stride(columns, like.element_size())


def logits_buffer(head: Head, rows: int) -> Tensor:
    """An uninitialised tensor `[rows, V]` in the compute dtype."""
    return head.weight.new_empty(rows, row_stride(head.vocab, head.weight))[:, : head.vocab]


@contextlib.contextmanager
def borrowed_logits(rows: int, columns: int, like: Tensor) -> Iterator[Tensor]:
    """An uninitialised tensor `[rows, columns]` like `like`, for a `with` block."""
    with memory.borrowed(rows, row_stride(columns, like), like=like) as buffer:
        yield buffer[:, :columns]
