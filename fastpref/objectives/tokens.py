"""Log-probs of tokens and of sequences, from logits or from hidden states: what every loss here is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref import backends, ops
from fastpref.common import checks
from fastpref.common.segments import segment_sums, sum_dtype
from fastpref.objectives.head_inputs import (
    HeadInputs,
    HeadOptions,
    Layout,
    PlanChoice,
    ScoredRows,
    choose_plan,
    head_inputs,
    operator_options,
)
from fastpref.reference import STATISTICS, TokenStatistics


def rows_of_logits(logits: Tensor) -> Tensor:
    """`[..., V]` as `[N, V]` or `[B, T, V]` with unit column stride; `logits[:, :-1]` passes without a copy."""
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits if logits.ndim in (2, 3) else logits.reshape(-1, logits.shape[-1])


def _token_op(logits: Tensor, labels: Tensor, ignore_index, temperature, logit_scale, softcap, statistics):
    checks.tensor("logits", logits, dtypes=checks.FLOATS)
    checks.tensor("labels", labels, dtypes=checks.INTEGERS)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, want [..., V] with V >= 1")
    checks.shape("labels", labels, logits.shape[:-1], "one label per row of logits")
    checks.same_device("labels", labels, "logits", logits)
    checks.transform(temperature, logit_scale, softcap)
    return torch.ops.fastpref.token_logprobs(
        rows_of_logits(logits), labels.reshape(-1), ignore_index, float(temperature), float(logit_scale),
        None if softcap is None else float(softcap), ",".join(statistics),
    )  # fmt: skip


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """`log softmax(softcap * tanh(logits * logit_scale / softcap) / temperature)[label]` of every row.

    Args:
        logits: `[..., V]`, any float dtype. Strided views such as `logits[:, :-1]` or `logits[..., :V]` of a
            padded vocabulary are read in place.
        labels: `[...]` int32 or int64, the token that each row scores (already shifted).
        ignore_index: rows with this label give exactly 0 and get exactly 0 gradient.
        temperature, logit_scale, softcap: as in the formula, > 0. Without a cap `softcap` is None.

    Returns:
        `[...]` natural-log probabilities, fp32 (fp64 for fp64 logits), differentiable once in `logits`.
        The logits are read once. The backward reads them once more and writes the gradient. Nothing of size
        `[N, V]` is kept beyond the logits themselves.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option, or (on a CPU, or with `FASTPREF_DEBUG=1`) a
            label out of range. Elsewhere such a label makes its own log-prob NaN.
    """
    logps, *_ = _token_op(logits, labels, ignore_index, temperature, logit_scale, softcap, ())
    return logps.view(labels.shape)


def token_statistics(
    logits: Tensor,
    labels: Tensor,
    statistics: tuple[str, ...] = STATISTICS,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStatistics:
    """`token_logprobs` and statistics of each row, from one sweep over the logits.

    Args:
        statistics: any of `"entropy"` (nats; differentiable, like the log-probs), `"mean_logit"`, `"is_top1"` (is the
            label the argmax? the first index wins a tie) and `"log_sum_sq"` (log sum_v p_v^2, for WPO's weight, arXiv
            2406.11827).

    The other arguments, dtypes and errors are as in `token_logprobs`. Fields that were not asked for are None. The
    others are shaped like `labels`.
    """
    for name in statistics:
        checks.choice("statistics", name, STATISTICS)
    logps, _, *values = _token_op(logits, labels, ignore_index, temperature, logit_scale, softcap, statistics)
    found = {
        name: value.view(labels.shape) for name, value in zip(STATISTICS, values, strict=True) if name in statistics
    }
    return TokenStatistics(logps.view(labels.shape), **found)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, labels)` without the logits in memory.

    Args:
        hidden: `[..., d]`, any float dtype.
        weight: `[V, d]`, of the dtype of `hidden`. Under `torch.autocast` dtypes may differ: all are cast as for
            `F.linear`.
        bias: `[V]` or None, like `weight`.
        labels: `[...]` int32 or int64, already shifted.
        ignore_index: rows with this label never enter a matrix product, give exactly 0 and get exactly 0 gradient.
        temperature, logit_scale, softcap: as in `token_logprobs`.
        plan: `"auto"`, `"no_grad"`, `"frozen"`, `"store"` or `"recompute"`. The last four take 1, 2, 3 and 4 matrix
            products of `2 N d V` FLOPs, N the scored rows (see `fastpref.plans.plans`).
        workspace_bytes: memory for what a plan keeps. By default a quarter of what is free.
        scored_rows: at most how many labels are not `ignore_index`, if the host knows. By default an accelerator is
            asked, once. With this number nothing waits, and a CUDA graph can capture the call (with `plan` `"frozen"`,
            `"store"` or `"recompute"`). The hidden states of ignored rows must then be finite. Too low a number is a
            `ValueError` on a CPU, and makes the results NaN on an accelerator.

    Returns:
        `[...]` natural-log probabilities, fp32 (fp64 for fp64 inputs), differentiable once in `hidden`,
        `weight` and `bias` with any upstream gradient. Results from half precision are more accurate than those of
        logits in half precision: the label's logit is recomputed in fp32, inside the log-sum-exp too.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, plan or option, or a label out of range (see
            `token_logprobs`).
    """
    options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    return statistics_by(choose_plan(inputs, options), inputs, options, labels.shape, ()).logps


def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    statistics: tuple[str, ...] = STATISTICS,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> TokenStatistics:
    """`linear_token_logprobs` and the `statistics` of `token_statistics` from one sweep. Arguments as in those.

    The log-probs and the entropy are differentiable, the other statistics are constants. An entropy that is only
    looked at costs no product. Its gradient costs none with a trainable head either. With a frozen head it costs two
    more (one with `plan="recompute"`).
    """
    for name in statistics:
        checks.choice("statistics", name, STATISTICS)
    options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    return statistics_by(choose_plan(inputs, options), inputs, options, labels.shape, statistics)


def statistics_by(
    choice: PlanChoice, inputs: HeadInputs, options: HeadOptions, shape: torch.Size, statistics: tuple[str, ...]
) -> TokenStatistics:
    """Log-probs and statistics by a chosen plan from checked inputs. Results have the `shape` of the labels."""
    logps, _, _, _, values = torch.ops.fastpref.linear_token_logprobs(
        *inputs.head, *operator_options(options), choice.plan, choice.workspace_bytes, ",".join(statistics),
        inputs.compute_weight, choice.known.rows,
    )  # fmt: skip
    found = {name: value.view(shape) for name, value in zip(statistics, values, strict=True)}
    found = {name: value if name == "entropy" else value.detach() for name, value in found.items()}
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"].bool()
    return TokenStatistics(logps.view(shape), **found)


def sequence_logprobs(
    token_logps: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    average: bool = False,
) -> Tensor:
    """Each sequence's summed log-prob, or with `average` the mean over its scored tokens.

    Args:
        token_logps: `[S, T]`, or packed `[N]` with `cu_seqlens`.
        labels: of the same shape. Tokens labelled `ignore_index` do not count.
        cu_seqlens: `[S + 1]` int32 or int64, the sequences' offsets among packed rows.

    Returns:
        `[S]` in the dtype of `token_logps`, differentiable, added up in fp64 where the device has it. A sequence
        without scored tokens gives 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype or device, or (on a CPU, or with `FASTPREF_DEBUG=1`) offsets that
            do not ascend from 0 to N.
    """
    checks.tensor("token_logps", token_logps, dtypes=checks.FLOATS)
    checks.tensor("labels", labels, dtypes=checks.INTEGERS)
    checks.shape("labels", labels, token_logps.shape, "the shape of token_logps")
    checks.same_device("labels", labels, "token_logps", token_logps)
    scored = labels != ignore_index
    values = token_logps.masked_fill(~scored, 0)
    if cu_seqlens is None:
        if token_logps.ndim != 2:
            raise ValueError(f"token_logps: got shape {tuple(token_logps.shape)} without cu_seqlens, want [S, T]")
        sums, counts = values.sum(1, dtype=sum_dtype(values)), scored.sum(1)
    else:
        checks.tensor("cu_seqlens", cu_seqlens, dtypes=checks.INTEGERS, ndim=(1,))
        checks.same_device("cu_seqlens", cu_seqlens, "labels", labels)
        if token_logps.ndim != 1:
            raise ValueError(f"token_logps: got shape {tuple(token_logps.shape)} with cu_seqlens, want [N]")
        checks.packed_edges(cu_seqlens, token_logps.numel())
        sizes = cu_seqlens.diff().long()
        sums, counts = segment_sums(values, sizes), segment_sums(scored.to(values.dtype), sizes)
    return (sums / counts.clamp(min=1) if average else sums).to(token_logps.dtype)


def explain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    paired: bool = False,
) -> str:
    """Say in words which backend and which plan these inputs get, and why.

    Args:
        hidden, weight, labels, bias, plan, workspace_bytes: as in `linear_token_logprobs`.
        paired: explain a loss's `from_hidden` instead of `linear_token_logprobs`.
    """
    options = HeadOptions(plan=plan, workspace_bytes=workspace_bytes)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    backend = backends.choose(hidden.device)
    choice = choose_plan(inputs, options, Layout(None, 1) if paired else None)
    return f"backend {backend.name}: {backend.reason}; plan {choice.plan}: {choice.reason}"


# `ops` registers the operators that torch.ops.fastpref finds.
_ = ops
