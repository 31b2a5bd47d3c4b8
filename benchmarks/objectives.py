"""The objectives of the head's benchmarks: fastpref's module, and the specification's formula from sequence sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastpref
from fastpref import reference
from fastpref.objectives.paired import PairedLoss

IGNORE = -100
BETA = 0.1
KTO_Z0 = 0.2


class Batch(NamedTuple):
    """A padded `[B chosen; B rejected]` batch at the head's input."""

    hidden: Tensor  # [2B, T, d], requires grad
    weight: Tensor  # [V, d], requires grad when the head is trained
    labels: Tensor  # [2B, T], IGNORE on prompts and padding
    ref_logps: Tensor  # [2B]
    softcap: float | None

    @property
    def scored(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each sequence `[2B]`."""
        return self.scored.sum(1)

    @property
    def desirable(self) -> Tensor:
        """For unpaired losses: the first half of the sequences, `[2B]`."""
        return torch.arange(len(self.labels), device=self.labels.device) < len(self.labels) // 2

    @property
    def products(self) -> int:
        """The matrix products that forward and backward cannot do without."""
        return 3 if self.weight.requires_grad else 2

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


class Objective(NamedTuple):
    fused: Callable[[Batch, str], Tensor]  # (batch, plan) -> loss
    of_sequences: Callable[[Tensor, Batch], Tensor]  # (summed log-probs [2B], batch) -> loss
    paired: bool  # whole pairs or sequences can be finished in the forward: the plan "pair"
    with_reference: bool


def _paired(make: Callable[[], PairedLoss], with_reference: bool) -> Objective:
    def fused(batch: Batch, plan: str) -> Tensor:
        refs = batch.ref_logps if with_reference else None
        return make().from_hidden(
            batch.hidden, batch.weight, batch.labels, ref_logps=refs, softcap=batch.softcap, plan=plan
        ).loss  # fmt: skip

    def of_sequences(sums: Tensor, batch: Batch) -> Tensor:
        (chosen, rejected), lengths = sums.chunk(2), batch.lengths.to(sums.dtype).chunk(2)
        refs = batch.ref_logps.to(sums.dtype).chunk(2) if with_reference else (None, None)
        return reference.paired_loss(chosen, rejected, refs[0], refs[1], lengths[0], lengths[1], make().objective)

    return Objective(fused, of_sequences, True, with_reference)


def _kto_fused(batch: Batch, plan: str) -> Tensor:
    return fastpref.KTOLoss(BETA).from_hidden(
        batch.hidden, batch.weight, batch.labels, batch.desirable, ref_logps=batch.ref_logps,
        kl=batch.ref_logps.new_tensor(KTO_Z0), softcap=batch.softcap, plan=plan,
    ).loss  # fmt: skip


def _kto_of_sequences(sums: Tensor, batch: Batch) -> Tensor:
    objective = fastpref.KTOLoss(BETA).objective
    refs, z0 = batch.ref_logps.to(sums.dtype), sums.new_tensor(KTO_Z0)
    return reference.unpaired_loss(sums, refs, batch.desirable, z0, objective)


def _nll_fused(batch: Batch, plan: str) -> Tensor:
    logps = fastpref.linear_token_logprobs(batch.hidden, batch.weight, batch.labels, softcap=batch.softcap, plan=plan)
    return -logps.sum() / batch.scored.sum()


def _nll_of_sequences(sums: Tensor, batch: Batch) -> Tensor:
    return -sums.sum() / batch.scored.sum()


OBJECTIVES = {
    "dpo": _paired(lambda: fastpref.DPOLoss(BETA), True),
    "simpo": _paired(lambda: fastpref.SimPOLoss(beta=2.0, gamma=0.5), False),
    "orpo": _paired(lambda: fastpref.ORPOLoss(BETA), False),
    "kto": Objective(_kto_fused, _kto_of_sequences, True, True),
    "nll": Objective(_nll_fused, _nll_of_sequences, False, False),  # plain cross-entropy, which more peers have
}
