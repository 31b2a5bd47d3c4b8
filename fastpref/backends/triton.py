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


def row_stride(columns: int, element_size: int) -> int:
    """A multiple of 16 elements: an odd V (50257) would otherwise put every row at a 2-byte boundary, where 16-byte
    loads are impossible."""
    return (columns + 15) // 16 * 16


__all__ = [
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
    "row_stride",
    "target_logits",
    "token_kl",
    "token_kl_gradient",
    "unpaired_loss",
]
