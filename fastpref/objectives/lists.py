"""DPO on several ranked responses to a prompt: Plackett-Luce, all pairs, and models that know ties."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref.common import checks
from fastpref.common.precision import wide, widened
from fastpref.objectives.head_inputs import (
    HeadOptions,
    Layout,
    ScoredRows,
    choose_plan,
    head_inputs,
    operator_options,
)
from fastpref.objectives.tokens import sequence_logprobs, statistics_by, token_logprobs
from fastpref.ops.common import encode
from fastpref.plans.units import whole_groups
from fastpref.reference import LIST_LOSSES, TIE_MODELS, ListObjective, TokenStatistics

LIST_LOSS_TYPES = tuple(LIST_LOSSES)


class ListOutput(NamedTuple):
    """What a loss on lists returns: `loss` is 0-d and differentiable, the rest is `[S]` and detached.

    All stays on the device, so there is no host sync. The means below are formed when asked for. They are 0-d, over
    groups that have different ranks, and 0 where there are none.

    - `logps`: summed log-probs in nats.
    - `rewards`: `beta * (logp - ref_logp)`.
    - `correct`, `compared`: of how many pairs the response is the better one, and in how many of them its reward is
      higher.
    - `best`, `worst`: the response's share of its group's best and worst rank, 1 / m for one of m tied ones, else 0.
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor
    correct: Tensor
    compared: Tensor
    best: Tensor
    worst: Tensor

    @property
    def accuracies(self) -> Tensor:
        """The share of pairs of different ranks whose better response has the higher reward."""
        return self.correct.sum() / self.compared.sum().clamp(min=1)

    @property
    def chosen_logps(self) -> Tensor:
        """Mean log-prob of the groups' best responses."""
        return _mean_by(self.logps, self.best)

    @property
    def rejected_logps(self) -> Tensor:
        """Mean log-prob of the groups' worst responses."""
        return _mean_by(self.logps, self.worst)

    @property
    def chosen_rewards(self) -> Tensor:
        """Mean reward of the groups' best responses."""
        return _mean_by(self.rewards, self.best)

    @property
    def rejected_rewards(self) -> Tensor:
        """Mean reward of the groups' worst responses."""
        return _mean_by(self.rewards, self.worst)

    @property
    def margins(self) -> Tensor:
        """By how much the best responses' rewards exceed the worst ones', on average."""
        return self.chosen_rewards - self.rejected_rewards


def _mean_by(values: Tensor, shares: Tensor) -> Tensor:
    return (values * shares).sum() / shares.sum().clamp(min=1)


def list_objective(loss_type: str, beta: float, nu: float | None) -> ListObjective:
    """The checked settings of a loss on lists. `nu` None is the paper's.

    Raises:
        ValueError: an unknown loss type, or a number out of its range.
    """
    checks.choice("loss_type", loss_type, LIST_LOSS_TYPES)
    checks.positive("beta", beta)
    if loss_type not in TIE_MODELS:
        if nu is not None:
            raise ValueError(f"nu: got {nu} with loss_type {loss_type!r}, want None: it is of {', '.join(TIE_MODELS)}")
        return ListObjective(loss_type, float(beta))
    nu = TIE_MODELS[loss_type] if nu is None else nu
    checks.positive("nu", nu)
    if loss_type == "rao_kupper" and nu <= 1:
        raise ValueError(f"nu: got {nu}, want more than 1 for loss_type 'rao_kupper'")
    return ListObjective(loss_type, float(beta), float(nu))


def check_ranks(ranks: Tensor, sequences: int, like_name: str, like: Tensor) -> None:
    """Ranks `[S]` of any number type; NaN, a judgement that is missing, is refused where that costs no host sync.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or value.
    """
    checks.tensor("ranks", ranks, dtypes=(*checks.INTEGERS, *checks.FLOATS))
    checks.shape("ranks", ranks, (sequences,), "one per response")
    checks.same_device("ranks", ranks, like_name, like)
    if not torch.compiler.is_compiling() and checks.free_to_read(ranks) and bool(ranks.isnan().any()):
        raise ValueError(f"ranks: got NaN at {int(ranks.isnan().nonzero()[0])}, want a number for each response")


def check_group(group: Tensor, sequences: int, like_name: str, like: Tensor) -> None:
    """Integers `[S]` that say which prompt each response answers.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device.
    """
    checks.tensor("group", group, dtypes=checks.INTEGERS)
    checks.shape("group", group, (sequences,), "one per response")
    checks.same_device("group", group, like_name, like)


class _Groups(NamedTuple):
    """Which sequence answers which prompt."""

    group: Tensor  # [S]
    sizes: Sequence[int] | None  # of consecutive groups, where the host knows them

    def bounds(self) -> list[int]:
        """Where the sequences may be cut; one host sync where the sizes are not known."""
        if self.sizes is None:
            return whole_groups(self.group.tolist())
        return [0, *itertools.accumulate(self.sizes)]


def _groups(group: Tensor | None, sizes: Sequence[int] | None, sequences: int, like: Tensor) -> _Groups:
    if group is None and sizes is None:
        raise ValueError("group, sizes: got neither, want which prompt each response answers")
    if sizes is not None:
        sizes = [int(size) for size in sizes]
        if sum(sizes) != sequences or min(sizes, default=0) < 1:
            raise ValueError(f"sizes: got {sizes}, want at least 1 response to each prompt, {sequences} in all")
    if group is None:
        assert sizes is not None
        numbers = torch.arange(len(sizes), device=like.device)
        return _Groups(numbers.repeat_interleave(torch.tensor(sizes, device=like.device), output_size=sequences), sizes)
    check_group(group, sequences, "the policy's log-probs", like)
    found = _Groups(group, sizes)
    if sizes is not None and not torch.compiler.is_compiling() and checks.free_to_read(group):
        runs = [len(list(run)) for _, run in itertools.groupby(group.tolist())]
        if runs != sizes or len(set(group.tolist())) != len(runs):
            raise ValueError(f"sizes: got {sizes}, want those of the groups, one after the other: {runs}")
    return found


class _Batch(NamedTuple):
    """Checked inputs of S sequences."""

    labels: Tensor | None  # [N], or None where each row is a sequence
    cu_seqlens: Tensor | None
    ignore_index: int
    ref_logps: Tensor  # [S]
    ranks: Tensor  # [S]
    groups: _Groups


class ListDPOLoss(nn.Module):
    """Direct preference optimisation from k responses to a prompt that are ranked; k may differ from prompt to prompt.

    With the score `s = beta * (logp - ref_logp)` of each response, `loss_type` is

    - `plackett_luce`: the likelihood of the ranking (Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, eq. 18-20).
      Responses of equal rank are in no order: each is compared with those ranked worse;
    - `all_pairs`: the DPO loss of each pair of different ranks, with weight 1 / C(k, 2) (InstructGPT, arXiv 2203.02155,
      eq. 1);
    - `rao_kupper`, `davidson`: the same over all pairs by models that give ties a probability, so that responses of
      equal rank say something, too: their scores should be equal (Chen et al. 2024, arXiv 2409.17431).

    With two responses of different ranks the first two are `DPOLoss`. The formulas stand in `fastpref.reference.lists`.

    The loss is the mean over prompts. One with nothing to compare does not count: a single response, or equal ranks
    only where the loss knows no ties. If none counts, the loss is a differentiable 0.

    Args:
        beta: strength of the implicit KL constraint, > 0.
        loss_type: one of the above.
        nu: how likely ties are: greater than 1 for `rao_kupper`, greater than 0 for `davidson`. By default 3 and 1, the
            paper's, with which equal scores tie half of the time.

    In each call `ranks` `[S]` are numbers, lower for better responses, equal for ties. `group` `[S]` says with integers
    which prompt a response answers, in any order. Or `sizes` are how many responses each prompt has, as a list, where
    these come one after the other; both together spare `from_hidden` a host sync. Batches are padded `[S, T]`, or
    packed `[N]` with `cu_seqlens` `[S + 1]`. Labels are shifted already.

    To make one or to call it raises `ValueError` or `TypeError` for a wrong shape, dtype, device or option, and where
    `ref_logps` or the groups are missing. The message names the argument.
    """

    def __init__(self, beta: float = 0.1, loss_type: str = "plackett_luce", nu: float | None = None) -> None:
        super().__init__()
        self.objective = list_objective(loss_type, beta, nu)
        self._encoded = encode(self.objective)

    def extra_repr(self) -> str:
        o = self.objective
        return f"beta={o.beta}, loss_type={o.loss!r}" + (f", nu={o.nu}" if o.loss in TIE_MODELS else "")

    def _batch(
        self, labels, cu_seqlens, ignore_index, ref_logps, ranks, group, sizes, sequences: int, like: Tensor
    ) -> _Batch:
        refs = checks.reference_logps("ref_logps", ref_logps, (sequences,), like).to(wide(like.dtype))
        check_ranks(ranks, sequences, "the policy's log-probs", like)
        return _Batch(labels, cu_seqlens, ignore_index, refs, ranks, _groups(group, sizes, sequences, like))

    def _loss(self, token_logps: Tensor, batch: _Batch) -> ListOutput:
        loss, metrics, _ = torch.ops.fastpref.list_loss(
            token_logps, batch.labels, batch.cu_seqlens, batch.ref_logps, batch.ranks, batch.groups.group,
            self._encoded, batch.ignore_index,
        )  # fmt: skip
        return ListOutput(loss, *metrics.unbind(0))

    def sequence_logps(
        self, token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Log-probs of sequences `[S]` as this loss sums them: what a reference model's `ref_logps` must be."""
        return sequence_logprobs(token_logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)

    def forward(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        ranks: Tensor,
        group: Tensor | None = None,
        sizes: Sequence[int] | None = None,
    ) -> ListOutput:
        """From summed log-probs of sequences `[S]`, and the reference's `[S]`."""
        checks.tensor("logps", logps, dtypes=checks.FLOATS, ndim=(1,))
        if logps.shape[0] == 0:
            raise ValueError("logps: got no responses, want at least 1")
        logps = widened(logps)
        batch = self._batch(None, None, -100, ref_logps, ranks, group, sizes, logps.shape[0], logps)
        return self._loss(logps, batch)

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        ranks: Tensor,
        ref_logps: Tensor | None = None,
        group: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        sizes: Sequence[int] | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> ListOutput:
        """From logits `[S, T, V]` and shifted labels `[S, T]`; or packed, `[N, V]` and `[N]` with `cu_seqlens`."""
        logps = token_logprobs(
            logits, labels, ignore_index=ignore_index, temperature=temperature, logit_scale=logit_scale, softcap=softcap
        )
        return self.from_tokens(
            TokenStatistics(logps), labels, ranks, ref_logps, group, cu_seqlens, sizes=sizes, ignore_index=ignore_index
        )

    def from_tokens(
        self,
        tokens: TokenStatistics,
        labels: Tensor,
        ranks: Tensor,
        ref_logps: Tensor | None = None,
        group: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        sizes: Sequence[int] | None = None,
        ignore_index: int = -100,
    ) -> ListOutput:
        """From what `linear_token_statistics` returns, so that one sweep also gives entropies and the like."""
        logps, sequences = tokens.logps, checks.num_sequences(labels, cu_seqlens)
        batch = self._batch(
            labels.reshape(-1), cu_seqlens, ignore_index, ref_logps, ranks, group, sizes, sequences, logps
        )
        return self._loss(logps.reshape(-1), batch)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ranks: Tensor,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        group: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        plan: str = "auto",
        *,
        sizes: Sequence[int] | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        workspace_bytes: int | None = None,
        scored_rows: ScoredRows = None,
    ) -> ListOutput:
        """From hidden states `[S, T, d]` (or `[N, d]` with `cu_seqlens`) and the head's weight `[V, d]`.

        No logits in memory: 3 matrix products over the scored rows with a trainable head, 2 with a frozen one, 1
        without gradients. `plan` and `workspace_bytes` are as in `linear_token_logprobs`. Plan `"pair"` is possible
        too: it finishes whole groups, so those of a prompt should stand together. `scored_rows` is as in
        `PairedLoss.from_hidden`, a list being `[S]`.
        """
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
        inputs = head_inputs(hidden, weight, labels, bias, options)
        sequences = checks.num_sequences(labels, cu_seqlens)
        batch = self._batch(
            inputs.labels, cu_seqlens, ignore_index, ref_logps, ranks, group, sizes, sequences, inputs.hidden
        )
        # a compiler cannot ask the device where the groups are
        in_groups = batch.groups.sizes is not None or not torch.compiler.is_compiling()
        choice = choose_plan(inputs, options, Layout(cu_seqlens, sequences) if in_groups else None)
        if choice.plan != "pair":
            logps = statistics_by(choice, inputs, options, labels.shape, ()).logps
            return self._loss(logps.reshape(-1), batch)
        loss, metrics, *_ = torch.ops.fastpref.linear_list_loss(
            *inputs.head, batch.ref_logps, ranks, batch.groups.group, batch.groups.bounds(), cu_seqlens,
            *operator_options(options), self._encoded, choice.workspace_bytes, *inputs.needs(), inputs.compute_weight,
            choice.known.edges,
        )  # fmt: skip
        return ListOutput(loss, *metrics.unbind(0))
