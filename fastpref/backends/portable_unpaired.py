"""The portable backend's unpaired loss: derivatives are autograd's of the specification."""

from __future__ import annotations

from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients
from fastpref.backends.sequences import Sequences


def unpaired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor, desirable: Tensor,
    shift: Tensor | None, objective: reference.UnpairedObjective, *, first_sequence: int, num_sequences: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.unpaired_loss`."""
    dtype = token_logps.dtype
    sequences = Sequences.of(token_logps, labels, cu_seqlens, num_sequences, ignore_index)
    sums = sequences.sums(token_logps)
    wide = sums.dtype  # everything of size S stays in it
    group = desirable[first_sequence : first_sequence + num_sequences]
    ref_logps, shift = ref_logps.to(wide), None if shift is None else shift.to(wide)

    def formula(sums: Tensor) -> Tensor:
        return reference.unpaired_loss(sums, ref_logps, group, shift, objective, batch_desirable=desirable)

    loss, (gradient,) = value_and_gradients(formula, sums)
    metrics = reference.unpaired_metrics(sums, ref_logps, objective)
    return loss.to(dtype), metrics.to(dtype), sequences.spread(gradient, dtype)
