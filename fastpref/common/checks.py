"""Argument errors: one function for each rule, one style of message ("name: got X, want Y").

Each function returns if the argument is right. Else it raises `TypeError` for a wrong type or dtype and `ValueError`
for anything else, with the argument's `name` in the message.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
ZERO_OR_ONE = (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value: object, *, dtypes: tuple[torch.dtype, ...], ndim: tuple[int, ...] | None = None) -> None:
    """A tensor of one of the `dtypes`, and of one of the numbers of dimensions `ndim` if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {_names([value.dtype])}, want {_names(dtypes)}")
    if ndim is not None and value.ndim not in ndim:
        want = " or ".join(f"{d}-d" for d in ndim)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want a {want} tensor")


def shape(name: str, value: Tensor, want: tuple[int, ...], meaning: str) -> None:
    """A tensor of the shape `want`. `meaning` explains that shape in the message."""
    if tuple(value.shape) != tuple(want):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, want {tuple(want)} ({meaning})")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor on the device of another argument."""
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, want {other.device} (the device of {other_name})")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """A tensor of the dtype of another argument."""
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: got dtype {_names([value.dtype])}, want {_names([other.dtype])} (the dtype of {other_name}); "
            "cast one of them or run under torch.autocast"
        )


def reference_logps(name: str, value: Tensor | None, want: tuple[int, ...], like: Tensor) -> Tensor:
    """The reference model's log-probs, one per sequence, beside the policy's; returns them detached."""
    if value is None:
        raise ValueError(f"{name}: got None, want the reference model's log-probs {list(want)}")
    tensor(name, value, dtypes=FLOATS)
    shape(name, value, want, "one per sequence")
    same_device(name, value, "the policy's log-probs", like)
    return value.detach()


def mask(
    name: str, value: Tensor, want: tuple[int, ...], meaning: str, other_name: str, other: Tensor
) -> Tensor:  # fmt: skip
    """A mask of 0 and 1 in any dtype; returns it as bool.

    Another value is an error where looking costs no host sync. Elsewhere it counts as 1.
    """
    tensor(name, value, dtypes=ZERO_OR_ONE)
    shape(name, value, want, meaning)
    same_device(name, value, other_name, other)
    if value.dtype == torch.bool:
        return value
    if free_to_read(value):
        bad = (value != 0) & (value != 1)
        if bool(bad.any()):
            raise ValueError(f"{name}: got {value[bad][0].item():g}, want 0 or 1 (or bool)")
    return value != 0


def choice(name: str, value: object, options: Iterable[str]) -> None:
    """One of the `options`."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(options)}")


def positive(name: str, value: object) -> None:
    """A finite number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number greater than 0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, want a finite number greater than 0")


def within(name: str, value: object, low: float, high: float, *, closed: bool = False) -> None:
    """A number in [low, high), or in [low, high] if `closed`."""
    interval = f"[{low}, {high}{']' if closed else ')'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, want a number in {interval}")
    if not (low <= value < high or (closed and value == high)):
        raise ValueError(f"{name}: got {value}, want a number in {interval}")


def transform(temperature: object, logit_scale: object, softcap: object) -> None:
    """The fields of a `LogitTransform`: numbers greater than 0, the soft cap perhaps None."""
    positive("temperature", temperature)
    positive("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)


def _count_sequences(labels: Tensor, cu_seqlens: Tensor | None, padded: str) -> tuple[int, str]:
    """(how many sequences, the argument that says so). `padded` describes padded labels in the message."""
    if cu_seqlens is None:
        if labels.ndim != 2:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} without cu_seqlens, want {padded}, "
                "or pass cu_seqlens for packed rows [N]"
            )
        return labels.shape[0], "labels"
    tensor("cu_seqlens", cu_seqlens, dtypes=INTEGERS, ndim=(1,))
    same_device("cu_seqlens", cu_seqlens, "labels", labels)
    if labels.ndim != 1:
        raise ValueError(f"labels: got shape {tuple(labels.shape)} with cu_seqlens, want packed rows [N]")
    return cu_seqlens.shape[0] - 1, "cu_seqlens"


def num_sequences(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences a batch has, padded `[S, T]` or packed `[N]` with `cu_seqlens [S + 1]`: at least 1."""
    sequences, name = _count_sequences(labels, cu_seqlens, "[S, T] (padded)")
    if sequences < 1:
        raise ValueError(f"{name}: got no sequences, want at least 1")
    return sequences


def num_pairs(labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many pairs a `[B chosen; B rejected]` batch has: at least 1.

    It is padded `[2B, T]`, or packed `[N]` with `cu_seqlens [2B + 1]`.
    """
    sequences, name = _count_sequences(labels, cu_seqlens, "[2B, T] (padded, chosen rows first)")
    if sequences < 2 or sequences % 2:
        raise ValueError(f"{name}: got {sequences} sequences, want an even number, at least 2 ([B chosen; B rejected])")
    return sequences // 2


def debugging() -> bool:
    """Is `FASTPREF_DEBUG=1` set? Then values are checked on accelerators too, at a host sync for each check."""
    return os.environ.get("FASTPREF_DEBUG", "0") == "1"


def free_to_read(value: Tensor) -> bool:
    """May the values be looked at? On a CPU, where that is no host sync, or when debugging."""
    return value.device.type == "cpu" or debugging()


def label_range(labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Labels in [0, vocab), or `ignore_index`.

    An accelerator is not asked (see `free_to_read`). There a bad label makes its log-prob NaN instead.
    """
    if labels.numel() == 0 or not free_to_read(labels):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels: got {int(labels[at])} at row {at}, want a token in [0, {vocab}) or ignore_index={ignore_index}"
        )


def packed_edges(cu_seqlens: Tensor | None, rows: int) -> None:
    """`cu_seqlens` that ascend from 0 to the number of rows, or None. Checked where that costs no host sync."""
    if cu_seqlens is None or not free_to_read(cu_seqlens):
        return
    edges = cu_seqlens.tolist()
    if not edges or edges[0] != 0 or edges[-1] != rows or any(a > b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"cu_seqlens: got {edges}, want ascending offsets from 0 to the number of rows, {rows}")
