"""fastpref's Triton kernels. Imports only torch, triton and itself, so that it can be published on its own."""

from .bradley_terry import bradley_terry, row_scores, row_scores_gradient
from .paired_loss import paired_loss
from .policy_loss import policy_loss
from .row_logprob import row_gradient, row_logprob, target_logits
from .sampled_kl import kl_estimate, penalized_rewards, penalized_rewards_backward
from .token_kl import token_kl, token_kl_gradient
from .unpaired_loss import unpaired_loss

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
    "target_logits",
    "token_kl",
    "token_kl_gradient",
    "unpaired_loss",
]
