"""Policy-gradient losses on sampled completions: clipped PPO, GRPO, DAPO and Dr. GRPO.

The formula stands in `fastpref.reference.policy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref.common import checks
from fastpref.common.precision import widened
from fastpref.objectives.head_inputs import HeadOptions, ScoredRows, head_inputs, known_rows, operator_options
from fastpref.objectives.tokens import token_statistics
from fastpref.reference import PolicyObjective, policy_token_weights

# TRL's loss_type -> how token losses are averaged
REDUCTIONS = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "constant"}


class PolicyOutput(NamedTuple):
    """What a policy-gradient loss returns: `loss` is 0-d and differentiable, the rest is detached.

    All stays on the device, so there is no host sync. `entropy` (nats), `kl` (the k3 estimate, nats; 0 without
    `ref_logps`), `ratio` (to the sampling policy) and `clip_fraction` are 0-d means over the scored tokens.
    """

    loss: Tensor
    logps: Tensor  # shaped like the labels, 0 on ignored rows
    entropy: Tensor  # token means, 0-d
    kl: Tensor
    ratio: Tensor
    clip_fraction: Tensor


class PolicyGradientLoss(nn.Module):
    """`-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A) + beta * k3 - entropy_coef * H` of each token, averaged.

    r is the ratio of the policy's probability to the sampling policy's, A the advantage, H the entropy.

    Sources: PPO, Schulman et al. 2017, arXiv 1707.06347, eq. 7. GRPO, Shao et al. 2024, arXiv 2402.03300, eq. 3-4.
    DAPO, Yu et al. 2025, arXiv 2503.14476, eq. 8-10. Dr. GRPO, Liu et al. 2025, arXiv 2503.20783.

    Args:
        epsilon_low, epsilon_high: clip range of the ratio. DAPO decouples the two; by default they are equal.
        beta: weight of the k3 estimate of the KL to the reference, at least 0. Above 0 it needs `ref_logps`.
        entropy_coef: weight of the entropy bonus (exact, over the vocabulary), at least 0.
        loss_type: how token losses are averaged. `grpo`: the mean over sequences of their token means. `bnpo` and
            `dapo`: the mean over tokens; for DAPO over several ranks or micro-batches pass the global token count as
            `normalizer`. `dr_grpo`: the sum divided by a constant `normalizer`, which is sequences times the maximal
            completion length.

    Raises:
        ValueError, TypeError: an argument out of its range.
    """

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
        loss_type: str = "dapo",
    ) -> None:
        super().__init__()
        epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
        checks.within("epsilon_low", epsilon_low, 0.0, 1.0, closed=True)
        checks.within("epsilon_high", epsilon_high, 0.0, float("inf"))
        checks.within("beta", beta, 0.0, float("inf"))
        checks.within("entropy_coef", entropy_coef, 0.0, float("inf"))
        checks.choice("loss_type", loss_type, REDUCTIONS)
        self.objective = PolicyObjective(float(epsilon_low), float(epsilon_high), float(beta), float(entropy_coef))
        self.loss_type = loss_type

    def extra_repr(self) -> str:
        return f"loss_type={self.loss_type!r}, " + ", ".join(f"{k}={v}" for k, v in self.objective._asdict().items())

    def _tokens(self, labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index, dtype):
        """(old_logps, ref_logps, advantages, weights), each flat `[N]` in `dtype` or None."""
        sequences = checks.num_sequences(labels, cu_seqlens)
        checks.tensor("advantages", advantages, dtypes=checks.FLOATS)
        checks.same_device("advantages", advantages, "labels", labels)
        if advantages.shape == (sequences,) and advantages.shape != labels.shape:
            advantages = _per_token(advantages, labels, cu_seqlens)
        checks.shape("advantages", advantages, labels.shape, f"one per token, or [{sequences}], one per sequence")
        if self.objective.beta and ref_logps is None:
            raise ValueError(f"ref_logps: got None, want the reference's {list(labels.shape)} (beta > 0)")
        if self.loss_type == "dr_grpo" and normalizer is None:
            raise ValueError("normalizer: got None, want sequences * maximal completion length for loss_type 'dr_grpo'")
        for name, value in (("old_logps", old_logps), ("ref_logps", ref_logps)):
            if value is not None:
                checks.tensor(name, value, dtypes=checks.FLOATS)
                checks.shape(name, value, labels.shape, "one per token, like labels")
                checks.same_device(name, value, "labels", labels)
        reduction = REDUCTIONS[self.loss_type]
        weights = policy_token_weights(labels, cu_seqlens, reduction, ignore_index, normalizer, dtype)

        def flat(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.detach().reshape(-1).to(dtype)

        return flat(old_logps), flat(ref_logps if self.objective.beta else None), flat(advantages), flat(weights)

    def _output(self, loss, logps, entropy, metrics, labels, ignore_index) -> PolicyOutput:
        scored = (labels != ignore_index).reshape(-1)
        total = scored.sum().clamp(min=1)
        ratio, kl, clipped = ((m * scored).sum() / total for m in metrics)
        mean_entropy = (entropy.detach() * scored).sum() / total
        return PolicyOutput(loss, logps.detach().view(labels.shape), mean_entropy, kl, ratio, clipped)

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> PolicyOutput:
        """From logits `[S, T, V]` and shifted labels `[S, T]`; or packed, `[N, V]` and `[N]` with `cu_seqlens`.

        The other arguments are as in `from_hidden`.
        """
        tokens = token_statistics(
            logits, labels, ("entropy",), ignore_index=ignore_index, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap,
        )  # fmt: skip
        return self._from_tokens(
            tokens.logps, tokens.entropy, labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index
        )

    def _from_tokens(
        self, logps, entropy, labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index
    ) -> PolicyOutput:
        old, ref, advantages, weights = self._tokens(
            labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index, logps.dtype
        )
        logps, entropy = logps.reshape(-1), entropy.reshape(-1)
        bonus = entropy if self.objective.entropy_coef else None
        loss, metrics, _, _ = torch.ops.fastpref.policy_loss(
            logps, bonus, old, ref, advantages, weights, *self.objective
        )
        return self._output(loss, logps, entropy, metrics, labels, ignore_index)

    def from_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        workspace_bytes: int | None = None,
        scored_rows: ScoredRows = None,
    ) -> PolicyOutput:
        """From hidden states `[S, T, d]` (or `[N, d]` with `cu_seqlens`) and the head's weight `[V, d]`.

        Args:
            labels: sampled tokens, already shifted. Rows labelled `ignore_index` (prompt, padding) are not computed.
            advantages: `[S]`, or one for each token, shaped like labels.
            old_logps: the sampling policy's token log-probs, shaped like labels. None if that is this policy.
            ref_logps: the reference's token log-probs, shaped like labels; needed with `beta` > 0.
            bias: `[V]` or None.
            normalizer: see `loss_type`.
            workspace_bytes, scored_rows: as in `linear_token_logprobs`.

        No logits in memory, and one tile of workspace: a token's coefficients are known while its logits still exist.
        3 matrix products over the scored rows, 2 with a frozen head, 1 without gradients. An entropy bonus costs none.

        Raises:
            ValueError, TypeError: a wrong shape, dtype, device or option, or an argument that is missing.
        """
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, "auto", workspace_bytes, scored_rows)
        inputs = head_inputs(hidden, weight, labels, bias, options)
        old, ref, advantages, weights = self._tokens(
            labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index, inputs.result_dtype
        )
        loss, metrics, *_ = torch.ops.fastpref.linear_policy_loss(
            *inputs.head, old, ref, advantages, weights, *operator_options(options), *self.objective,
            workspace_bytes, *inputs.needs(), inputs.compute_weight,
            known_rows(inputs.labels, scored_rows, ignore_index).rows,
        )  # fmt: skip
        logps, entropy, *metrics = metrics.unbind(0)
        return self._output(loss, logps, entropy, metrics, labels, ignore_index)

    def forward(
        self,
        logps: Tensor,
        labels: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        entropy: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
        ignore_index: int = -100,
    ) -> PolicyOutput:
        """From token log-probs, shaped like labels `[S, T]`, or packed `[N]` with `cu_seqlens`.

        `entropy`, of the same shape, is needed where `entropy_coef` > 0. The other arguments are as in `from_hidden`.
        """
        checks.tensor("logps", logps, dtypes=checks.FLOATS)
        checks.tensor("labels", labels, dtypes=checks.INTEGERS)
        checks.shape("logps", logps, labels.shape, "one per token, like labels")
        if entropy is None and self.objective.entropy_coef:
            raise ValueError("entropy: got None, want the token entropies, like labels (entropy_coef > 0)")
        logps = widened(logps)
        entropy = torch.zeros_like(logps) if entropy is None else entropy.to(logps.dtype)
        checks.shape("entropy", entropy, labels.shape, "one per token, like labels")
        return self._from_tokens(
            logps, entropy, labels, advantages, old_logps, ref_logps, cu_seqlens, normalizer, ignore_index
        )


def _per_token(values: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return values[:, None].expand(labels.shape)
    return torch.repeat_interleave(values, cu_seqlens.diff().long(), output_size=labels.numel())
