"""BCO (binary classifier optimisation): an unpaired loss with a running reward shift."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.common import checks
from fastpref.common.ranks import sum_over_ranks
from fastpref.objectives.head_inputs import HeadOptions, ScoredRows
from fastpref.objectives.unpaired import UnpairedBatch, UnpairedLoss, UnpairedOutput, class_sums
from fastpref.reference import LogitTransform, UnpairedObjective

BCO_SHIFTS = ("ema", "mean")


class BCOLoss(UnpairedLoss):
    """Binary classifier optimisation (Jung et al. 2024, arXiv 2404.04656): logistic loss of `reward - delta`.

    Desirable responses should have a reward above delta, undesirable ones below.

    Args:
        beta: rewards are `beta * (logp - ref_logp)`, > 0.
        desirable_weight, undesirable_weight, mean: as in `KTOLoss`.
        shift: how delta follows the rewards of the batches seen so far. `ema`: halfway between the classes' mean
            rewards (the paper's delta), each an exponential moving average. `mean`: the mean of all rewards seen,
            as in TRL's BCOTrainer (up to 1.13).
        decay: weight of the past in `ema`, in [0, 1). The first batch with a class sets its mean.

    In training mode each call first merges its batch's rewards into delta, then applies it. Where torch.distributed is
    initialised, the rewards of all ranks are merged. The argument `update` of a call decides in place of the mode.

    The state is in the buffers `class_means` and `class_counts`. It moves to the log-probs' device by itself.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    class_means: Tensor  # mean reward of desirable and undesirable sequences
    class_counts: Tensor  # sequences seen of each

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        mean: str = "batch",
        shift: str = "ema",
        decay: float = 0.9,
    ) -> None:
        checks.choice("shift", shift, BCO_SHIFTS)
        checks.within("decay", decay, 0.0, 1.0)
        super().__init__(UnpairedObjective("bco", beta, desirable_weight, undesirable_weight, mean))
        self.shift, self.decay = shift, float(decay)
        self.register_buffer("class_means", torch.zeros(2))
        self.register_buffer("class_counts", torch.zeros(2, dtype=torch.long))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift!r}, decay={self.decay!r}"

    @property
    def delta(self) -> Tensor:
        """The reward shift, 0-d; 0 before the first update."""
        weights = (self.class_counts if self.shift == "mean" else self.class_counts > 0).to(self.class_means.dtype)
        return (self.class_means * weights).sum() / weights.sum().clamp(min=1)

    @torch.no_grad()
    def update_shift(self, rewards: Tensor, desirable: Tensor) -> None:
        """Merge a batch's rewards `[S]`, of which `desirable` `[S]` tells the class, into delta.

        A class without sequences keeps its mean. Every rank has to call it.
        """
        sums, counts = class_sums(rewards, desirable)
        sums, counts = sum_over_ranks(torch.cat([sums, counts.to(sums.dtype)])).chunk(2)
        old, seen = self.class_means.to(sums), self.class_counts.to(sums)
        if self.shift == "mean":
            rate = counts / (seen + counts).clamp(min=1)
        else:
            rate = sums.new_full((2,), 1 - self.decay).where(seen > 0, 1.0).where(counts > 0, 0.0)
        self.class_means = old + rate * (sums / counts.clamp(min=1) - old)
        self.class_counts = self.class_counts.to(sums.device) + counts.long()

    def _updates(self, update: bool | None) -> bool:
        return self.training if update is None else update

    def _shift(self, point: bool, batch: UnpairedBatch, logps, like: Tensor) -> Tensor:
        if point:
            self.update_shift(self.objective.beta * (logps() - batch.ref_logps), batch.desirable)
        return self.delta.to(like)

    def forward(
        self, logps: Tensor, desirable: Tensor, ref_logps: Tensor | None = None, *, update: bool | None = None
    ) -> UnpairedOutput:
        """From summed log-probs of sequences `[S]`.

        `desirable` is `[S]` bool, and `ref_logps` `[S]` are the reference's summed log-probs.
        """
        return self._from_sequences(logps, desirable, ref_logps, self._updates(update))

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        update: bool | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> UnpairedOutput:
        """From logits `[S, T, V]` and shifted labels `[S, T]`; or packed, `[N, V]` and `[N]` with `cu_seqlens`.

        `desirable` is `[S]` bool, and `ref_logps` `[S]` are the reference's summed log-probs.
        """
        transform, update = LogitTransform(temperature, logit_scale, softcap), self._updates(update)
        return self._from_logits(logits, labels, desirable, ref_logps, cu_seqlens, ignore_index, transform, update)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        plan: str = "auto",
        *,
        update: bool | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        workspace_bytes: int | None = None,
        scored_rows: ScoredRows = None,
    ) -> UnpairedOutput:
        """From hidden states, as `KTOLoss.from_hidden`.

        A delta that is updated from the batch couples the batch's sequences. With a trainable head and a batch that
        outgrows the workspace that costs a fourth matrix product. To keep it at three, pass `update=False` and call
        `update_shift(out.rewards, desirable)` after the step. Delta is then one batch old.

        Raises:
            ValueError: plan `"pair"` while delta is updated from the same batch. Others as `KTOLoss.from_hidden`.
        """
        update = self._updates(update)
        if update and plan == "pair":
            raise ValueError("plan: got 'pair' while delta is updated from the same batch, want update=False")
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
        return self._from_hidden(
            hidden, weight, labels, desirable, bias, ref_logps, cu_seqlens, options, update, separable=not update
        )
