"""Suite: how time and memory at the head grow. One size varies at a time, the others stay at their base."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.head import BOUNDS, SMALL, Case, HeadProblem
from benchmarks.suite import Suite

PROVIDERS = ("fastpref", "eager", "trl")
BF16 = torch.bfloat16


def _sweep(base: Case, axes: dict[str, tuple[int, ...]]) -> list[Case]:
    """`scored` varies the share of rows that have a label. `seq_len` and `pairs` vary how many rows there are."""
    cases = []
    for axis, values in axes.items():
        for value in values:
            varied: dict[str, Any] = {axis: value}
            one = base._replace(name=f"{axis} {value}", axis=axis, **varied)
            if axis in ("pairs", "seq_len"):  # the share of scored rows stays
                one = one._replace(scored=base.scored * one.rows // base.rows)
            cases.append(one)
    return cases


def _base(d: int, vocab: int, pairs: int, seq_len: int, dtype: torch.dtype) -> Case:
    scored = pairs * seq_len  # half of all rows
    return Case("base", d, vocab, pairs, seq_len, scored, dtype, providers=PROVIDERS)


CASES = {
    "small": [SMALL],
    "quick": _sweep(_base(256, 16384, 1, 64, torch.float32), {"vocab": (8192, 16384, 32768), "seq_len": (32, 64, 128)}),
    "cpu": _sweep(
        _base(576, 49152, 2, 128, torch.float32),
        {
            "scored": (64, 128, 256, 512),
            "vocab": (8192, 32768, 131072),
            "d": (256, 512, 1024, 2048),
            "pairs": (1, 2, 4),
            "seq_len": (64, 128, 256, 512),
        },
    ),
    "cuda": _sweep(
        _base(4096, 131072, 4, 1024, BF16),
        {
            "scored": (512, 2048, 8192),
            "vocab": (32768, 131072, 262144),
            "d": (1024, 4096, 8192),
            "pairs": (1, 4, 8),
            "seq_len": (256, 1024, 2048),
        },
    ),
}


class ScaleProblem(HeadProblem):
    """The head's problem, without bounds that nobody plots twice."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.providers = tuple(name for name in self.providers if name != BOUNDS[1])


SUITE = Suite("scale", "Time and memory at the head against N, V, d, B and T", ScaleProblem, CASES)
