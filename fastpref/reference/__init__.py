"""The specification: every formula of fastpref in plain PyTorch, with its source.

It is slow, readable and differentiable, and it takes any dtype. In fp64 it is the truth that the kernels are
judged against (`fastpref validate`). The portable backend differentiates the loss formulas that stand here. The
Triton kernels restate them with derivatives. Nothing else in the project writes a loss down.

Shapes: `N` rows (tokens), `V` vocabulary, `d` hidden size, `S` sequences, `B` pairs. `labels[i]` is the token that
row `i` scores, so shifting has already happened. Rows labelled `ignore_index` give exactly 0.

Arguments are not checked here. The public functions in `fastpref.objectives` do that.
"""

from fastpref.reference.kl import (
    DIVERGENCES,
    KL_DIRECTIONS,
    KL_ESTIMATORS,
    kl_estimate,
    kl_penalized_rewards,
    linear_token_kl,
    token_kl,
)
from fastpref.reference.lists import (
    LIST_LOSSES,
    TIE_MODELS,
    ListObjective,
    compared_groups,
    list_loss,
    list_metrics,
)
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
from fastpref.reference.policy import (
    POLICY_METRICS,
    PolicyObjective,
    clipped_surrogate,
    policy_token_losses,
    policy_token_weights,
)
from fastpref.reference.reward import (
    Comparisons,
    aggregate_steps,
    bradley_terry,
    comparisons,
    hard_step_losses,
    ranking_center,
    reward_metrics,
    row_scores,
    soft_step_losses,
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
from fastpref.reference.unpaired import (
    UNPAIRED_LOSSES,
    UNPAIRED_MEANS,
    UnpairedObjective,
    kto_kl,
    unpaired_loss,
    unpaired_metrics,
)

__all__ = [
    "DIVERGENCES",
    "F_DIVERGENCES",
    "KL_DIRECTIONS",
    "KL_ESTIMATORS",
    "LIST_LOSSES",
    "PAIR_LOSSES",
    "POLICY_METRICS",
    "STATISTICS",
    "TIE_MODELS",
    "UNPAIRED_LOSSES",
    "UNPAIRED_MEANS",
    "Comparisons",
    "ListObjective",
    "LogitTransform",
    "PairedObjective",
    "Pairs",
    "PolicyObjective",
    "TokenStatistics",
    "UnpairedObjective",
    "aggregate_steps",
    "bradley_terry",
    "clipped_surrogate",
    "compared_groups",
    "comparisons",
    "hard_step_losses",
    "kl_estimate",
    "kl_penalized_rewards",
    "kto_kl",
    "linear_token_kl",
    "linear_token_logprobs",
    "list_loss",
    "list_metrics",
    "pair_confidence",
    "paired_loss",
    "paired_metrics",
    "policy_token_losses",
    "policy_token_weights",
    "ranking_center",
    "reward_metrics",
    "row_scores",
    "sequence_bounds",
    "sequence_logprobs",
    "shared_length_weights",
    "soft_step_losses",
    "token_kl",
    "token_logprobs",
    "token_statistics",
    "unpaired_loss",
    "unpaired_metrics",
]
