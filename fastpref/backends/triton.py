"""The Triton kernels as a backend."""

from fastpref_kernels import paired_loss, row_gradient, row_logprob, target_logits, unpaired_loss

# Rows of buffers that we allocate start 16 elements apart at least: an odd V (50257) would otherwise put every
# row at a 2-byte boundary, where 16-byte loads are impossible.
ROW_ALIGNMENT = 16

__all__ = ["ROW_ALIGNMENT", "paired_loss", "row_gradient", "row_logprob", "target_logits", "unpaired_loss"]
