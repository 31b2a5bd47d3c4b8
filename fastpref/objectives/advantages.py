"""Advantages of several samples to a prompt: leave-one-out (RLOO) and group-relative (GRPO), as in TRL 1.16.

A reward that is NaN is one that no reward function gave. It counts in no mean, and its advantage is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4  # TRL's, beside a standard deviation


class Advantages(NamedTuple):
    """Advantages of samples, all `[G]`, and what they do with a small change of a sample's own reward."""

    values: Tensor
    slope: Tensor  # what a penalty that is part of the reward weighs in the loss by itself
    no_spread: Tensor  # bool: the rewards that it is compared with are all the same


def nan_std(values: Tensor, dim: int | None = None) -> Tensor:
    """The unbiased standard deviation of the values that are not NaN; NaN of fewer than two. Keeps the dimension."""
    present = (~values.isnan()).sum(dim, keepdim=dim is not None)
    deviations = values - values.nanmean(dim, keepdim=True) if dim is not None else values - values.nanmean()
    return (deviations.square().nansum(dim, keepdim=dim is not None) / (present - 1)).sqrt()


def leave_one_out(rewards: Tensor, samples: int, *, normalize: bool = False) -> Advantages:
    """A sample's reward minus the mean of the others' to its prompt (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    Args:
        rewards: `[G]`, the samples of a prompt one after the other.
        samples: how many there are to each prompt. With 1 all advantages are 0.
        normalize: bring the advantages of all samples to mean 0 and standard deviation 1.
    """
    if samples == 1:
        return Advantages(torch.zeros_like(rewards), torch.zeros_like(rewards), torch.ones_like(rewards).bool())
    groups = rewards.view(-1, samples)
    others = (~groups.isnan()).sum(1, keepdim=True) - 1
    values = (groups - (groups.nansum(1, keepdim=True) - groups) / others).view(-1)
    slope = torch.ones_like(values)
    if normalize:
        spread = nan_std(values) + EPSILON
        values, slope = (values - values.nanmean()) / spread, slope / spread
    return _finished(values, slope, nan_std(groups, 1).expand_as(groups).reshape(-1))


def group_relative(rewards: Tensor, samples: int, *, scale: str = "group") -> Advantages:
    """A sample's reward minus the mean of its group's (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: `[G]`, the samples of a prompt one after the other.
        samples: how many there are to each prompt.
        scale: divide by the standard deviation of the `"group"`, of the `"batch"`, or by `"none"` (Dr. GRPO).
    """
    groups = rewards.view(-1, samples)
    values = (groups - groups.nanmean(1, keepdim=True)).view(-1)
    spread = nan_std(rewards).expand_as(rewards)
    if scale != "batch":
        spread = nan_std(groups, 1).expand_as(groups).reshape(-1)
    if len(rewards) == 1 or (samples == 1 and scale != "batch"):
        spread = torch.zeros_like(values)
    slope = torch.full_like(values, 1 - 1 / samples)  # a sample is part of the mean that it is compared with
    if scale != "none":
        values, slope = values / (spread + EPSILON), slope / (spread + EPSILON)
    return _finished(values, slope, spread)


def normalized_sum(rewards: Tensor, weights: Tensor, samples: int) -> Advantages:
    """Every reward normalised within its group, then added up by weight and normalised again (GDPO, arXiv 2601.05242).

    Args:
        rewards: `[G, F]`, of each function.
        weights: `[F]`.
        samples: how many there are to each prompt.
    """
    groups = rewards.view(-1, samples, rewards.shape[1])
    spread = nan_std(groups, 1) if samples > 1 else torch.zeros_like(groups[:, :1])
    each = ((groups - groups.nanmean(1, keepdim=True)) / (spread + EPSILON)).view_as(rewards)
    total = weighted(each, weights, rewards)
    spread = nan_std(total).expand_as(total) if len(total) > 1 else torch.zeros_like(total)
    return _finished((total - total.nanmean()) / (spread + EPSILON), torch.zeros_like(total), spread)


def weighted(rewards: Tensor, weights: Tensor, given: Tensor | None = None) -> Tensor:
    """The weighted sum `[G]` of rewards `[G, F]`. NaN where none of the functions gave one (in `given`, if it is)."""
    missing = (rewards if given is None else given).isnan().all(1)
    return (rewards * weights).nansum(1).masked_fill(missing, torch.nan)


def _finished(values: Tensor, slope: Tensor, spread: Tensor) -> Advantages:
    missing = values.isnan()
    return Advantages(values.nan_to_num(nan=0.0), slope.masked_fill(missing, 0), torch.isclose(spread, spread * 0))
