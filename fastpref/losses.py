"""Preference objectives as modules, callable on log-probs, logits or hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref import checks
from fastpref.linear import as_floats, choose_plan, head_inputs, linear_token_logprobs, token_logprobs
from fastpref.ops.paired import encode
from fastpref.reference import F_DIVERGENCES, LogitTransform, PairedObjective

DPO_LOSS_TYPES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
WITH_DIVERGENCE = frozenset(("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"))
NEEDS_LENGTHS = frozenset(("ipo", "sigmoid_norm", "sft"))
NEEDS_SMOOTHING = frozenset(("exo_pair",))


class PreferenceOutput(NamedTuple):
    """`loss` is 0-d and differentiable; the rest is detached, `[B]`, on the device (no host sync)."""

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    accuracies: Tensor


class PairedLoss(nn.Module):
    """A loss on pairs. Batches are `[B chosen; B rejected]`: padded `[2B, T]`, or packed `[N]` with `cu_seqlens`.

    Subclasses fill in `objective`; everything else is common. Results are fp32, or fp64 for fp64 inputs.
    """

    def __init__(self, objective: PairedObjective, *, with_reference: bool) -> None:
        super().__init__()
        self.objective = objective
        self.with_reference = with_reference
        self._encoded = encode(objective)

    def extra_repr(self) -> str:
        defaults = PairedObjective()._asdict()
        changed = {k: v for k, v in self.objective._asdict().items() if v != defaults[k]}
        return ", ".join(f"{k}={v!r}" for k, v in ({"losses": self.objective.losses} | changed).items())

    def _checked_reference(self, name: str, value: Tensor | None, shape: tuple[int, ...], like: Tensor):
        if value is None:
            if self.with_reference:
                raise ValueError(f"{name}: got None, want the reference model's log-probs {list(shape)}")
            return None
        checks.tensor(name, value, dtypes=checks.FLOATS)
        checks.shape(name, value, shape, "one per sequence")
        checks.same_device(name, value, "the policy's log-probs", like)
        return value.detach()

    def _loss(self, token_logps, labels, cu_seqlens, ref_logps, lengths, num_pairs, ignore_index) -> PreferenceOutput:
        loss, metrics, _ = torch.ops.fastpref.paired_loss(
            token_logps, labels, cu_seqlens, ref_logps, lengths, None, self._encoded, num_pairs, ignore_index
        )
        return PreferenceOutput(loss, *metrics.unbind(0))

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
    ) -> PreferenceOutput:
        """From summed sequence log-probs, each `[B]`; lengths (scored tokens) only for losses that use them."""
        checks.tensor("chosen_logps", chosen_logps, dtypes=checks.FLOATS, ndim=(1,))
        checks.tensor("rejected_logps", rejected_logps, dtypes=checks.FLOATS)
        pairs = chosen_logps.shape[0]
        if pairs == 0:
            raise ValueError("chosen_logps: got no pairs, want at least 1")
        checks.shape("rejected_logps", rejected_logps, (pairs,), "as many as chosen_logps")
        checks.same_device("rejected_logps", rejected_logps, "chosen_logps", chosen_logps)
        refs = [
            self._checked_reference("ref_chosen_logps", ref_chosen_logps, (pairs,), chosen_logps),
            self._checked_reference("ref_rejected_logps", ref_rejected_logps, (pairs,), chosen_logps),
        ]
        if (refs[0] is None) != (refs[1] is None):
            raise ValueError("ref_chosen_logps, ref_rejected_logps: got one of them, want both or neither")
        token_logps = _wide(torch.cat([chosen_logps, rejected_logps]))
        ref_logps = None if refs[0] is None else torch.cat(refs).to(token_logps.dtype)
        lengths = self._lengths(chosen_lengths, rejected_lengths, token_logps)
        return self._loss(token_logps, None, None, ref_logps, lengths, pairs, -100)

    def _lengths(self, chosen: Tensor | None, rejected: Tensor | None, token_logps: Tensor) -> Tensor | None:
        users = sorted(NEEDS_LENGTHS & set(self.objective.losses)) + ["mean log-probs"] * self.objective.average
        if not users:
            return None
        for name, value in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
            if value is None:
                raise ValueError(f"{name}: got None, want the number of scored tokens [B] (for {', '.join(users)})")
            checks.tensor(name, value, dtypes=(*checks.INTEGERS, *checks.FLOATS))
            checks.shape(name, value, (token_logps.shape[0] // 2,), "one per pair")
            checks.same_device(name, value, "chosen_logps", token_logps)
        return torch.cat([chosen, rejected]).to(token_logps.dtype)

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
    ) -> PreferenceOutput:
        """From logits `[2B, T, V]` (or `[N, V]` with `cu_seqlens`) and shifted labels; `ref_logps` `[2B]` summed."""
        logps = token_logprobs(
            logits, labels, ignore_index=ignore_index, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap,
        )  # fmt: skip
        return self._from_token_logps(logps, labels, ref_logps, cu_seqlens, ignore_index)

    def _from_token_logps(self, logps, labels, ref_logps, cu_seqlens, ignore_index) -> PreferenceOutput:
        pairs = checks.num_pairs(labels, cu_seqlens)
        ref_logps = self._checked_reference("ref_logps", ref_logps, (2 * pairs,), logps)
        return self._loss(
            logps.reshape(-1), labels.reshape(-1), cu_seqlens, _as(ref_logps, logps.dtype), None, pairs, ignore_index
        )

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
    ) -> PreferenceOutput:
        """From hidden states `[2B, T, d]` (or `[N, d]` with `cu_seqlens`) and the head's weight `[V, d]`.

        No logits in memory: 3 matrix products over the scored rows with a trainable head, 2 with a frozen one,
        1 without gradients. `plan` and `workspace_bytes` as in `linear_token_logprobs`, and `"pair"`.
        """
        transform = LogitTransform(temperature, logit_scale, softcap)
        inputs = head_inputs(hidden, weight, labels, bias, transform)
        pairs = checks.num_pairs(labels, cu_seqlens)
        ref_logps = self._checked_reference("ref_logps", ref_logps, (2 * pairs,), hidden)
        chosen = choose_plan(inputs, plan, workspace_bytes, paired=True, ignore_index=ignore_index).plan
        if chosen != "pair":
            logps = linear_token_logprobs(
                hidden, weight, labels, bias, ignore_index=ignore_index, plan=chosen,
                workspace_bytes=workspace_bytes, **transform._asdict(),
            )  # fmt: skip
            return self._from_token_logps(logps, labels, ref_logps, cu_seqlens, ignore_index)
        dtype = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
        loss, metrics, *_ = torch.ops.fastpref.linear_paired_loss(
            *inputs, _as(ref_logps, dtype), cu_seqlens, ignore_index, *as_floats(transform), self._encoded, pairs,
            workspace_bytes, *inputs.needs(),
        )  # fmt: skip
        return PreferenceOutput(loss, *metrics.unbind(0))


def _as(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


class DPOLoss(PairedLoss):
    """Direct preference optimisation and its family (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Args:
        beta: strength of the implicit KL constraint, > 0.
        loss_type: one of the 15 of TRL 1.16, or several for a mixture (MPO, RPO: `["sigmoid", "sft"]`).
        label_smoothing: probability in [0, 0.5) that a pair's labels are flipped. Acts on `sigmoid` (cDPO,
            unlike TRL 1.16), `robust`, `exo_pair` (where it must be > 0) and the two `aot`.
        f_divergence: `reverse_kl`, `forward_kl`, `js_divergence` or `alpha_divergence` (arXiv 2309.16240).
        f_alpha_divergence_coef: alpha of the last.
        loss_weights: one per loss type, default 1.0 each, not normalised.
        discopop_tau: temperature of `discopop`.

    `ipo`, `sigmoid_norm` and `sft` need sequence lengths: `from_logits` and `from_hidden` count the labels.
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
        super().__init__(objective, with_reference=True)
