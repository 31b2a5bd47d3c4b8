"""Process reward models: the loss on the steps of a solution, and a solution's score from those of its steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpref import ops, reference
from fastpref.common import checks
from fastpref.objectives.tokens import token_logprobs

AGGREGATIONS = ("min", "product", "last")


class ProcessRewardOutput(NamedTuple):
    """What `ProcessRewardLoss` returns: `loss` is 0-d and differentiable, the rest is detached.

    All stays on the device, so there is no host sync. `step_losses` and `accuracies` are shaped like the labels, and 0
    where there is no labelled step. `num_steps` (0-d) is how many labelled steps there are.
    """

    loss: Tensor
    step_losses: Tensor
    accuracies: Tensor
    num_steps: Tensor


class ProcessRewardLoss(nn.Module):
    """Cross-entropy of the labels of reasoning steps, the mean over labelled steps.

    There are two forms, told apart by the shapes:

    - Scores `[*]` and labels `[*]`: binary cross-entropy of sigmoid(score). Labels are 0 or 1, or the probability that
      the step is right. Source: Math-Shepherd, arXiv 2312.08935, eq. 2 with labels by eq. 3 or 4.
    - Logits `[*, C]` and integer labels `[*]`: cross-entropy over C classes. TRL's PRMTrainer has C = 2. Let's Verify
      Step by Step, arXiv 2305.20050, has 3.

    Results are fp32, or fp64 if an input is. Without a labelled step the loss is a differentiable 0.
    """

    def forward(
        self, step_logits: Tensor, step_labels: Tensor, mask: Tensor | None = None, ignore_index: int = -100
    ) -> ProcessRewardOutput:
        """From scores `[*]` or logits `[*, C]` of steps, and their labels `[*]`.

        Steps whose label is `ignore_index` do not count, nor those where `mask` `[*]` (bool, or 0 and 1) is 0.

        Raises:
            ValueError, TypeError: shapes that do not go together, a wrong dtype or device, or (on a CPU, or with
                `FASTPREF_DEBUG=1`) a label out of range.
        """
        checks.tensor("step_logits", step_logits, dtypes=checks.FLOATS)
        checks.tensor("step_labels", step_labels, dtypes=(*checks.INTEGERS, *checks.FLOATS, torch.bool))
        checks.same_device("step_labels", step_labels, "step_logits", step_logits)
        scored = _labelled(step_labels, mask, ignore_index)
        if step_logits.shape == step_labels.shape:
            losses, right = _binary(step_logits, step_labels, scored)
        elif step_logits.ndim and step_logits.shape[:-1] == step_labels.shape:
            if step_labels.is_floating_point():
                raise TypeError(
                    f"step_labels: got dtype {str(step_labels.dtype).removeprefix('torch.')} for classes, want "
                    "integers; probabilities go with one score per step"
                )
            losses, right = _classes(step_logits, step_labels, scored)
        else:
            raise ValueError(
                f"step_logits: got shape {tuple(step_logits.shape)} for labels {tuple(step_labels.shape)}, want "
                "[*, C] logits or [*] scores"
            )
        steps = scored.sum()
        loss = losses.sum() / steps.clamp(min=1)
        return ProcessRewardOutput(loss, losses.detach(), (right & scored).to(losses.dtype), steps)

    def from_hidden(
        self,
        hidden: Tensor,
        head_weight: Tensor,
        step_labels: Tensor,
        step_index: Tensor | None = None,
        head_bias: Tensor | None = None,
        mask: Tensor | None = None,
        ignore_index: int = -100,
    ) -> ProcessRewardOutput:
        """From hidden states `[*, d]` and the head's weight, `[C, d]` for classes, `[1, d]` or `[d]` for scores.

        Args:
            step_labels: without `step_index` one label for each row of hidden, `ignore_index` but at the ends of
                steps. To find those is a host sync on an accelerator.
            step_index: where the labelled steps end, shaped like `step_labels`: positions `[S, K]` in hidden
                `[S, T, d]`, or rows `[n]` of packed hidden `[N, d]`. It is not read where there is no label.
            head_bias: one number for each row of the head's weight, or None.
            mask, ignore_index: as in `forward`.

        Only the rows where steps end enter the product, which is in fp32 whatever the dtypes.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or device, or (on a CPU, or with `FASTPREF_DEBUG=1`) a label or
                position out of range.
        """
        checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
        checks.tensor("head_weight", head_weight, dtypes=checks.FLOATS, ndim=(1, 2))
        checks.tensor("step_labels", step_labels, dtypes=(*checks.INTEGERS, *checks.FLOATS, torch.bool))
        if hidden.ndim < 2 or hidden.shape[-1] != head_weight.shape[-1]:
            raise ValueError(
                f"hidden: got shape {tuple(hidden.shape)}, want [*, {head_weight.shape[-1]}] to match head_weight "
                f"{tuple(head_weight.shape)}"
            )
        classes = 1 if head_weight.ndim == 1 else head_weight.shape[0]
        if head_bias is not None:
            checks.tensor("head_bias", head_bias, dtypes=checks.FLOATS)
            checks.shape("head_bias", head_bias, (classes,), "one per row of head_weight")
        checks.same_device("head_weight", head_weight, "hidden", hidden)
        checks.same_device("step_labels", step_labels, "hidden", hidden)
        scored = _labelled(step_labels, mask, ignore_index)
        if step_index is None:
            checks.shape("step_labels", step_labels, tuple(hidden.shape[:-1]), "one label per row of hidden")
            rows = scored.reshape(-1).nonzero()[:, 0]
            step_labels = step_labels.reshape(-1)[rows]
            mask = None
        else:
            rows = _step_rows(hidden, step_index, step_labels, scored)
        logits = _step_logits(hidden.reshape(-1, hidden.shape[-1]), head_weight, head_bias, rows, classes)
        shape = tuple(step_labels.shape) if classes == 1 else (*step_labels.shape, classes)
        return self(logits.view(shape), step_labels, mask, ignore_index)


def _labelled(labels: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    scored = torch.ones_like(labels, dtype=torch.bool) if labels.dtype == torch.bool else labels != ignore_index
    if mask is None:
        return scored
    return scored & checks.mask("mask", mask, tuple(labels.shape), "one per label", "step_labels", labels)


def _binary(scores: Tensor, labels: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if torch.float64 in (scores.dtype, labels.dtype) else torch.float32
    # the value that an ignored score or label holds must reach neither the loss nor the gradient
    scores, labels = scores.to(wide).masked_fill(~scored, 0), labels.detach().to(wide).masked_fill(~scored, 0)
    if checks.free_to_read(labels):
        bad = (labels < 0) | (labels > 1) | labels.isnan()
        if bool(bad.any()):
            raise ValueError(f"step_labels: got {labels[bad][0].item():g}, want probabilities in [0, 1]")
    losses = reference.soft_step_losses(scores, labels).masked_fill(~scored, 0)
    return losses, (scores.detach() > 0) == (labels > 0.5)


def _classes(logits: Tensor, labels: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    ignored = -1
    labels = labels.long().masked_fill(~scored, ignored)
    losses = -token_logprobs(logits, labels, ignore_index=ignored)
    return losses, logits.detach().argmax(-1) == labels


def _step_rows(hidden: Tensor, step_index: Tensor, step_labels: Tensor, scored: Tensor) -> Tensor:
    """The steps' rows among the flattened hidden states. Row 0 where there is no label."""
    checks.tensor("step_index", step_index, dtypes=checks.INTEGERS, ndim=(hidden.ndim - 1,))
    checks.shape("step_labels", step_labels, tuple(step_index.shape), "one label per step")
    checks.same_device("step_index", step_index, "hidden", hidden)
    if hidden.ndim > 3:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)} with step_index, want [S, T, d] or [N, d]")
    if hidden.ndim == 3 and step_index.shape[0] != hidden.shape[0]:
        raise ValueError(f"step_index: got shape {tuple(step_index.shape)}, want [{hidden.shape[0]}, K]")
    limit = hidden.shape[-2]
    if checks.free_to_read(step_index):
        bad = scored & ((step_index < 0) | (step_index >= limit))
        if bool(bad.any()):
            raise ValueError(f"step_index: got {int(step_index[bad][0])}, want a position in [0, {limit})")
    rows = step_index.long()
    if hidden.ndim == 3:
        rows = rows + torch.arange(hidden.shape[0], device=rows.device)[:, None] * limit
    return rows.masked_fill(~scored, 0).reshape(-1)


def _step_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, classes: int) -> Tensor:
    if classes == 1:
        return torch.ops.fastpref.row_scores(hidden, weight.reshape(-1), bias, rows, "rows")
    wide = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden[rows].to(wide) @ weight.to(wide).T
        return logits if bias is None else logits + bias.to(wide)


def aggregate_steps(
    step_scores: Tensor, cu_steps: Tensor | None = None, method: str = "min", mask: Tensor | None = None
) -> Tensor:
    """A sequence's score from those of its steps: `[S]`, differentiable, fp32 (fp64 for fp64 scores).

    Args:
        step_scores: probabilities that a step is right, `[S, K]`, or packed `[n]` with `cu_steps`.
        cu_steps: `[S + 1]`, the sequences' offsets in packed scores. Unpacking them is a host sync on an accelerator.
        method: `"min"` (arXiv 2312.08935, section 3.4), `"product"` (arXiv 2305.20050, section 2.6; in log space,
            scores must not be negative) or `"last"`.
        mask: which are steps: bool or 0 and 1, shaped like `step_scores`. None: all.

    A sequence without steps scores 0. The product passes no gradient to a score of exactly 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or method, or (on a CPU, or with `FASTPREF_DEBUG=1`) a
            negative score for a product.
    """
    checks.tensor("step_scores", step_scores, dtypes=checks.FLOATS)
    checks.choice("method", method, AGGREGATIONS)
    if mask is not None:
        mask = checks.mask("mask", mask, tuple(step_scores.shape), "one per step", "step_scores", step_scores)
    want = 2 if cu_steps is None else 1
    if step_scores.ndim != want:
        raise ValueError(
            f"step_scores: got shape {tuple(step_scores.shape)} {'without' if want == 2 else 'with'} cu_steps, want "
            f"{'[S, K]' if want == 2 else '[n]'}"
        )
    if method == "product" and checks.free_to_read(step_scores):
        negative = step_scores < 0 if mask is None else (step_scores < 0) & mask
        if bool(negative.any()):
            raise ValueError(f"step_scores: got {step_scores[negative][0].item():g}, want probabilities for a product")
    scores = step_scores if step_scores.dtype == torch.float64 else step_scores.float()
    real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if cu_steps is not None:
        checks.tensor("cu_steps", cu_steps, dtypes=checks.INTEGERS, ndim=(1,))
        checks.same_device("cu_steps", cu_steps, "step_scores", step_scores)
        _check_edges(cu_steps, scores.shape[0])
        sizes = cu_steps.diff()
        slot = torch.arange(int(sizes.max()) if len(sizes) else 0, device=scores.device)
        inside = slot < sizes[:, None]
        at = (cu_steps[:-1, None] + slot).where(inside, 0)
        scores, real = scores[at], inside & real[at]
    return reference.aggregate_steps(scores, real, method)


def _check_edges(cu_steps: Tensor, rows: int) -> None:
    if not checks.free_to_read(cu_steps):
        return
    if int(cu_steps[0]) != 0 or int(cu_steps[-1]) != rows or bool((cu_steps.diff() < 0).any()):
        raise ValueError(
            f"cu_steps: got {cu_steps.tolist()}, want ascending offsets from 0 to the number of steps, {rows}"
        )


# `ops` registers the operators that torch.ops.fastpref finds.
_ = ops
