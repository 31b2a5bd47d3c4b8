"""What every entry point from hidden states shares: its options, its checked inputs, and the choice of a plan.

`choose_plan` says which of the plans in `fastpref.plans.plans` runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.common import checks, memory
from fastpref.common.precision import wide
from fastpref.plans import plans
from fastpref.plans.units import sequence_offsets
from fastpref.reference import LogitTransform

ScoredRows = int | Sequence[int] | None


class HeadOptions(NamedTuple):
    """The options of the entry points, as described in `fastpref.linear_token_logprobs`.

    `scored_rows` is what the host knows of how many labels are scored. It is an upper bound for the whole batch, or the
    exact number of each sequence. With it no operator asks the device.
    """

    ignore_index: int = -100
    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    plan: str = "auto"
    workspace_bytes: int | None = None
    scored_rows: ScoredRows = None

    @property
    def transform(self) -> tuple[float, float, float | None]:
        """(temperature, logit_scale, softcap) as the operators take them."""
        return as_floats(LogitTransform(self.temperature, self.logit_scale, self.softcap))


def as_floats(transform: LogitTransform) -> tuple[float, float, float | None]:
    """(temperature, logit_scale, softcap) as floats, or None."""
    temperature, logit_scale, softcap = transform
    return float(temperature), float(logit_scale), None if softcap is None else float(softcap)


class HeadInputs(NamedTuple):
    """Checked and flattened inputs of the operators from hidden states. Under autocast `hidden` is cast already."""

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d], as given: its gradient is of its own dtype
    labels: Tensor  # [N]
    bias: Tensor | None  # [V]
    compute_weight: Tensor | None  # the weight, a constant, in the dtype of hidden where its own is another

    def needs(self) -> plans.Needs:
        """Which of hidden, weight and bias need a gradient."""
        on = torch.is_grad_enabled()
        bias = self.bias is not None and self.bias.requires_grad
        return plans.Needs(on and self.hidden.requires_grad, on and self.weight.requires_grad, on and bias)

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments that every operator begins with."""
        return self.hidden, self.weight, self.labels, self.bias

    @property
    def result_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 inputs."""
        return wide(self.hidden.dtype)


def head_inputs(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: HeadOptions
) -> HeadInputs:
    """Check `[..., d]` hidden states, the head `[V, d]` and labels `[...]`, cast them as autocast would, and flatten.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or number.
    """
    checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
    checks.tensor("weight", weight, dtypes=checks.FLOATS, ndim=(2,))
    checks.tensor("labels", labels, dtypes=checks.INTEGERS)
    if hidden.ndim < 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, want [..., {weight.shape[1]}] to match weight "
            f"{tuple(weight.shape)}"
        )
    checks.shape("labels", labels, hidden.shape[:-1], "one label per row of hidden")
    checks.same_device("weight", weight, "hidden", hidden)
    checks.same_device("labels", labels, "hidden", hidden)
    if bias is not None:
        checks.tensor("bias", bias, dtypes=checks.FLOATS)
        checks.shape("bias", bias, weight.shape[:1], "[V]")
        checks.same_device("bias", bias, "hidden", hidden)
    checks.transform(options.temperature, options.logit_scale, options.softcap)
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    else:
        checks.same_dtype("weight", weight, "hidden", hidden)
        if bias is not None:
            checks.same_dtype("bias", bias, "hidden", hidden)
    cast = None if weight.dtype == hidden.dtype else weight.detach().to(hidden.dtype)
    if cast is not None and not (torch.is_grad_enabled() and weight.requires_grad):
        weight, cast = cast, None
    return HeadInputs(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias, cast)


class Known(NamedTuple):
    """What the host knows of the scored rows. None: nothing."""

    rows: int | None = None  # at most so many in all
    edges: list[int] | None = None  # where those of each sequence begin among all of them, and the end


def known_rows(labels: Tensor, given: ScoredRows, ignore_index: int, sequences: int | None = None) -> Known:
    """What the argument `scored_rows` (`given`) says. `sequences` is how many there are, where a loss needs them.

    Raises:
        ValueError, TypeError: it is no such number or list. Too low a number is found where that costs no host sync.
    """
    if given is None:
        return Known()
    if isinstance(given, (bool, str)) or not isinstance(given, (int, Sequence, torch.SymInt)):
        raise TypeError(f"scored_rows: got {type(given).__name__}, want an int, or a list of one for each sequence")
    edges = [0, *itertools.accumulate(int(n) for n in given)] if isinstance(given, Sequence) else None
    if edges is not None and sequences is not None and len(edges) != sequences + 1:
        raise ValueError(f"scored_rows: got {len(edges) - 1} counts, want one for each of {sequences} sequences")
    rows = edges[-1] if edges is not None else given
    assert not isinstance(rows, Sequence)
    if not 0 <= rows <= labels.numel() or (edges is not None and edges != sorted(edges)):
        raise ValueError(f"scored_rows: got {given}, want at most the {labels.numel()} labels, and none below 0")
    if not torch.compiler.is_compiling() and checks.free_to_read(labels):
        scored = int((labels != ignore_index).sum())
        if scored > rows:
            raise ValueError(f"scored_rows: got {rows}, want at least {scored}, the labels that are not {ignore_index}")
    return Known(rows, edges if sequences is not None else None)


class Layout(NamedTuple):
    """How the rows are divided into sequences, for losses that are finished unit by unit (plan `pair`)."""

    cu_seqlens: Tensor | None
    sequences: int


class PlanChoice(NamedTuple):
    """A plan's name, in words why it was chosen, and what the host has found out on the way."""

    plan: str
    reason: str
    known: Known = Known()
    workspace_bytes: int | None = None  # what an operator is told: it need not ask again


def choose_plan(inputs: HeadInputs, options: HeadOptions, layout: Layout | None = None) -> PlanChoice:
    """The plan that runs, and why.

    With a `layout` the objective is known, so whole units can be finished in the forward (plan `pair`). How many rows
    are scored is asked of the device at most once, and only where the choice depends on it.

    Raises:
        ValueError: the plan that was asked for does not exist, or cannot give the gradients that are needed.
    """
    plan, workspace_bytes = options.plan, options.workspace_bytes
    checks.choice("plan", plan, ("auto", *plans.PLANS))
    if workspace_bytes is not None:
        checks.positive("workspace_bytes", workspace_bytes)
    needs = inputs.needs()
    if plan == "pair" and layout is None:
        raise ValueError("plan: got 'pair', want another one here, or call an objective's from_hidden")
    if plan == "no_grad" and any(needs):
        raise ValueError("plan: got 'no_grad' while a gradient is needed, want 'auto' or call under torch.no_grad()")
    if plan == "frozen" and (needs.weight or needs.bias):
        raise ValueError("plan: got 'frozen' while weight or bias requires a gradient, want 'store' or 'recompute'")
    sequences = None if layout is None else layout.sequences
    known = known_rows(inputs.labels, options.scored_rows, options.ignore_index, sequences)

    def choice(plan: str, reason: str, limit: int | None = workspace_bytes) -> PlanChoice:
        return PlanChoice(plan, reason, known, limit)

    if plan != "auto":
        return choice(plan, "asked for")
    if not any(needs):
        return choice("no_grad", "nothing requires a gradient")
    if not (needs.weight or needs.bias):
        return choice("frozen", "the head is frozen")
    if torch.compiler.is_compiling():  # sizes must not become guards
        return choice("pair" if layout else "recompute", "under torch.compile, whatever the length")
    if known.rows is None:
        known = _asked(inputs.labels, options.ignore_index, layout)
    assert known.rows is not None
    size = known.rows * inputs.weight.shape[0] * inputs.hidden.element_size()
    limits = memory.workspace(inputs.weight.device, workspace_bytes)
    limit = limits.preferred if layout else limits.most
    fits = f"U of {known.rows} rows takes {size / 2**20:.0f} MiB, the workspace is {limit / 2**20:.0f} MiB"
    if size <= limit:
        return choice("store", fits, limits.told(workspace_bytes))
    return choice("pair" if layout else "recompute", fits, limits.told(workspace_bytes))


def _asked(labels: Tensor, ignore_index: int, layout: Layout | None) -> Known:
    """How many rows are scored, asked of the device: one host sync on an accelerator."""
    if layout is None:
        return Known(int((labels != ignore_index).sum()))
    edges = sequence_offsets(labels, layout.cu_seqlens, layout.sequences, ignore_index).tolist()
    return Known(edges[-1], edges)


def operator_options(options: HeadOptions) -> tuple[Any, ...]:
    """`ignore_index` and the transform, as every operator from hidden states takes them."""
    return options.ignore_index, *options.transform
