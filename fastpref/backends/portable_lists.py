"""The portable backend's loss on lists: derivatives are autograd's of the specification."""

from __future__ import annotations

from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients
from fastpref.backends.sequences import Sequences


def list_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None, ranks: Tensor,
    group: Tensor, total_groups: Tensor | None, objective: reference.ListObjective, *, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.list_loss`."""
    dtype = token_logps.dtype
    sequences = Sequences.of(token_logps, labels, cu_seqlens, ranks.numel(), ignore_index)
    sums = sequences.sums(token_logps)
    ref_logps = None if ref_logps is None else ref_logps.to(sums.dtype)  # everything of size S stays in it

    def formula(sums: Tensor) -> Tensor:
        scores = objective.beta * (sums if ref_logps is None else sums - ref_logps)
        return reference.list_loss(scores, ranks, group, objective, total_groups=total_groups)

    loss, (gradient,) = value_and_gradients(formula, sums)
    metrics = reference.list_metrics(sums, ref_logps, ranks, group, objective)
    return loss.to(dtype), metrics.to(dtype), sequences.spread(gradient, dtype)
