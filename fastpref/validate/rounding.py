"""What the ideal implementation keeps of a row, fp64 rounded where it is stored, and divergences made of that."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.reference import LogitTransform

EXACT = torch.float64


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(EXACT)


class Rounding(NamedTuple):
    io: torch.dtype  # inputs, logits, U, gradients
    wide: torch.dtype  # log-probs and everything per row
    product: torch.dtype  # what a gradient product leaves behind before it is added up or scaled

    @classmethod
    def of(cls, io: torch.dtype, device: torch.device) -> Rounding:
        wide = torch.float64 if io == torch.float64 else torch.float32
        return cls(io, wide, io if device.type == "cpu" else wide)


def slope_of(z: Tensor, transform: LogitTransform) -> Tensor:
    """d logit / d head output from the logit as stored: near the cap, 1 - (z / cap)^2 cancels."""
    slope = torch.full_like(z, transform.logit_scale / transform.temperature)
    if transform.softcap is not None:
        slope = slope * (1 - (z * transform.temperature / transform.softcap) ** 2)
    return slope


def log_sum_of(z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(m, log sum exp(z - m)) with m the maximum."""
    m = z.amax(1)
    return m, rounded(rounded((z - m[:, None]).exp().sum(1), dtype).log(), dtype)


def lse_of(z: Tensor, dtype: torch.dtype) -> Tensor:
    m, log_sum = log_sum_of(z, dtype)
    return rounded(m + log_sum, dtype)


Divergence = tuple[str, float]  # direction, and beta of a jsd


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(1)


def _mixed(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))


def divergence(z: Tensor, ref_z: Tensor, what: Divergence, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(divergence, the KL that its gradient subtracts), as they are stored."""
    log_p, log_q = ((x - m[:, None]) - s[:, None] for x in (z, ref_z) for m, s in (log_sum_of(x, dtype),))
    direction, beta = what
    if direction == "jsd":
        log_m = _mixed(log_p, log_q, beta)
        own = _kl(log_p, log_m)
        return rounded(beta * _kl(log_q, log_m) + (1 - beta) * own, dtype), rounded(own, dtype)
    kl = rounded(_kl(log_q, log_p) if direction == "forward" else _kl(log_p, log_q), dtype)
    return kl, kl


def divergence_gradient(
    z: Tensor, ref_z: Tensor, lse: Tensor, ref_lse: Tensor, kl: Tensor, what: Divergence
) -> Tensor:  # fmt: skip
    """d divergence / d z. The backward reads the logits again; it has both log-sum-exps and the KL as stored."""
    log_p, log_q = z - lse[:, None], ref_z - ref_lse[:, None]
    p = log_p.exp()
    direction, beta = what
    if direction == "forward":
        return p - log_q.exp()
    if direction == "jsd":
        return torch.where(p > 0, (1 - beta) * p * (log_p - _mixed(log_p, log_q, beta) - kl[:, None]), 0)
    return torch.where(p > 0, p * (log_p - log_q - kl[:, None]), 0)
