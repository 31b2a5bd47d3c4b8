"""The Triton kernels as a backend."""

from fastpref_kernels import (
    bradley_terry,
    kl_estimate,
    paired_loss,
    penalized_rewards,
    penalized_rewards_backward,
    policy_loss,
    row_gradient,
    row_logprob,
    row_scores,
    row_scores_gradient,
    target_logits,
    token_kl,
    token_kl_gradient,
    unpaired_loss,
)

# Rows of buffers that we allocate start 16 elements apart at least: an odd V (50257) would otherwise put every
# row at a 2-byte boundary, where 16-byte loads are impossible.
ROW_ALIGNMENT = 16

__all__ = [
    "ROW_ALIGNMENT",
    "bradley_terry",
    "kl_estimate",
    "paired_loss",
    "penalized_rewards",
    "penalized_rewards_backward",
    "policy_loss",
    "row_gradient",
    "row_logprob",
    "row_scores",
    "row_scores_gradient",
    "target_logits",
    "token_kl",
    "token_kl_gradient",
    "unpaired_loss",
]
