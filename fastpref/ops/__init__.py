"""The operators: `torch.library` custom ops with fakes and autograd, which torch.compile takes without a graph break.

They take flattened rows. The public functions deal with shapes and argument errors, and call
`torch.ops.fastpref.NAME`. Importing this package registers all of them.

A backward is an operator too. So differentiating it again raises an error, instead of silently returning a part of the
answer.

Results named `d loss / d ...` are the coefficients that the backward scales by the upstream gradient.
"""

from fastpref.ops import kl, linear, lists, paired, policy, reward, tokens, unpaired

__all__ = ["kl", "linear", "lists", "paired", "policy", "reward", "tokens", "unpaired"]
