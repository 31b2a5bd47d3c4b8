"""The portable backend: the functions of `fastpref_kernels` in plain PyTorch, for CPUs and where Triton does not run.

Rows are processed in blocks that stay in the L2 cache. So a tile of logits crosses the memory bus once in each
direction, however many elementwise passes are made over it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref import reference
from fastpref.backends.derivatives import value_and_gradients
from fastpref.backends.portable_kl import kl_estimate as kl_estimate
from fastpref.backends.portable_kl import penalized_rewards as penalized_rewards
from fastpref.backends.portable_kl import penalized_rewards_backward as penalized_rewards_backward
from fastpref.backends.portable_kl import token_kl as token_kl
from fastpref.backends.portable_kl import token_kl_gradient as token_kl_gradient
from fastpref.backends.portable_lists import list_loss as list_loss
from fastpref.backends.portable_policy import policy_loss as policy_loss
from fastpref.backends.portable_reward import bradley_terry as bradley_terry
from fastpref.backends.portable_reward import row_scores as row_scores
from fastpref.backends.portable_reward import row_scores_gradient as row_scores_gradient
from fastpref.backends.portable_unpaired import unpaired_loss as unpaired_loss
from fastpref.backends.rows import blocks, transform_slope
from fastpref.backends.sequences import Sequences
from fastpref.common.precision import wide

CACHE_LINE = 64
SAME_SETS = 2048  # bytes: rows that begin a multiple of it apart compete for the same sets of a cache


def row_stride(columns: int, element_size: int) -> int:
    """Elements from one row of logits to the next: rows begin on cache lines, but not in the same sets of a cache.

    Measured on 2 cores with d = 576, the three products with U of 480 rows: at V = 49152 they took 497 ms, and 463 ms
    with 64 bytes between the rows; at V = 50257, where rows did not begin on cache lines, 539 and 484 ms.
    """
    stride = math.ceil(columns * element_size / CACHE_LINE) * CACHE_LINE
    return (stride if stride % SAME_SETS else stride + CACHE_LINE) // element_size


def row_logprob(
    logits: Tensor, labels: Tensor, *, transform: reference.LogitTransform, ignore_index: int, statistics=(),
    target_logits: Tensor | None = None, write_u: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """As `fastpref_kernels.row_logprob`."""
    n, vocab, dtype = labels.numel(), logits.shape[-1], wide(logits.dtype)
    in_range = (labels >= 0) & (labels < vocab)
    label = labels.where(in_range, 0).long()
    z_label = transform(logits.gather(-1, label.view(*logits.shape[:-1], 1)).view(n).to(dtype))
    exact = None if target_logits is None else transform(target_logits)
    out = {name: logits.new_empty(n, dtype=dtype) for name in ("logps", "lse")}
    out |= {name: logits.new_empty(n, dtype=torch.bool if name == "is_top1" else dtype) for name in statistics}
    for where, block in blocks(logits):
        values = {name: value[where] for name, value in out.items()}
        z_exact = None if exact is None else exact[where]
        _fold_block(block, labels[where], z_label[where], z_exact, transform, values, write_u)
    if write_u:
        d_label = -torch.expm1(out["logps"]) * transform_slope(z_label, transform)
        logits.scatter_(1, label[:, None], d_label[:, None].to(logits.dtype))
    out["logps"].masked_fill_(~in_range, float("nan"))
    ignored = labels == ignore_index
    return {name: value.masked_fill_(ignored, 0) for name, value in out.items()}


def _fold_block(
    block: Tensor, labels: Tensor, z_label: Tensor, z_exact: Tensor | None, transform: reference.LogitTransform,
    out: dict[str, Tensor], write_u: bool,
) -> None:  # fmt: skip
    """Write a block's log-probs, lse and statistics to `out`.

    With `write_u` its logits become U, all but the label's column. `z_label` are the labels' logits as they were
    rounded, `z_exact` the same in fp32.
    """
    dtype = wide(block.dtype)
    own = write_u and block.dtype == dtype  # the logits may be overwritten where they lie
    z = block if own else block.to(dtype, copy=True)
    if transform != reference.LogitTransform():
        z = transform(z)
    slope = transform_slope(z, transform) if write_u else 1.0

    # Maximum, difference, one exponential, sum: log_softmax followed by exp costs a second exponential.
    m = z.amax(1).clamp_(min=torch.finfo(dtype).min)  # a row of -inf
    if len(out) > 2:
        _row_statistics(z, m, labels, out)
    e = z.sub_(m[:, None]).exp_()
    log_sum = e.sum(1).log_()
    for name, times in (("entropy", 1), ("log_sum_sq", -2)):
        if name in out:
            out[name].add_(log_sum, alpha=times)
    shifted = z_label - m
    if z_exact is not None:
        # the label's fp32 logit replaces its rounded self inside the sum too (see fastpref_kernels.row_logprob)
        rounded, shifted = shifted, z_exact - m
        log_sum = torch.logaddexp(log_sum + torch.log1p(-(rounded - log_sum).exp()), shifted)
    torch.sub(shifted, log_sum, out=out["logps"])  # not z_label - lse: a common offset of 1e4 would cost 5e-4
    torch.add(m, log_sum, out=out["lse"])
    if write_u:
        u = e.mul_((-log_sum).exp_().neg_()[:, None])
        if not isinstance(slope, float) or slope != 1.0:
            u.mul_(slope)
        if u is not block:
            block.copy_(u)


def _row_statistics(z: Tensor, m: Tensor, labels: Tensor, out: dict[str, Tensor]) -> None:
    """The requested statistics of a block. Entropy and log_sum_sq still miss their log-sum-exp.

    Those two are formed from z - m. With z itself a confident row's entropy would be a difference of large numbers.
    """
    shifted = z - m[:, None]
    if "entropy" in out:
        e = shifted.exp()
        out["entropy"].copy_(-(torch.where(e > 0, e * shifted, 0).sum(1) / e.sum(1)))
    if "log_sum_sq" in out:
        out["log_sum_sq"].copy_((shifted * 2).exp_().sum(1).log())
    if "mean_logit" in out:
        out["mean_logit"].copy_(z.mean(1))
    if "is_top1" in out:
        out["is_top1"].copy_(z.argmax(1) == labels)


def row_gradient(
    logits: Tensor, labels: Tensor, logps: Tensor, lse: Tensor, out: Tensor, *, transform: reference.LogitTransform,
    ignore_index: int, first_column: int = 0, grad_logps: Tensor | None = None,
    entropy: Tensor | None = None, grad_entropy: Tensor | None = None,
) -> None:  # fmt: skip
    """As `fastpref_kernels.row_gradient`."""
    dtype = wide(logits.dtype)
    for where, block in blocks(logits):
        z = block.to(dtype, copy=block.dtype == dtype)
        if transform != reference.LogitTransform():
            z = transform(z)
        slope = transform_slope(z, transform)
        columns = (labels[where] - first_column)[:, None].long()
        here = (columns >= 0) & (columns < block.shape[1])
        columns = columns.where(here, 0)
        log_p = z.sub_(lse[where, None])
        gradient = log_p.exp().neg_()
        mixed = None
        if grad_entropy is not None and entropy is not None:  # dH / dz_v = -p_v (log p_v + H)
            mixed = torch.where(gradient < 0, gradient * (log_p + entropy[where, None]), 0)
        d_label = torch.where(here, -torch.expm1(logps[where, None]), gradient.gather(1, columns))
        gradient.scatter_(1, columns, d_label)
        if grad_logps is not None:
            gradient.mul_(grad_logps[where, None])
        if mixed is not None and grad_entropy is not None:
            gradient.addcmul_(mixed, grad_entropy[where, None].expand_as(mixed))
        if not isinstance(slope, float) or slope != 1.0:
            gradient.mul_(slope)
        out[where] = gradient.masked_fill_((labels[where] == ignore_index)[:, None], 0)


def target_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """As `fastpref_kernels.target_logits`."""
    dtype = wide(hidden.dtype)
    in_range = (labels >= 0) & (labels < weight.shape[0])
    label = labels.where(in_range, 0)
    z = (hidden.to(dtype) * weight[label].to(dtype)).sum(1)
    if bias is not None:
        z += bias[label].to(dtype)
    return z.masked_fill_(~in_range, float("nan"))


def paired_loss(
    token_logps: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None, ref_logps: Tensor | None,
    lengths: Tensor | None, pair_weights: Tensor | None, chosen_tokens: Tensor | None,
    objective: reference.PairedObjective, *, num_pairs: int, total_pairs: int, ignore_index: int,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `fastpref_kernels.paired_loss`; the derivatives are autograd's of `fastpref.reference.paired_loss`."""
    dtype = token_logps.dtype
    sequences = Sequences.of(token_logps, labels, cu_seqlens, 2 * num_pairs, ignore_index)
    nll_sums = sequences.sums(token_logps)
    sums = nll_sums if token_weights is None else sequences.sums(token_logps * token_weights)
    wide = sums.dtype  # everything of size B stays in it
    counts = sequences.sums(torch.ones_like(token_logps)) if lengths is None else lengths.to(wide)
    chosen, rejected = sums.chunk(2)
    ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.to(wide).chunk(2)
    given = (ref_chosen, ref_rejected, *counts.chunk(2), objective)
    pair_weights = None if pair_weights is None else pair_weights.to(wide)

    def formula(chosen_sums, rejected_sums, chosen_nll_sums):
        return reference.paired_loss(
            chosen_sums, rejected_sums, *given, chosen_nll_sums=chosen_nll_sums,
            pair_weights=pair_weights, total_pairs=total_pairs, chosen_tokens=chosen_tokens,
        )  # fmt: skip

    loss, gradients = value_and_gradients(formula, chosen, rejected, nll_sums[:num_pairs])
    d_chosen, d_rejected, d_nll = gradients
    coefs = sequences.spread(torch.cat([d_chosen, d_rejected]), dtype)
    if token_weights is not None:
        coefs = coefs * token_weights
    coefs = coefs + sequences.spread(torch.cat([d_nll, torch.zeros_like(d_nll)]), dtype)
    return loss.to(dtype), reference.paired_metrics(chosen, rejected, *given).to(dtype), coefs
