"""Execution plans: which matrix products run, over which rows, in how much memory.

Begin with `plans` (log-probs) for the algebra. `kl_plans` does the same for the exact KL, and `fused` for losses whose
gradients are formed in the forward. They are made of `compact` (which rows count), `head` (the output layer and its
buffers), `products` (the matrix products) and `units` (pairs or sequences among the rows).
"""
