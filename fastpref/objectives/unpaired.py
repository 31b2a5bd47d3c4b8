"""Losses on single responses labelled desirable or undesirable: KTO with its z0, and what BCO shares with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref.common import checks
from fastpref.common.precision import wide, widened
from fastpref.common.ranks import sum_over_ranks, world_size
from fastpref.objectives.head_inputs import (
    HeadOptions,
    Layout,
    ScoredRows,
    choose_plan,
    head_inputs,
    operator_options,
)
from fastpref.objectives.tokens import linear_token_logprobs, sequence_logprobs, statistics_by, token_logprobs
from fastpref.ops.common import encode
from fastpref.reference import UNPAIRED_MEANS, LogitTransform, UnpairedObjective

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class UnpairedOutput(NamedTuple):
    """What an unpaired loss returns: `loss` is 0-d and differentiable, the rest is detached.

    All stays on the device, so there is no host sync. `logps` are summed log-probs in nats, `rewards`
    `beta * (logp - ref_logp)`. `shift` (0-d) is what rewards were compared with: KTO's z0 (`kl`), BCO's delta, or 0 for
    `apo_zero_unpaired`. The class means below are formed when asked for. A class without sequences has mean 0.
    """

    loss: Tensor
    logps: Tensor  # [S]
    rewards: Tensor  # [S]
    desirable: Tensor  # [S]
    shift: Tensor

    @property
    def kl(self) -> Tensor:
        """`shift` by the name that it has in KTO."""
        return self.shift

    @property
    def chosen_logps(self) -> Tensor:
        """Mean log-prob of desirable sequences, 0-d."""
        return _class_means(self.logps, self.desirable)[0]

    @property
    def rejected_logps(self) -> Tensor:
        """Mean log-prob of undesirable sequences, 0-d."""
        return _class_means(self.logps, self.desirable)[1]

    @property
    def chosen_rewards(self) -> Tensor:
        """Mean reward of desirable sequences, 0-d."""
        return _class_means(self.rewards, self.desirable)[0]

    @property
    def rejected_rewards(self) -> Tensor:
        """Mean reward of undesirable sequences, 0-d."""
        return _class_means(self.rewards, self.desirable)[1]

    @property
    def margins(self) -> Tensor:
        """Difference of the classes' mean rewards, 0-d."""
        chosen, rejected = _class_means(self.rewards, self.desirable)
        return chosen - rejected


def class_sums(values: Tensor, desirable: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts of desirable and undesirable values, each `[2]`."""
    members = torch.stack([desirable, ~desirable])
    return torch.where(members, values, 0).sum(1), members.sum(1)


def _class_means(values: Tensor, desirable: Tensor) -> Tensor:
    sums, counts = class_sums(values, desirable)
    return sums / counts.clamp(min=1)


def _reference(ref_logps: Tensor | None, sequences: int, like: Tensor) -> Tensor:
    return checks.reference_logps("ref_logps", ref_logps, (sequences,), like).to(wide(like.dtype))


class UnpairedBatch(NamedTuple):
    """Checked inputs of S sequences."""

    labels: Tensor | None  # [N], or None where each row is a sequence
    cu_seqlens: Tensor | None
    ignore_index: int
    desirable: Tensor  # [S]
    ref_logps: Tensor  # [S]


class UnpairedLoss(nn.Module):
    """A loss on single sequences, padded `[S, T]` or packed `[N]`: what `KTOLoss` and `BCOLoss` share.

    `point` is what a subclass's `_shift` needs besides the batch: KTO's z0, or whether BCO updates its delta.
    """

    def __init__(self, objective: UnpairedObjective) -> None:
        super().__init__()
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            checks.positive(name, getattr(objective, name))
        checks.choice("mean", objective.mean, UNPAIRED_MEANS)
        self.objective = objective._replace(
            beta=float(objective.beta),
            desirable_weight=float(objective.desirable_weight),
            undesirable_weight=float(objective.undesirable_weight),
        )
        self._encoded = encode(self.objective)

    def extra_repr(self) -> str:
        defaults = UnpairedObjective()._asdict()
        changed = {k: v for k, v in self.objective._asdict().items() if v != defaults[k]}
        return ", ".join(f"{k}={v!r}" for k, v in ({"loss": self.objective.loss} | changed).items())

    def _shift(self, point, batch: UnpairedBatch, logps: Callable[[], Tensor], like: Tensor) -> Tensor | None:
        """What rewards are compared with, 0-d. `logps()` returns this batch's detached log-probs `[S]`."""
        raise NotImplementedError

    def _batch(
        self, labels, cu_seqlens, ignore_index, desirable, ref_logps, sequences: int, like: Tensor
    ) -> UnpairedBatch:
        checks.tensor("desirable", desirable, dtypes=(torch.bool,))
        checks.shape("desirable", desirable, (sequences,), "one per sequence")
        checks.same_device("desirable", desirable, "the policy's log-probs", like)
        return UnpairedBatch(labels, cu_seqlens, ignore_index, desirable, _reference(ref_logps, sequences, like))

    def _output(self, loss: Tensor, metrics: Tensor, batch: UnpairedBatch, shift: Tensor | None) -> UnpairedOutput:
        logps, rewards = metrics.unbind(0)
        shift = metrics.new_zeros(()) if shift is None else shift
        return UnpairedOutput(loss, logps, rewards, batch.desirable, shift)

    def _loss(self, token_logps: Tensor, batch: UnpairedBatch, shift: Tensor | None) -> UnpairedOutput:
        loss, metrics, _ = torch.ops.fastpref.unpaired_loss(
            token_logps, batch.labels, batch.cu_seqlens, batch.ref_logps, batch.desirable, shift, self._encoded,
            batch.ignore_index,
        )  # fmt: skip
        return self._output(loss, metrics, batch, shift)

    def _from_sequences(self, logps: Tensor, desirable: Tensor, ref_logps: Tensor | None, point) -> UnpairedOutput:
        checks.tensor("logps", logps, dtypes=checks.FLOATS, ndim=(1,))
        if logps.shape[0] == 0:
            raise ValueError("logps: got no sequences, want at least 1")
        logps = widened(logps)
        batch = self._batch(None, None, -100, desirable, ref_logps, logps.shape[0], logps)
        return self._loss(logps, batch, self._shift(point, batch, logps.detach, logps))

    def _from_tokens(self, logps: Tensor, labels: Tensor, batch: UnpairedBatch, point) -> UnpairedOutput:
        def summed() -> Tensor:
            return sequence_logprobs(
                logps.detach(), labels, cu_seqlens=batch.cu_seqlens, ignore_index=batch.ignore_index
            )

        return self._loss(logps.reshape(-1), batch, self._shift(point, batch, summed, logps))

    def from_tokens(
        self, logps: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor | None = None,
        point: Tensor | None = None, cu_seqlens: Tensor | None = None, *, ignore_index: int = -100,
    ) -> UnpairedOutput:  # fmt: skip
        """From differentiable token log-probs, shaped like `labels`. `point` is KTO's `kl`, or whether BCO's delta is
        updated."""
        sequences = checks.num_sequences(labels, cu_seqlens)
        batch = self._batch(labels.reshape(-1), cu_seqlens, ignore_index, desirable, ref_logps, sequences, logps)
        return self._from_tokens(logps, labels, batch, point)

    def _from_logits(
        self, logits: Tensor, labels: Tensor, desirable: Tensor, ref_logps: Tensor | None, cu_seqlens: Tensor | None,
        ignore_index: int, transform: LogitTransform, point,
    ) -> UnpairedOutput:  # fmt: skip
        logps = token_logprobs(logits, labels, ignore_index=ignore_index, **transform._asdict())
        return self.from_tokens(logps, labels, desirable, ref_logps, point, cu_seqlens, ignore_index=ignore_index)

    def _from_hidden(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, desirable: Tensor, bias: Tensor | None,
        ref_logps: Tensor | None, cu_seqlens: Tensor | None, options: HeadOptions, point, *, separable: bool,
    ) -> UnpairedOutput:  # fmt: skip
        inputs, ignore_index = head_inputs(hidden, weight, labels, bias, options), options.ignore_index
        sequences = checks.num_sequences(labels, cu_seqlens)
        batch = self._batch(inputs.labels, cu_seqlens, ignore_index, desirable, ref_logps, sequences, inputs.hidden)
        choice = choose_plan(inputs, options, Layout(cu_seqlens, sequences) if separable else None)
        if choice.plan != "pair":
            logps = statistics_by(choice, inputs, options, labels.shape, ()).logps
            return self._from_tokens(logps, labels, batch, point)
        shift = self._shift(point, batch, _not_needed, batch.ref_logps)
        loss, metrics, *_ = torch.ops.fastpref.linear_unpaired_loss(
            *inputs.head, batch.ref_logps, desirable, shift, cu_seqlens, *operator_options(options), self._encoded,
            choice.workspace_bytes, *inputs.needs(), inputs.compute_weight, choice.known.edges,
        )  # fmt: skip
        return self._output(loss, metrics, batch, shift)


def _not_needed() -> Tensor:
    raise AssertionError("a separable loss looked at its batch")


class KTOLoss(UnpairedLoss):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8).

    The loss of a desirable sequence is `weight * (1 - sigmoid(reward - beta * z0))`. Of an undesirable one the sigmoid
    has the opposite sign inside. The formula stands in `fastpref.reference.unpaired`.

    Args:
        beta: risk aversion, > 0; rewards are `beta * (logp - ref_logp)`.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U, > 0.
        loss_type: `kto`, or `apo_zero_unpaired` (arXiv 2408.06266), which compares with 0 instead of z0.
        mean: `batch` divides by the number of sequences after the class weights, as TRL does; `class` adds the
            two classes' own means, the paper's expectations. A class without sequences adds 0.

    In each call `kl` is z0, a 0-d constant, from `kto_kl` or `mismatched_kl_from_hidden`. `apo_zero_unpaired` does not
    use it.

    To make one or to call it raises `ValueError` or `TypeError` for a wrong shape, dtype, device or option, and where
    `ref_logps` or `kl` is missing. The message names the argument.
    """

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss_type: str = "kto",
        mean: str = "batch",
    ) -> None:
        checks.choice("loss_type", loss_type, KTO_LOSS_TYPES)
        super().__init__(UnpairedObjective(loss_type, beta, desirable_weight, undesirable_weight, mean))

    def _shift(self, point: Tensor | None, batch: UnpairedBatch, logps, like: Tensor) -> Tensor | None:
        if self.objective.loss != "kto":
            return None
        if point is None:
            raise ValueError("kl: got None, want the detached z0 (0-d; see fastpref.kto_kl) for loss_type 'kto'")
        checks.tensor("kl", point, dtypes=checks.FLOATS)
        checks.shape("kl", point, (), "one z0 for the batch")
        checks.same_device("kl", point, "the policy's log-probs", like)
        return point.detach().to(like.dtype)

    def forward(
        self, logps: Tensor, desirable: Tensor, ref_logps: Tensor | None = None, kl: Tensor | None = None
    ) -> UnpairedOutput:
        """From summed log-probs of sequences `[S]`.

        `desirable` is `[S]` bool, and `ref_logps` `[S]` are the reference's summed log-probs.
        """
        return self._from_sequences(logps, desirable, ref_logps, kl)

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        desirable: Tensor,
        ref_logps: Tensor | None = None,
        kl: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> UnpairedOutput:
        """From logits `[S, T, V]` and shifted labels `[S, T]`; or packed, `[N, V]` and `[N]` with `cu_seqlens`."""
        transform = LogitTransform(temperature, logit_scale, softcap)
        return self._from_logits(logits, labels, desirable, ref_logps, cu_seqlens, ignore_index, transform, kl)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        desirable: Tensor,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        kl: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        plan: str = "auto",
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        workspace_bytes: int | None = None,
        scored_rows: ScoredRows = None,
    ) -> UnpairedOutput:
        """From hidden states `[S, T, d]` (or `[N, d]` with `cu_seqlens`) and the head's weight `[V, d]`.

        No logits in memory: 3 matrix products over the scored rows with a trainable head, 2 with a frozen one,
        1 without gradients. `plan` and `workspace_bytes` are as in `linear_token_logprobs`. Plan `"pair"` is possible
        too: its groups are whole sequences here. `scored_rows` is as in `PairedLoss.from_hidden`, a list being `[S]`.
        """
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
        return self._from_hidden(
            hidden, weight, labels, desirable, bias, ref_logps, cu_seqlens, options, kl, separable=True
        )


@torch.no_grad()
def kto_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KTO's z0 from the summed log-probs `[S]` of mismatched completions: 0-d, detached, never negative.

    Source: arXiv 2402.01306, section 4.1. It is the mean of `logps - ref_logps` over this rank's sequences, then the
    mean over ranks (where torch.distributed is initialised), then clamped at 0: TRL's order. Every rank has to call it.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or no sequences.
    """
    checks.tensor("logps", logps, dtypes=checks.FLOATS, ndim=(1,))
    if logps.shape[0] == 0:
        raise ValueError("logps: got no sequences, want at least 1")
    logps = widened(logps)
    mean = (logps - _reference(ref_logps, logps.shape[0], logps)).mean()
    return (sum_over_ranks(mean) / world_size()).clamp(min=0)


@torch.no_grad()
def mismatched_kl_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> Tensor:
    """`kto_kl` from the policy's hidden states of mismatched prompts and completions (see `mismatched_indices`).

    One matrix product over the scored rows, no logits in memory, no gradient. `ref_logps` `[S]` are the reference
    model's summed log-probs of the same sequences. The other arguments are as in `KTOLoss.from_hidden`.
    """
    checks.num_sequences(labels, cu_seqlens)
    logps = linear_token_logprobs(
        hidden, weight, labels, bias, ignore_index=ignore_index, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, workspace_bytes=workspace_bytes, scored_rows=scored_rows,
    )  # fmt: skip
    return kto_kl(sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index), ref_logps)


def mismatched_indices(sequences: int, block_size: int) -> list[int]:
    """Whose completion each prompt gets for z0: that of the prompt before it in its block. The first gets the last's.

    Blocks are consecutive and of `block_size`. That is TRL's rotation. Blocks as large as a device's batch let z0 see
    the same completions as the loss. A last block of one sequence keeps its own completion, as in TRL.

    Raises:
        ValueError: `block_size` is less than 2.
    """
    if block_size < 2:
        raise ValueError(f"block_size: got {block_size}, want at least 2 (a sequence alone has no other completion)")
    ends = (min(i - i % block_size + block_size, sequences) for i in range(sequences))
    return [end - 1 if i % block_size == 0 else i - 1 for i, end in enumerate(ends)]
