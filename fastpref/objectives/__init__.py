"""The public losses, per-token log-probs, exact KL, and what goes with them."""
