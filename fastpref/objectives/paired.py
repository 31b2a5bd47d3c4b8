"""Losses on pairs of responses: DPO and its family, IPO, and what all paired losses share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref.common import checks
from fastpref.common.precision import widened
from fastpref.objectives.head_inputs import (
    HeadOptions,
    Layout,
    ScoredRows,
    choose_plan,
    head_inputs,
    operator_options,
)
from fastpref.objectives.tokens import sequence_logprobs, statistics_by, token_statistics
from fastpref.ops.common import encode
from fastpref.reference import (
    F_DIVERGENCES,
    LogitTransform,
    PairedObjective,
    TokenStatistics,
    pair_confidence,
    shared_length_weights,
)

DPO_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
WITH_DIVERGENCE = frozenset(("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"))
NEEDS_LENGTHS = frozenset(("ipo", "sigmoid_norm", "sft"))
NEEDS_SMOOTHING = frozenset(("exo_pair",))
# a sort has no pairs to weigh, and the sft term is one mean over the batch
UNWEIGHABLE = frozenset(("aot", "aot_unpaired", "sft"))


class PreferenceOutput(NamedTuple):
    """What a paired loss returns: `loss` is 0-d and differentiable, the rest is `[B]` and detached.

    All stays on the device, so there is no host sync. Everything is fp32, or fp64 for fp64 inputs.

    - `chosen_logps`, `rejected_logps`: the sequences' log-probs in nats, as the loss scores them (sums, or means).
    - `chosen_rewards`, `rejected_rewards`: `beta * (logp - ref_logp)`, without a reference `beta * logp`.
    - `margins`: chosen minus rejected rewards.
    - `accuracies`: 1 where the margin is above 0, else 0.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor


class PairedLoss(nn.Module):
    """A loss on pairs: what `DPOLoss`, `IPOLoss`, `SimPOLoss`, `CPOLoss` and `ORPOLoss` share.

    Batches are `[B chosen; B rejected]`: padded `[2B, T]`, or packed `[N]` with `cu_seqlens` `[2B + 1]`. Labels are
    shifted already: `labels[i]` is the token that row `i` scores. Results are fp32, or fp64 for fp64 inputs.

    To make one or to call it raises `ValueError` or `TypeError` for a wrong shape, dtype, device or option, for an odd
    batch, and where reference log-probs or lengths are missing. The message names the argument.
    """

    def __init__(
        self,
        objective: PairedObjective,
        *,
        with_reference: bool,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.with_reference = with_reference
        self.ld_alpha = ld_alpha
        self.use_weighting = use_weighting
        self._encoded = encode(objective)

    def extra_repr(self) -> str:
        defaults = PairedObjective()._asdict()
        changed = {k: v for k, v in self.objective._asdict().items() if v != defaults[k]}
        return ", ".join(f"{k}={v!r}" for k, v in ({"losses": self.objective.losses} | changed).items())

    def _checked_reference(self, name: str, value: Tensor | None, shape: tuple[int, ...], like: Tensor):
        if value is None and not self.with_reference:
            return None
        return checks.reference_logps(name, value, shape, like)

    def token_weights(self, labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100):
        """How much each token counts in its sequence's score `[N]` (see `ld_alpha`), or None where all count 1."""
        if self.ld_alpha is None:
            return None
        return shared_length_weights(labels, cu_seqlens, self.ld_alpha, ignore_index)

    def sequence_logps(
        self, token_logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, ignore_index: int = -100
    ) -> Tensor:
        """Log-probs of sequences `[2B]` as this loss sums them: what a reference model's `ref_logps` must be.

        `token_logps` and `labels` are `[2B, T]`, or packed `[N]` with `cu_seqlens`.
        """
        weights = self.token_weights(labels, cu_seqlens, ignore_index)
        if weights is not None:
            token_logps = token_logps * weights.view(token_logps.shape)
        return sequence_logprobs(token_logps, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index)

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> PreferenceOutput:
        """From log-probs of sequences `[B]`, summed as `sequence_logps` does.

        Lengths `[B]` are numbers of scored tokens. They are needed by `ipo`, `sigmoid_norm`, `sft` and losses on mean
        log-probs.
        """
        checks.tensor("chosen_logps", chosen_logps, dtypes=checks.FLOATS, ndim=(1,))
        checks.tensor("rejected_logps", rejected_logps, dtypes=checks.FLOATS)
        pairs = chosen_logps.shape[0]
        if pairs == 0:
            raise ValueError("chosen_logps: got no pairs, want at least 1")
        checks.shape("rejected_logps", rejected_logps, (pairs,), "as many as chosen_logps")
        checks.same_device("rejected_logps", rejected_logps, "chosen_logps", chosen_logps)
        ref_chosen = self._checked_reference("ref_chosen_logps", ref_chosen_logps, (pairs,), chosen_logps)
        ref_rejected = self._checked_reference("ref_rejected_logps", ref_rejected_logps, (pairs,), chosen_logps)
        if (ref_chosen is None) != (ref_rejected is None):
            raise ValueError("ref_chosen_logps, ref_rejected_logps: got one of them, want both or neither")
        token_logps = widened(torch.cat([chosen_logps, rejected_logps]))
        ref_logps = None
        if ref_chosen is not None and ref_rejected is not None:
            ref_logps = torch.cat([ref_chosen, ref_rejected]).to(token_logps.dtype)
        lengths = self._lengths(chosen_lengths, rejected_lengths, token_logps)
        if self.use_weighting:
            raise ValueError("use_weighting: got sequence log-probs, want tokens: call from_logits or from_hidden")
        return self._paired_op(token_logps, None, None, ref_logps, lengths, None, pairs, -100)

    def _lengths(self, chosen: Tensor | None, rejected: Tensor | None, token_logps: Tensor) -> Tensor | None:
        users = sorted(NEEDS_LENGTHS & set(self.objective.losses)) + ["mean log-probs"] * self.objective.average
        if not users:
            return None
        lengths = []
        for name, value in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
            if value is None:
                raise ValueError(f"{name}: got None, want the number of scored tokens [B] (for {', '.join(users)})")
            checks.tensor(name, value, dtypes=(*checks.INTEGERS, *checks.FLOATS))
            checks.shape(name, value, (token_logps.shape[0] // 2,), "one per pair")
            checks.same_device(name, value, "chosen_logps", token_logps)
            lengths.append(value.to(token_logps.dtype))
        return torch.cat(lengths)

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        nll_tokens: Tensor | None = None,
    ) -> PreferenceOutput:
        """From logits `[2B, T, V]` and shifted labels `[2B, T]`; or packed, `[N, V]` and `[N]` with `cu_seqlens`.

        `ref_logps` `[2B]` are the reference's, as `sequence_logps` sums them. `nll_tokens` is as in `from_hidden`.
        """
        pairs = checks.num_pairs(labels, cu_seqlens)
        tokens = self._token_statistics(logits, labels, ignore_index, LogitTransform(temperature, logit_scale, softcap))
        return self._from_tokens(tokens, labels, ref_logps, cu_seqlens, pairs, ignore_index, nll_tokens=nll_tokens)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the loss needs of each token beside its log-prob: names of `linear_token_statistics`."""
        return ("log_sum_sq",) if self.use_weighting else ()

    def from_tokens(
        self,
        tokens: TokenStatistics,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        ignore_index: int = -100,
        nll_tokens: Tensor | None = None,
    ) -> PreferenceOutput:
        """From what `linear_token_statistics` returns, with at least the `statistics` that this loss needs.

        So one sweep also gives entropies and the like. The other arguments are as in `from_logits`.
        """
        missing = [name for name in self.statistics if getattr(tokens, name) is None]
        if missing:
            raise ValueError(f"tokens: got no {', '.join(missing)}, want statistics={self.statistics} (use_weighting)")
        pairs = checks.num_pairs(labels, cu_seqlens)
        return self._from_tokens(tokens, labels, ref_logps, cu_seqlens, pairs, ignore_index, nll_tokens=nll_tokens)

    def _token_statistics(self, logits: Tensor, labels: Tensor, ignore_index: int, transform: LogitTransform):
        return token_statistics(logits, labels, self.statistics, ignore_index=ignore_index, **transform._asdict())

    def _from_tokens(
        self, tokens: TokenStatistics, labels, ref_logps, cu_seqlens, pairs: int, ignore_index,
        lengths: Tensor | None = None, weights: Tensor | None = None, nll_tokens: Tensor | None = None,
    ) -> PreferenceOutput:  # fmt: skip
        ref_logps = self._checked_reference("ref_logps", ref_logps, (2 * pairs,), labels)
        if weights is None:
            weights = self.token_weights(labels, cu_seqlens, ignore_index)
        pair_weights = None
        if self.use_weighting:
            assert tokens.log_sum_sq is not None
            values = (tokens.logps.detach(), tokens.log_sum_sq, torch.ones_like(tokens.logps))
            layout = {"cu_seqlens": cu_seqlens, "ignore_index": ignore_index}
            pair_weights = pair_confidence(*(sequence_logprobs(v, labels, **layout) for v in values))
        dtype = tokens.logps.dtype
        return self._paired_op(
            tokens.logps.reshape(-1), labels.reshape(-1), cu_seqlens, _as(ref_logps, dtype), _as(lengths, dtype),
            pair_weights, pairs, ignore_index, _as(weights, dtype), _as(nll_tokens, dtype),
        )  # fmt: skip

    def _paired_op(
        self, token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights, pairs: int, ignore_index, weights=None,
        nll_tokens: Tensor | None = None,
    ) -> PreferenceOutput:  # fmt: skip
        loss, metrics, _ = torch.ops.fastpref.paired_loss(
            token_logps, labels, cu_seqlens, ref_logps, lengths, pair_weights, self._encoded, pairs, ignore_index,
            weights, nll_tokens,
        )  # fmt: skip
        return PreferenceOutput(loss, *metrics.unbind(0))

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        plan: str = "auto",
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        workspace_bytes: int | None = None,
        nll_tokens: Tensor | None = None,
        scored_rows: ScoredRows = None,
    ) -> PreferenceOutput:
        """From hidden states `[2B, T, d]` (or `[N, d]` with `cu_seqlens`) and the head's weight `[V, d]`.

        No logits in memory: 3 matrix products over the scored rows with a trainable head, 2 with a frozen one, 1
        without gradients.

        Args:
            labels: `[2B, T]` or `[N]`, shifted. Rows labelled `ignore_index` never enter a product.
            bias: `[V]` or None.
            ref_logps: `[2B]`, the reference's log-probs as `sequence_logps` sums them.
            plan, workspace_bytes: as in `linear_token_logprobs`; and plan `"pair"`, which finishes whole pairs.
            nll_tokens: 0-d, what an NLL term is divided by in place of this batch's own chosen tokens. It is for a part
                of a batch.
            scored_rows: how many labels are not `ignore_index`, if the host knows. Either at most how many in all, as
                in `linear_token_logprobs`; or a list `[2B]` of exactly how many in each sequence. With the list no
                plan waits for an accelerator, which trusts it.
        """
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
        return self._from_hidden(hidden, weight, labels, bias, ref_logps, cu_seqlens, options, nll_tokens=nll_tokens)

    def _from_hidden(
        self, hidden, weight, labels, bias, ref_logps, cu_seqlens, options: HeadOptions,
        lengths: Tensor | None = None, weights: Tensor | None = None, nll_tokens: Tensor | None = None,
    ) -> PreferenceOutput:  # fmt: skip
        inputs, ignore_index = head_inputs(hidden, weight, labels, bias, options), options.ignore_index
        pairs = checks.num_pairs(labels, cu_seqlens)
        ref_logps = self._checked_reference("ref_logps", ref_logps, (2 * pairs,), hidden)
        choice = choose_plan(inputs, options, Layout(cu_seqlens, 2 * pairs))
        if choice.plan != "pair":
            tokens = statistics_by(choice, inputs, options, labels.shape, self.statistics)
            return self._from_tokens(
                tokens, labels, ref_logps, cu_seqlens, pairs, ignore_index, lengths, weights, nll_tokens
            )
        if weights is None:
            weights = self.token_weights(labels, cu_seqlens, ignore_index)
        dtype = inputs.result_dtype
        loss, metrics, *_ = torch.ops.fastpref.linear_paired_loss(
            *inputs.head, _as(ref_logps, dtype), cu_seqlens, *operator_options(options), self._encoded, pairs,
            choice.workspace_bytes, *inputs.needs(), _as(lengths, dtype), _as(weights, dtype), self.use_weighting,
            _as(nll_tokens, dtype), inputs.compute_weight, choice.known.edges,
        )  # fmt: skip
        return PreferenceOutput(loss, *metrics.unbind(0))


def _as(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


class DPOLoss(PairedLoss):
    """Direct preference optimisation and its family (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    `-log sigmoid(beta * ((logp_w - ref_w) - (logp_l - ref_l)))` for `loss_type` `"sigmoid"`. The other formulas and
    their sources are in `fastpref.reference.paired`.

    Args:
        beta: strength of the implicit KL constraint, > 0.
        loss_type: one of the 15 of TRL 1.16, or several for a mixture (MPO, RPO: `["sigmoid", "sft"]`).
        label_smoothing: probability in [0, 0.5) that a pair's labels are flipped. Acts on `sigmoid` (cDPO,
            unlike TRL 1.16), `robust`, `exo_pair` (where it must be > 0) and the two `aot`.
        f_divergence: `reverse_kl`, `forward_kl`, `js_divergence` or `alpha_divergence` (arXiv 2309.16240).
        f_alpha_divergence_coef: alpha of the alpha-divergence.
        loss_weights: one per loss type, default 1.0 each, not normalised.
        discopop_tau: temperature of `discopop`.
        ld_alpha: LD-DPO's weight in [0, 1] of the tokens beyond the shorter response's length (arXiv 2409.06411).
            `ref_logps` must be weighted alike: compute them with `sequence_logps`.
        use_weighting: weigh each pair by the policy's confidence in it (WPO, arXiv 2406.11827).

    `ipo`, `sigmoid_norm` and `sft` need the sequences' lengths. `from_logits` and `from_hidden` count the labels.
    """

    def __init__(
        self,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        f_divergence: str = "reverse_kl",
        *,
        f_alpha_divergence_coef: float = 0.5,
        loss_weights: Sequence[float] | None = None,
        discopop_tau: float = 0.05,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        losses = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        for name in losses:
            checks.choice("loss_type", name, DPO_LOSS_TYPES)
        if not losses or len(set(losses)) != len(losses):
            raise ValueError(f"loss_type: got {list(losses)}, want at least one and none twice")
        weights = (1.0,) * len(losses) if loss_weights is None else tuple(float(w) for w in loss_weights)
        if len(weights) != len(losses):
            raise ValueError(f"loss_weights: got {len(weights)}, want one for each of {len(losses)} loss types")
        checks.positive("beta", beta)
        checks.positive("discopop_tau", discopop_tau)
        checks.within("label_smoothing", label_smoothing, 0.0, 0.5)
        if NEEDS_SMOOTHING & set(losses) and label_smoothing == 0:
            raise ValueError("label_smoothing: got 0.0, want a value in (0, 0.5) for loss_type 'exo_pair'")
        checks.choice("f_divergence", f_divergence, F_DIVERGENCES)
        if f_divergence != "reverse_kl" and not set(losses) <= WITH_DIVERGENCE:
            raise ValueError(
                f"f_divergence: got {f_divergence!r} with loss_type {list(losses)}, want 'reverse_kl' or only "
                f"loss types among {', '.join(sorted(WITH_DIVERGENCE))}"
            )
        objective = PairedObjective(
            losses=losses,
            weights=weights,
            beta=float(beta),
            label_smoothing=float(label_smoothing),
            f_divergence=f_divergence,
            alpha=float(f_alpha_divergence_coef),
            tau=float(discopop_tau),
        )
        if ld_alpha is not None:
            checks.within("ld_alpha", ld_alpha, 0.0, 1.0, closed=True)
        unweighable = sorted(set(losses) & UNWEIGHABLE)
        if use_weighting and unweighable:
            raise ValueError(f"use_weighting: got True with loss_type {', '.join(unweighable)}, want it on others only")
        super().__init__(objective, with_reference=True, ld_alpha=ld_alpha, use_weighting=use_weighting)


class IPOLoss(PairedLoss):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036v2, eq. 17): `(m - 1 / (2 beta))^2`.

    `m` is the difference of the two log-ratios `logp - ref_logp`.

    Args:
        beta: strength of the KL regularisation, > 0.
        length_normalize: divide each log-ratio by its number of tokens first. TRL does so, and the authors say that
            they ran it so.
    """

    def __init__(self, beta: float = 0.1, length_normalize: bool = False) -> None:
        checks.positive("beta", beta)
        loss = "ipo" if length_normalize else "ipo_sum"
        super().__init__(PairedObjective(losses=(loss,), beta=float(beta)), with_reference=True)
