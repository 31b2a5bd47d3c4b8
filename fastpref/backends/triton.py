"""The Triton backend: the functions of `fastpref_kernels`, and how far apart rows of logits should begin."""

from fastpref_kernels import (
    bradley_terry,
    kl_estimate,
    list_loss,
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
    """Elements from one row of logits to the next: a multiple of 16.

    An odd V (50257) would otherwise put rows at 2-byte boundaries, where 16-byte loads are impossible.
    """
    return (columns + 15) // 16 * 16


__all__ = [
    "bradley_terry",
    "kl_estimate",
    "list_loss",
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
