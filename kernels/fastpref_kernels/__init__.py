"""fastpref's Triton kernels and their launchers. It imports only torch and triton, so it can be published on its own.

A function here launches one kernel (`_NAME_kernel` in the same file). Arguments are not checked, except for memory that
is written in place. `N` rows (tokens), `V` vocabulary, `d` hidden size, `S` sequences, `B` pairs. Results are fp32, or
fp64 for fp64 inputs. Every sum has a fixed order and nothing is atomic, so results are the same to the bit.
"""

from .bradley_terry import bradley_terry, row_scores, row_scores_gradient
from .list_loss import list_loss
from .paired_loss import paired_loss
from .policy_loss import policy_loss
from .row_logprob import row_gradient, row_logprob, target_logits
from .sampled_kl import kl_estimate, penalized_rewards, penalized_rewards_backward
from .token_kl import token_kl, token_kl_gradient
from .unpaired_loss import unpaired_loss

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
    "target_logits",
    "token_kl",
    "token_kl_gradient",
    "unpaired_loss",
]
