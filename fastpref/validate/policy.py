"""The tolerance policy: how large an error may be, and why. Every threshold of `fastpref validate` is in this file.

An error is judged against fp64 and against an ideal (`fastpref.validate.ideal`): a perfect implementation with the same
rounding points. A correct kernel so scores about 1.0, however coarse its dtype.

    (a) fp32 and fp64 results       relative L2 <= 1e-5 (fp64: 1e-10), |signed projection| <= 1e-6 (1e-10)
    (b) half-precision roundings    relative L2 <= 1.25 x the ideal's, max error <= 2 x the ideal's + 1 ulp
    (c) integer-valued inputs       sums are exact, so bitwise equal
    (d) a loss scalar               |e| <= 4 eps |loss| sqrt(n), in the loss's own conditioning

The signed projection sum(e r) / sum(r^2) is the factor by which a result is too large. It sees a gradient scaled by
1.001, which hides inside any bound on the size of the error.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.common.precision import HALF

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}
PROJECTION = {torch.float64: 1e-10, torch.float32: 1e-6}
TIMES_IDEAL = 1.25  # correct variants score 1.00, a factor of 1.003 scores 1.7 or more, truncation 1.8 or more
TIMES_IDEAL_MAX = 2.0
# fp32 rounding alone, at the points that the ideal lists, may cost more than (a) allows: a log-sum-exp of 1e4 has a
# spacing of 1e-3 in fp32, and every probability inherits it. There the bound is a multiple of the ideal's error.
# It is 2, since a kernel's accumulations round more often than the ideal. (In half precision both round alike.)
# The norm of few errors is a small sample: of n errors it spreads by 1 / sqrt(2 n), which is allowed three times.
# A loss's gradient has one error a pair, since each pair's coefficient inherits the rounding of its sums.
TIMES_IDEAL_WIDE = 2.0
LOSS_EPS = 4.0


class Verdict(NamedTuple):
    """What one rule says of one result."""

    rule: str
    error: float  # relative L2; for a scalar loss |e| / |loss|
    ideal: float  # the ideal's, the same way
    limit: float  # what `error` may be
    passed: bool
    detail: str = ""  # which bound broke

    @property
    def ratio(self) -> float | None:
        return self.error / self.ideal if self.ideal > 0 else None


def relative_l2(error: Tensor, truth: Tensor) -> float:
    """The L2 norm of the error over that of the truth."""
    return (error.norm() / truth.norm()).item()


def projection(error: Tensor, truth: Tensor) -> float:
    """The signed projection of the error on the truth: by which factor a result is too large."""
    return ((error * truth).sum() / (truth * truth).sum()).item()


def _broken(rule: str, detail: str) -> Verdict:
    return Verdict(rule, float("inf"), 0.0, 0.0, False, detail)


def judge_exact(got: Tensor, truth: Tensor) -> Verdict:
    """Rule (c): bitwise equal, up to the sign of zero."""
    want = truth.to(got.dtype)
    if torch.equal(got, want):
        return Verdict("c", 0.0, 0.0, 0.0, True)
    wrong = (got != want) | got.isnan()
    return _broken("c", f"{int(wrong.sum())} of {got.numel()} values are not bitwise equal")


def judge(got: Tensor, truth: Tensor, ideal: Tensor, io: torch.dtype, samples: int | None = None) -> Verdict:
    """Rule (a) or (b).

    Args:
        got: the tensor to judge.
        truth: the same in fp64.
        ideal: the ideal's result, in fp64.
        io: the inputs' dtype.
        samples: how many independent errors there are, if fewer than values.
    """
    if got.shape != truth.shape:
        return _broken("a", f"shape {tuple(got.shape)}, want {tuple(truth.shape)}")
    dtype, got = got.dtype, got.double()
    if not torch.equal(got.isfinite(), truth.isfinite()):
        return _broken("a", f"{int((got.isfinite() != truth.isfinite()).sum())} values wrongly (not) finite")
    infinite = ~truth.isfinite()
    if not torch.equal(got[infinite], truth[infinite]):
        return _broken("a", "an infinity of the wrong sign")
    got, truth, ideal = (x.masked_fill(infinite, 0) for x in (got, truth, ideal))
    if not truth.any():  # an empty completion, an ignored row: exactly zero
        return judge_exact(got, truth)
    error, ideal_error = relative_l2(got - truth, truth), relative_l2(ideal - truth, truth)
    if dtype not in HALF and (io not in HALF or ideal_error <= RELATIVE[dtype]):
        return _judge_wide(got - truth, truth, error, ideal_error, dtype, samples or truth.numel())
    return _judge_half(got - truth, ideal - truth, truth, error, ideal_error, dtype)


def _judge_wide(
    e: Tensor, truth: Tensor, error: float, ideal_error: float, dtype: torch.dtype, samples: int
) -> Verdict:
    from_ideal = TIMES_IDEAL_WIDE * (1 + 3 / (2 * samples) ** 0.5) * ideal_error
    limit, bias_limit = max(RELATIVE[dtype], from_ideal), max(PROJECTION[dtype], from_ideal)
    bias = projection(e, truth)
    detail = ""
    if error > limit:
        detail = f"relative L2 {error:.1e} > {limit:.1e}"
    elif abs(bias) > bias_limit:
        detail = f"signed projection {bias:+.1e} beyond {bias_limit:.1e}"
    return Verdict("a", error, ideal_error, limit, not detail, detail)


def _judge_half(
    e: Tensor, ideal_e: Tensor, truth: Tensor, error: float, ideal_error: float, dtype: torch.dtype
) -> Verdict:
    limit = TIMES_IDEAL * ideal_error
    worst = (e.abs() - torch.finfo(dtype).eps * truth.abs()).max().item()
    worst_limit = TIMES_IDEAL_MAX * ideal_e.abs().max().item()
    detail = ""
    if error > limit:
        detail = f"relative L2 {error:.2e} > {TIMES_IDEAL} x {ideal_error:.2e}"
    elif worst > worst_limit:
        detail = f"max error {worst:.2e} beyond an ulp > {TIMES_IDEAL_MAX} x the ideal's"
    return Verdict("b", error, ideal_error, limit, not detail, detail)


class Conditioning(NamedTuple):
    """How a loss reacts to errors in the n log-probs l that it is made of: c = d loss / d l in fp64."""

    tokens: int  # n
    sensitivity: float  # sum |c l|
    noise: float  # |c * (ideal l - true l)|_2, what the roundings of the log-probs do to the loss


def judge_loss(got: Tensor, truth: Tensor, ideal: Tensor, conditioning: Conditioning) -> Verdict:
    """Rule (d): 4 eps sqrt(n) (|loss| + sum |c l|), and the noise that half-precision logits put into the log-probs.

    The first term with |loss| alone would be wrong. Sums of hundreds of nats are rounded to fp32 and then subtracted,
    so a loss of 0.7 carries an error of eps |c| |sum|. That is its condition number, and not the kernel's doing.
    """
    if not got.isfinite().item():
        return _broken("d", f"the loss is {got.item()}")
    error, ideal_error = abs(got.double() - truth).item(), abs(ideal - truth).item()
    size = abs(truth).item()
    eps = torch.finfo(got.dtype).eps if got.dtype != torch.float64 else RELATIVE[torch.float64] / LOSS_EPS
    limit = LOSS_EPS * eps * conditioning.tokens**0.5 * (size + conditioning.sensitivity)
    limit += max(TIMES_IDEAL * ideal_error, conditioning.noise)
    detail = "" if error <= limit else f"loss off by {error:.1e} > {limit:.1e}"
    scale = size or 1.0
    return Verdict("d", error / scale, ideal_error / scale, limit / scale, not detail, detail)
