"""The specification: every formula of fastpref in plain PyTorch.

Slow, readable, differentiable and dtype-agnostic: run it in fp64 and it is the truth that the kernels
are judged against (`fastpref validate`). The portable backend takes its pair formulas from here, the
Triton kernels restate them with derivatives; nothing else in the project writes a loss down.

Shapes: `N` rows (tokens), `V` vocabulary, `d` hidden size, `S` sequences, `B` pairs. `labels[i]` is the
token that row `i` scores, so shifting has already happened; rows labelled `ignore_index` give exactly 0.
"""

from fastpref.reference.paired import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    PairedObjective,
    Pairs,
    pair_confidence,
    paired_loss,
    paired_metrics,
    shared_length_weights,
)
from fastpref.reference.tokens import (
    STATISTICS,
    LogitTransform,
    TokenStatistics,
    linear_token_logprobs,
    sequence_bounds,
    sequence_logprobs,
    token_logprobs,
    token_statistics,
)

__all__ = [
    "F_DIVERGENCES",
    "PAIR_LOSSES",
    "STATISTICS",
    "LogitTransform",
    "PairedObjective",
    "Pairs",
    "TokenStatistics",
    "linear_token_logprobs",
    "pair_confidence",
    "paired_loss",
    "paired_metrics",
    "sequence_bounds",
    "sequence_logprobs",
    "shared_length_weights",
    "token_logprobs",
    "token_statistics",
]
