"""What the portable losses on sequences share: sums of token log-probs, and coefficients put back on the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.common.segments import segment_sums


class Sequences(NamedTuple):
    """Which of N tokens count, and how the tokens are S sequences."""

    scored: Tensor  # [N] bool
    sizes: Tensor  # [S]

    @classmethod
    def of(
        cls, token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, sequences: int, ignore_index: int
    ) -> Sequences:
        """Sequences of `cu_seqlens`, or of N / S tokens each. Without labels all tokens count."""
        n, device = token_logps.numel(), token_logps.device
        scored = torch.ones(n, dtype=torch.bool, device=device) if labels is None else labels != ignore_index
        if cu_seqlens is None:
            return cls(scored, torch.full((sequences,), n // sequences, device=device))
        return cls(scored, cu_seqlens.diff().long())

    def sums(self, values: Tensor) -> Tensor:
        """Sums over each sequence's scored tokens, `[N]` -> `[S]` in the dtype of `segment_sums`."""
        return segment_sums(values.masked_fill(~self.scored, 0), self.sizes)

    def spread(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Each sequence's value at its scored tokens, 0 at others: `[S]` -> `[N]` in `dtype`."""
        tokens = torch.repeat_interleave(values.to(dtype), self.sizes, output_size=self.scored.numel())
        return tokens.masked_fill(~self.scored, 0)
