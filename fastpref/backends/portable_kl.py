"""The portable backend's KL: the functions of `fastpref_kernels`' `token_kl.py` and `sampled_kl.py` in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends.rows import blocks, transform_slope
from fastpref.common.precision import wide


def _logits(block: Tensor, transform: reference.LogitTransform, dtype: torch.dtype) -> Tensor:
    """The transformed logits in `dtype`, a copy that may be overwritten."""
    z = block.to(dtype, copy=True)
    return z if transform == reference.LogitTransform() else transform(z)


def _shift(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(m, log sum exp(z - m), z - m) of every row, where m is its maximum. z is overwritten. A row of -inf is NaN."""
    m = z.amax(1)
    log_s = z.sub_(m[:, None]).exp().sum(1).log_()
    return m, log_s, z


def _log_ratios(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log(p / m), log(q / m)) of each token, where m = beta q + (1 - beta) p; overwrites `log_q`.

    The larger of p and q comes first, so that nothing overflows.
    """
    d = torch.sub(log_p, log_q, out=log_q)
    above = d >= 0
    away = d.abs().neg_().expm1_()
    larger = torch.where(above, away * beta, away * (1 - beta)).log1p_().neg_()
    return torch.where(above, larger, larger + d), torch.where(above, larger - d, larger)


def _divergence(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> tuple[Tensor, Tensor]:
    """(the divergence, the KL that `_k` subtracts) of every row. 0 log 0 = 0."""
    if direction == "jsd":
        of_p, of_q = _log_ratios(log_p, log_q.clone(), beta)
        own, other = ((x.exp(), ratio) for x, ratio in ((log_p, of_p), (log_q, of_q)))
        policy_kl, ref_kl = (ratio.mul_(e).masked_fill_(e == 0, 0).sum(1) for e, ratio in (own, other))
        return beta * ref_kl + (1 - beta) * policy_kl, policy_kl
    a, b = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    e = a.exp()
    kl = (a - b).mul_(e).masked_fill_(e == 0, 0).sum(1)
    return kl, kl


def _k(
    log_p: Tensor, log_q: Tensor, kl: Tensor, slope: Tensor | float, direction: str, beta: float
) -> Tensor:  # fmt: skip
    """d divergence / d policy's head output; overwrites its inputs."""
    if direction == "forward":
        k = log_p.exp_().sub_(log_q.exp_())
    elif direction == "jsd":
        of_p, _ = _log_ratios(log_p, log_q, beta)
        p = log_p.exp_()
        k = of_p.sub_(kl[:, None]).mul_(p).mul_(1 - beta).masked_fill_(p == 0, 0)
    else:
        p = log_p.exp()
        k = log_p.sub_(log_q).sub_(kl[:, None]).mul_(p).masked_fill_(p == 0, 0)
    if isinstance(slope, float) and slope == 1.0:
        return k
    return k.mul_(slope)


def token_kl(
    policy: Tensor, ref: Tensor, *, direction: str, transform: reference.LogitTransform, beta: float = 0.5,
    mask: Tensor | None = None, labels: Tensor | None = None, target_logits: Tensor | None = None,
    ref_target_logits: Tensor | None = None, write_k: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """As `fastpref_kernels.token_kl`."""
    n, dtype = policy.shape[:-1].numel(), wide(torch.promote_types(policy.dtype, ref.dtype))
    names = ("kl", "lse", "ref_lse") + (("policy_kl",) if direction == "jsd" else ())
    out = {name: policy.new_empty(n, dtype=dtype) for name in names}
    if labels is not None:
        for name, logits in (("logps", policy), ("ref_logps", ref)):
            out[name] = _label_logits(logits, labels, transform, dtype)  # before K overwrites them
    for (where, p_block), (_, q_block) in zip(blocks(policy), blocks(ref), strict=True):
        p, q = _logits(p_block, transform, dtype), _logits(q_block, transform, dtype)
        slope = transform_slope(p, transform) if write_k else 1.0
        m_p, log_s, p = _shift(p)
        m_q, ref_log_s, q = _shift(q)
        log_p, log_q = p.sub_(log_s[:, None]), q.sub_(ref_log_s[:, None])
        kl, subtracted = _divergence(log_p, log_q, direction, beta)
        out["kl"][where], out["lse"][where], out["ref_lse"][where] = kl, m_p + log_s, m_q + ref_log_s
        if direction == "jsd":
            out["policy_kl"][where] = subtracted
        if write_k:
            p_block.copy_(_k(log_p, log_q, subtracted, slope, direction, beta))
    if labels is not None:
        for name, lse, exact in (("logps", "lse", target_logits), ("ref_logps", "ref_lse", ref_target_logits)):
            out[name] = _label_logprob(out[name], out[lse], None if exact is None else transform(exact))
    return out if mask is None else {name: value.masked_fill_(~mask, 0) for name, value in out.items()}


def _label_logits(logits: Tensor, labels: Tensor, transform: reference.LogitTransform, dtype: torch.dtype) -> Tensor:
    in_range = (labels >= 0) & (labels < logits.shape[-1])
    at = labels.where(in_range, 0).long().view(*logits.shape[:-1], 1)
    return transform(logits.gather(-1, at).view(-1).to(dtype)).masked_fill_(~in_range, float("nan"))


def _label_logprob(z: Tensor, lse: Tensor, exact: Tensor | None) -> Tensor:
    if exact is None:
        return z - lse
    # the label's fp32 logit replaces its rounded self inside the sum too (see fastpref_kernels.row_logprob)
    return exact - torch.logaddexp(lse + torch.log1p(-(z - lse).exp()), exact)


def token_kl_gradient(
    policy: Tensor, ref: Tensor, kl: Tensor, lse: Tensor, ref_lse: Tensor, out: Tensor, *, direction: str,
    transform: reference.LogitTransform, beta: float = 0.5, mask: Tensor | None = None, grad: Tensor | None = None,
) -> None:  # fmt: skip
    """As `fastpref_kernels.token_kl_gradient`."""
    for (where, p_block), (_, q_block) in zip(blocks(policy), blocks(ref), strict=True):
        p, q = _logits(p_block, transform, kl.dtype), _logits(q_block, transform, kl.dtype)
        slope = transform_slope(p, transform)
        k = _k(p.sub_(lse[where, None]), q.sub_(ref_lse[where, None]), kl[where], slope, direction, beta)
        if grad is not None:
            k.mul_(grad[where, None])
        out[where] = k if mask is None else k.masked_fill_(~mask[where, None], 0)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """As `fastpref_kernels.kl_estimate`."""
    log_ratio = logps - ref_logps
    slopes = {
        "k1": torch.ones_like,
        "k2": torch.clone,
        "k3": lambda x: -torch.expm1(-x),
        "abs": torch.sign,
    }
    kl = reference.kl_estimate(logps, ref_logps, estimator)
    return kl, slopes[estimator](log_ratio)


def penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: Tensor, estimator: str
) -> tuple[Tensor, Tensor]:
    """As `fastpref_kernels.penalized_rewards`."""
    return reference.kl_penalized_rewards(scores, logps, ref_logps, mask, beta, estimator)


def penalized_rewards_backward(
    grad_rewards: Tensor | None, grad_sums: Tensor | None, logps: Tensor, ref_logps: Tensor, mask: Tensor,
    beta: Tensor, estimator: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.penalized_rewards_backward`."""
    grad = torch.zeros_like(logps) if grad_rewards is None else grad_rewards
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (steps * mask).argmax(1, keepdim=True) if mask.shape[1] else steps.new_zeros(len(mask), 0)
    d_scores = grad.masked_fill(~mask, 0).gather(1, last).sum(1)
    if grad_sums is not None:
        d_scores, grad = d_scores + grad_sums, grad + grad_sums[:, None]
    _, slope = kl_estimate(logps, ref_logps, estimator)
    return d_scores, (-beta * slope * grad).masked_fill(~mask, 0)
