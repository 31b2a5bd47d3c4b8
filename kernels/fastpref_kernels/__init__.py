"""fastpref's Triton kernels. Imports only torch, triton and itself, so that it can be published on its own."""

from .paired_loss import paired_loss
from .row_logprob import row_gradient, row_logprob, target_logits
from .unpaired_loss import unpaired_loss

__all__ = ["paired_loss", "row_gradient", "row_logprob", "target_logits", "unpaired_loss"]
