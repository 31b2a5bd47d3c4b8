"""The portable backend's loss on lists: derivatives are autograd's of the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients
from fastpref.common.segments import segment_sums


def list_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None, ranks: Tensor,
    group: Tensor, total_groups: Tensor | None, objective: reference.ListObjective, *, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.list_loss`."""
    n, sequences, dtype = token_logps.numel(), ranks.numel(), token_logps.dtype
    scored = torch.ones(n, dtype=torch.bool, device=token_logps.device) if labels is None else labels != ignore_index
    if cu_seqlens is None:
        sizes = torch.full((sequences,), n // sequences, device=token_logps.device)
    else:
        sizes = cu_seqlens.diff().long()
    sums = segment_sums(token_logps.masked_fill(~scored, 0), sizes)
    ref_logps = None if ref_logps is None else ref_logps.to(sums.dtype)  # everything of size S stays in it

    def formula(sums: Tensor) -> Tensor:
        scores = objective.beta * (sums if ref_logps is None else sums - ref_logps)
        return reference.list_loss(scores, ranks, group, objective, total_groups=total_groups)

    loss, (gradient,) = value_and_gradients(formula, sums)
    coefs = torch.repeat_interleave(gradient.to(dtype), sizes, output_size=n).masked_fill(~scored, 0)
    return loss.to(dtype), reference.list_metrics(sums, ref_logps, ranks, group, objective).to(dtype), coefs
