"""Losses on pairs that need no reference model: SimPO, CPO, ORPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.common import checks
from fastpref.common.segments import segment_sums
from fastpref.objectives.head_inputs import HeadOptions, ScoredRows
from fastpref.objectives.paired import PairedLoss, PreferenceOutput
from fastpref.reference import LogitTransform, PairedObjective, TokenStatistics

CPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "simpo")
INFINITY = float("inf")


class SimPOLoss(PairedLoss):
    """`-log sigmoid(beta (mean_w - mean_l) - gamma)` (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    `mean_w` and `mean_l` are the mean log-probs of the chosen and the rejected response's tokens.

    Args:
        beta: scale of the mean log-probs, > 0.
        gamma: target reward margin, at least 0. TRL's `simpo_gamma` enters unchanged.
        label_smoothing: probability in [0, 0.5) that a pair's labels are flipped.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> None:
        checks.positive("beta", beta)
        checks.within("gamma", gamma, 0.0, INFINITY)
        checks.within("label_smoothing", label_smoothing, 0.0, 0.5)
        objective = PairedObjective(
            beta=float(beta), gamma=float(gamma), label_smoothing=float(label_smoothing), average=True
        )
        super().__init__(objective, with_reference=False)


class CPOLoss(PairedLoss):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417): a loss on log-probs + alpha * NLL.

    Args:
        beta: scale, > 0.
        alpha: weight of the chosen completions' NLL (token mean); TRL's `cpo_alpha`.
        loss_type: `sigmoid`, `hinge` (on sums), `ipo` or `simpo` (on means), as in TRL 1.16.
        label_smoothing: probability in [0, 0.5) of flipped labels, for `sigmoid` and `simpo`.
        gamma: target margin of `simpo`.
        alphapo_alpha: AlphaPO's reward shape (arXiv 2501.03884), `(1 - p^-alpha) / alpha`; 0 is log p.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 1.0,
        loss_type: str = "sigmoid",
        *,
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
        alphapo_alpha: float = 0.0,
    ) -> None:
        checks.choice("loss_type", loss_type, CPO_LOSS_TYPES)
        checks.positive("beta", beta)
        checks.within("alpha", alpha, 0.0, INFINITY)
        checks.within("label_smoothing", label_smoothing, 0.0, 0.5)
        checks.within("gamma", gamma, 0.0, INFINITY)
        checks.within("alphapo_alpha", alphapo_alpha, -INFINITY, INFINITY)
        loss = {"simpo": "sigmoid", "ipo": "ipo_sum"}.get(loss_type, loss_type)
        shape: dict[str, Any] = {}
        if alphapo_alpha:  # AlphaPO's reward is the f' of an alpha-divergence: (e^{-a x} - 1) / -a
            shape = {"f_divergence": "alpha_divergence", "alpha": 1.0 - float(alphapo_alpha)}
        objective = PairedObjective(
            losses=(loss, "sft") if alpha else (loss,),
            weights=(1.0, float(alpha)) if alpha else (1.0,),
            beta=float(beta),
            gamma=float(gamma) if loss_type == "simpo" else 0.0,
            label_smoothing=float(label_smoothing),
            average=loss_type in ("ipo", "simpo"),
            **shape,
        )
        super().__init__(objective, with_reference=False)


class ORPOLoss(PairedLoss):
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, eq. 6): NLL + beta * L_OR.

    L_OR compares the odds of the length-normalised likelihoods. It stays finite as a probability goes to 1.

    The NLL is the token mean over the chosen completions. If `from_hidden`, `from_logits` or `from_tokens` is given
    `prompt_labels`, it is over the chosen prompts and completions, as in the paper's code and TRL.

    Args:
        beta: weight of the odds-ratio term (lambda in the paper), > 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        checks.positive("beta", beta)
        objective = PairedObjective(
            losses=("odds_ratio", "sft"), weights=(float(beta), 1.0), beta=float(beta), average=True
        )
        super().__init__(objective, with_reference=False)

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
        prompt_labels: Tensor | None = None,
    ) -> PreferenceOutput:
        """As `PairedLoss.from_logits`. `prompt_labels`, shaped like labels, add the chosen prompts to the NLL."""
        pairs = checks.num_pairs(labels, cu_seqlens)
        labels, lengths, weights = _with_prompts(labels, prompt_labels, cu_seqlens, pairs, ignore_index)
        tokens = self._token_statistics(logits, labels, ignore_index, LogitTransform(temperature, logit_scale, softcap))
        return self._from_tokens(
            tokens, labels, ref_logps, cu_seqlens, pairs, ignore_index, lengths, weights, nll_tokens
        )

    def from_tokens(
        self,
        tokens: TokenStatistics,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        ignore_index: int = -100,
        nll_tokens: Tensor | None = None,
        prompt_labels: Tensor | None = None,
    ) -> PreferenceOutput:
        """As `PairedLoss.from_tokens`. `prompt_labels`, shaped like labels, add the chosen prompts to the NLL.

        The prompts' tokens are then among those that the `tokens` are of.
        """
        pairs = checks.num_pairs(labels, cu_seqlens)
        labels, lengths, weights = _with_prompts(labels, prompt_labels, cu_seqlens, pairs, ignore_index)
        return self._from_tokens(
            tokens, labels, ref_logps, cu_seqlens, pairs, ignore_index, lengths, weights, nll_tokens
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
        nll_tokens: Tensor | None = None,
        prompt_labels: Tensor | None = None,
        scored_rows: ScoredRows = None,
    ) -> PreferenceOutput:
        """As `PairedLoss.from_hidden`. `prompt_labels`, shaped like labels, add the chosen prompts to the NLL.

        The prompts then belong to what `scored_rows` counts.
        """
        pairs = checks.num_pairs(labels, cu_seqlens)
        labels, lengths, weights = _with_prompts(labels, prompt_labels, cu_seqlens, pairs, ignore_index)
        options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
        return self._from_hidden(
            hidden, weight, labels, bias, ref_logps, cu_seqlens, options, lengths, weights, nll_tokens
        )


def _with_prompts(
    labels: Tensor, prompt_labels: Tensor | None, cu_seqlens: Tensor | None, pairs: int, ignore_index: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(labels with the chosen prompts scored too, lengths of completions `[2B]`, token weights `[N]`, 0 on prompts)."""
    if prompt_labels is None:
        return labels, None, None
    checks.tensor("prompt_labels", prompt_labels, dtypes=checks.INTEGERS)
    checks.shape("prompt_labels", prompt_labels, labels.shape, "the shape of labels")
    checks.same_device("prompt_labels", prompt_labels, "labels", labels)
    completion = labels != ignore_index
    weights = completion.reshape(-1).float()
    if cu_seqlens is None:
        chosen = (torch.arange(2 * pairs, device=labels.device) < pairs)[:, None]
        lengths = completion.sum(1)
    else:
        chosen = torch.arange(labels.numel(), device=labels.device) < cu_seqlens[pairs]
        lengths = segment_sums(weights, cu_seqlens.diff().long())
    merged = torch.where(completion | ~chosen, labels, prompt_labels.to(labels.dtype))
    return merged, lengths, weights
