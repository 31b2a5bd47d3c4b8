"""Token and sequence log-probs, and the statistics of a row of logits."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LogitTransform(NamedTuple):
    """What happens to logits between the head and the softmax, in the order that models and TRL apply it.

    `softcap * tanh(raw * logit_scale / softcap) / temperature`; without the cap if `softcap` is None.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        logits = raw * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)  # Gemma 2, arXiv 2408.00118 section 2
        return logits / self.temperature


class TokenStatistics(NamedTuple):
    """Results of each token, all shaped like the labels.

    They are 0 (or False) on ignored rows, and None where not asked for.

    - `logps`: natural log-probability of the label.
    - `entropy`: of the row's distribution, in nats.
    - `mean_logit`: mean of the row's logits over the vocabulary.
    - `is_top1`: is the label the most probable token? The first index wins a tie.
    - `log_sum_sq`: log sum_v p_v^2, by which WPO (arXiv 2406.11827) aligns its weights.
    """

    logps: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq: Tensor | None = None


STATISTICS = TokenStatistics._fields[1:]


def token_logprobs(
    logits: Tensor, labels: Tensor, *, ignore_index=-100, temperature=1.0, logit_scale=1.0, softcap=None
) -> Tensor:
    """`log softmax(transform(logits))[label]` of each row: logits `[..., V]`, labels `[...]` -> `[...]`, in nats."""
    logps = LogitTransform(temperature, logit_scale, softcap)(logits).log_softmax(-1)
    valid = labels != ignore_index
    picked = logps.gather(-1, labels.masked_fill(~valid, 0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(~valid, 0)


def linear_token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, bias=None, **options) -> Tensor:
    """`token_logprobs` from hidden states `[..., d]` and the head's weight `[V, d]`."""
    return token_logprobs(F.linear(hidden, weight, bias), labels, **options)


def token_statistics(
    logits: Tensor, labels: Tensor, *, ignore_index=-100, temperature=1.0, logit_scale=1.0, softcap=None
) -> TokenStatistics:
    """Log-probs and the statistics that trainers log or weigh by: logits `[..., V]`, labels `[...]`.

    All are of the transformed logits.
    """
    options = {"temperature": temperature, "logit_scale": logit_scale, "softcap": softcap}
    z = LogitTransform(**options)(logits)
    logp = z.log_softmax(-1)
    p = logp.exp()
    ignored = labels == ignore_index
    return TokenStatistics(
        logps=token_logprobs(logits, labels, ignore_index=ignore_index, **options),
        # 0 log 0 = 0, in the gradient too: a where around the product would pass 0 * inf back
        entropy=-(p * logp.masked_fill(p == 0, 0)).sum(-1).masked_fill(ignored, 0),
        mean_logit=z.mean(-1).masked_fill(ignored, 0),
        is_top1=(z.argmax(-1) == labels) & ~ignored,  # the first index wins a tie, as in TRL
        log_sum_sq=torch.logsumexp(2 * logp, -1).masked_fill(ignored, 0),  # log sum_v p_v^2, WPO arXiv 2406.11827
    )


def sequence_bounds(labels: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """`(start, end)` of every sequence in the flattened rows of labels, padded `[S, T]` or packed `[N]`."""
    if cu_seqlens is None:
        rows, length = labels.shape
        return [(s * length, (s + 1) * length) for s in range(rows)]
    edges = cu_seqlens.tolist()
    return list(itertools.pairwise(edges))


def sequence_logprobs(
    token_logps: Tensor, labels: Tensor, *, cu_seqlens=None, ignore_index=-100, average=False
) -> Tensor:
    """Sum of each sequence's log-probs, or with `average` their mean: padded `[S, T]` or packed `[N]` -> `[S]`."""
    flat, valid = token_logps.reshape(-1), (labels != ignore_index).reshape(-1)
    bounds = sequence_bounds(labels, cu_seqlens)
    sums = torch.stack([flat[a:b][valid[a:b]].sum() for a, b in bounds])
    if not average:
        return sums
    return sums / torch.stack([valid[a:b].sum() for a, b in bounds]).clamp(min=1)
