"""The portable backend's unpaired loss: derivatives are autograd's of the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients
from fastpref.common.segments import segment_sums


def unpaired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor, desirable: Tensor,
    shift: Tensor | None, objective: reference.UnpairedObjective, *, first_sequence: int, num_sequences: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.unpaired_loss`."""
    n, dtype = token_logps.numel(), token_logps.dtype
    scored = torch.ones(n, dtype=torch.bool, device=token_logps.device) if labels is None else labels != ignore_index
    if cu_seqlens is None:
        sizes = torch.full((num_sequences,), n // num_sequences, device=token_logps.device)
    else:
        sizes = cu_seqlens.diff().long()
    sums = segment_sums(token_logps.masked_fill(~scored, 0), sizes)
    wide = sums.dtype  # everything of size S stays in it
    group = desirable[first_sequence : first_sequence + num_sequences]
    ref_logps, shift = ref_logps.to(wide), None if shift is None else shift.to(wide)

    def formula(sums: Tensor) -> Tensor:
        return reference.unpaired_loss(sums, ref_logps, group, shift, objective, batch_desirable=desirable)

    loss, (gradient,) = value_and_gradients(formula, sums)
    coefs = torch.repeat_interleave(gradient.to(dtype), sizes, output_size=n).masked_fill(~scored, 0)
    return loss.to(dtype), reference.unpaired_metrics(sums, ref_logps, objective).to(dtype), coefs
