"""The operators: torch.library custom ops with fakes and autograd, opaque to torch.compile without a graph break.

They work on flattened rows; shapes and argument errors are dealt with by the public functions. The backward
formulas are operators themselves, so that differentiating them again raises instead of silently returning part
of the answer. Importing this package registers all of them under `torch.ops.fastpref`.
"""

from fastpref.ops import kl, linear, paired, policy, reward, tokens, unpaired

__all__ = ["kl", "linear", "paired", "policy", "reward", "tokens", "unpaired"]
