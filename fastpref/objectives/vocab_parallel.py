"""Heads whose vocabulary is sharded over a process group: log-probs and exact KL without gathering the weight.

It is `fastpref.parallel`. Every rank has all hidden states, and the rows `[V_r, d]` of its part of the vocabulary. From
these it knows its own log-sum-exp lse_r. Over all ranks lse = logsumexp_r lse_r, so a rank's part of the softmax has
the mass w_r = exp(lse_r - lse). Three floats for each row, gathered once, tell every rank the log-prob or divergence of
the whole vocabulary. (Megatron-LM's vocabulary-parallel loss, Shoeybi et al. 2019, arXiv 1909.08053, section 3, takes
three reductions.) The backward is local but for one sum of dH.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpref.common import checks, memory
from fastpref.common.ranks import StartedSum, gather_over_ranks
from fastpref.objectives.head_inputs import HeadOptions, ScoredRows, head_inputs, known_rows
from fastpref.objectives.kl import reference_inputs
from fastpref.ops.linear import head_of, upstream_of
from fastpref.plans import kl_plans, plans
from fastpref.plans.compact import compact, compact_labels, gather, scatter
from fastpref.plans.products import ParameterGradients
from fastpref.reference import KL_DIRECTIONS

PLANS = ("auto", "no_grad", "store", "recompute")
EVERY_ROW = -1  # an ignore_index that no compacted label has


class Shard(NamedTuple):
    """A rank's part of a vocabulary."""

    group: Any
    first: int  # vocabulary index of its first row
    vocab: int  # of all ranks together

    def gather(self, values: Tensor) -> Tensor:
        """`[ranks, ...]`, the same on every rank."""
        return torch.stack(gather_over_ranks(values, self.group))


def _localized(weight: Tensor, group: Any, others: tuple[Tensor | None, ...]) -> tuple[Tensor, Shard, list[Any]]:
    """(local rows of the weight, shard, the other tensors as local ones). A DTensor says itself how it is sharded."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Placement

    if not isinstance(weight, DTensor):
        if not dist.is_initialized():
            raise RuntimeError("group: got no process group, want torch.distributed.init_process_group() first")
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        return weight, Shard(group, rank * weight.shape[0], ranks * weight.shape[0]), list(others)
    if weight.placements != (Placement(0),):
        raise ValueError(f"weight: got a DTensor placed as {weight.placements}, want (Shard(dim=0),): a mesh of 1 axis")
    mesh, vocab = weight.device_mesh, weight.shape[0]
    rows = -(-vocab // mesh.size())
    if (mesh.size() - 1) * rows >= vocab:
        raise ValueError(f"weight: got {vocab} rows over {mesh.size()} ranks, want at least one on each")
    local = [value.to_local() if isinstance(value, DTensor) else value for value in others]
    return weight.to_local(), Shard(mesh.get_group(), mesh.get_local_rank() * rows, vocab), local


def _choose(plan: str, needed: bool, rows: int, weight: Tensor, workspace_bytes: int | None) -> str:
    checks.choice("plan", plan, PLANS)
    if plan != "auto":
        return plan
    if not needed:
        return "no_grad"
    fits = rows * weight.numel() // weight.shape[1] * weight.element_size()
    return "store" if fits <= memory.workspace(weight.device, workspace_bytes).most else "recompute"


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, compute_weight, labels, shard, transform, ignore_index, plan, workspace_bytes,
        scored_rows,
    ):  # fmt: skip
        rows = compact(labels, ignore_index, scored_rows)
        h, y = gather(hidden, rows), compact_labels(labels, rows, ignore_index, scored_rows)
        head = head_of(weight, compute_weight, bias, EVERY_ROW, *transform)
        own = y - shard.first
        here = (own >= 0) & (own < weight.shape[0])
        found = plans.forward(h, head, own.where(here, 0), plan, workspace_bytes, keep_logits=True)
        gathered = shard.gather(torch.stack([found.lse, found.logps.where(here, 0), here.to(found.lse.dtype)]))
        all_lse, all_logps, owner = gathered.unbind(1)
        lse = all_lse.logsumexp(0)
        logps = ((all_logps + all_lse - lse) * owner).sum(0)
        # a label that no rank has is none; an upper bound of the scored rows lets in ignored ones
        logps = logps.masked_fill(owner.sum(0) == 0, float("nan")).masked_fill(y == ignore_index, 0)
        ctx.save_for_backward(hidden, weight, bias, compute_weight, y, rows, logps, lse, found.kept)
        ctx.options = shard, transform, ignore_index, plan, workspace_bytes
        return scatter(logps, rows, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, compute_weight, y, rows, logps, lse, kept = ctx.saved_tensors
        shard, transform, ignore_index, plan, workspace_bytes = ctx.options
        needs = plans.Needs(*ctx.needs_input_grad[:3])
        head = head_of(weight, compute_weight, bias, EVERY_ROW, *transform)
        parameters, total = ParameterGradients(head, needs, weight.dtype), StartedSum(shard.group)
        upstream = plans.Upstream(upstream_of(grad, rows, y, ignore_index))
        d_hidden = plans.backward_recompute(
            gather(hidden, rows).contiguous(), head, y, logps, lse, upstream, needs, parameters, workspace_bytes,
            logits=kept if plan == "store" else None, first_column=shard.first, on_hidden=total.start,
        )  # fmt: skip
        return *_reduced(d_hidden, total, rows, hidden, parameters, bias), *(None,) * 8


def _reduced(
    d_hidden: Tensor | None, total: StartedSum, rows: Tensor, hidden: Tensor, parameters: ParameterGradients,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dH, dW, db) of a backward, once the ranks' parts of dH have been added up."""
    if d_hidden is not None:
        total.wait()
        d_hidden = scatter(d_hidden.to(hidden.dtype), rows, hidden.shape[0])
    d_bias = parameters.bias if bias is None or parameters.bias is None else parameters.bias.to(bias.dtype)
    return d_hidden, parameters.weight, d_bias


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> Tensor:
    """`fastpref.linear_token_logprobs` with the vocabulary sharded over a process group.

    Args:
        hidden: `[..., d]`, the same on every rank.
        weight: this rank's rows `[V / ranks, d]`, as many on each rank, in the order of the ranks; or a DTensor
            `[V, d]` placed as `Shard(0)`, which may be uneven.
        labels: `[...]`, indices into the whole vocabulary, the same on every rank.
        bias: `[V / ranks]` or None, or a DTensor placed like `weight`.
        group: the process group. By default all ranks, or a DTensor's own mesh.
        plan: `"store"` takes 1 product, and 2 for the gradients (1 if the head is frozen). It keeps `[n, V / ranks]`.
            `"recompute"` takes one more. `"no_grad"` takes 1. `"auto"` chooses.
        workspace_bytes, scored_rows: as in `fastpref.linear_token_logprobs`.

    Returns:
        `[...]` natural-log probabilities, the same on every rank, in fp32 (fp64 for fp64 inputs). Where upstream
        gradients are the same on every rank, the gradient of `hidden` is complete, and the same on every rank. Those of
        weight and bias are of this rank's rows.

    All ranks have to call this, and its backward, together.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, placement, plan or option.
        RuntimeError: torch.distributed is not initialised.
    """
    weight, shard, (hidden, labels, bias) = _localized(weight, group, (hidden, labels, bias))
    options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    checks.label_range(inputs.labels, shard.vocab, ignore_index)
    known = known_rows(inputs.labels, scored_rows, ignore_index)
    rows = inputs.labels.numel() if known.rows is None else known.rows
    chosen = _choose(plan, any(inputs.needs()), rows, inputs.weight, workspace_bytes)
    logps = _LogProbs.apply(
        inputs.hidden, inputs.weight, inputs.bias, inputs.compute_weight, inputs.labels, shard, options.transform,
        ignore_index, chosen, workspace_bytes, known.rows,
    )  # fmt: skip
    return logps.view(labels.shape)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, compute_weight, ref_hidden, ref_weight, ref_bias, labels, shard, transform,
        ignore_index, direction, workspace_bytes, scored_rows,
    ):  # fmt: skip
        rows = compact(labels, ignore_index, scored_rows)
        y = compact_labels(labels, rows, ignore_index, scored_rows)
        head, ref_head = _heads(weight, compute_weight, bias, ref_weight, ref_bias, transform)
        h, ref_h = gather(hidden, rows), gather(ref_hidden, rows)
        found = kl_plans.forward(h, head, ref_h, ref_head, None, direction, "no_grad", workspace_bytes)
        all_kl, all_lse, all_ref = shard.gather(torch.stack([found.kl, found.lse, found.ref_lse])).unbind(1)
        lse, ref_lse = all_lse.logsumexp(0), all_ref.logsumexp(0)
        # the chain rule: KL of the masses, and of the distributions inside of the parts
        log_mass, log_ref_mass = all_lse - lse, all_ref - ref_lse
        first, second = (log_mass, log_ref_mass) if direction == "reverse" else (log_ref_mass, log_mass)
        mass = first.exp()
        kl = torch.where(mass > 0, mass * (all_kl + first - second), 0).sum(0)
        if scored_rows is not None:  # an upper bound lets in ignored rows; labels of a bound too low are below 0
            kl = kl.masked_fill(y < 0, float("nan")).masked_fill(y == ignore_index, 0)
        ctx.save_for_backward(
            hidden, weight, bias, compute_weight, ref_hidden, ref_weight, ref_bias, y, rows, kl, lse, ref_lse
        )
        ctx.options = shard, transform, ignore_index, direction, workspace_bytes
        return scatter(kl, rows, hidden.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, compute_weight, ref_hidden, ref_weight, ref_bias, y, rows, *saved = ctx.saved_tensors
        shard, transform, ignore_index, direction, workspace_bytes = ctx.options
        needs = plans.Needs(*ctx.needs_input_grad[:3])
        head, ref_head = _heads(weight, compute_weight, bias, ref_weight, ref_bias, transform)
        parameters, total = ParameterGradients(head, needs, weight.dtype), StartedSum(shard.group)
        coefs = upstream_of(grad, rows, y, ignore_index)
        d_hidden = kl_plans.backward_recompute(
            gather(hidden, rows).contiguous(), head, gather(ref_hidden, rows), ref_head, *saved, coefs, direction,
            needs, parameters, workspace_bytes, on_hidden=total.start,
        )  # fmt: skip
        return *_reduced(d_hidden, total, rows, hidden, parameters, bias), *(None,) * 12


def _heads(weight, compute_weight, bias, ref_weight, ref_bias, transform) -> tuple[plans.Head, plans.Head]:
    return (
        head_of(weight, compute_weight, bias, EVERY_ROW, *transform),
        head_of(ref_weight, None, ref_bias, EVERY_ROW, *transform),
    )


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    group: Any = None,
    direction: str = "reverse",
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> Tensor:
    """The `kl` of `fastpref.linear_token_kl`, `[...]` in nats, with the vocabulary sharded over a process group.

    Both heads are sharded alike. Arguments, results and errors are as in this module's `linear_token_logprobs`.
    `labels` only say which rows count. There are 2 products over the scored rows, and 4 more for the gradients (3 if
    the head is frozen).
    """
    checks.choice("direction", direction, KL_DIRECTIONS)
    weight, shard, others = _localized(weight, group, (hidden, ref_hidden, ref_weight, labels, bias, ref_bias))
    hidden, ref_hidden, ref_weight, labels, bias, ref_bias = others
    if labels is None:
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        ignore_index, scored_rows = -100, labels.numel()
    options = HeadOptions(ignore_index, temperature, logit_scale, softcap, "auto", workspace_bytes, scored_rows)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    ref = reference_inputs(hidden, weight, ref_hidden, ref_weight, ref_bias)
    kl = _KL.apply(
        inputs.hidden, inputs.weight, inputs.bias, inputs.compute_weight, *ref, inputs.labels, shard, options.transform,
        ignore_index, direction, workspace_bytes, known_rows(inputs.labels, scored_rows, ignore_index).rows,
    )  # fmt: skip
    return kl.view(labels.shape)
