"""What a row of the table of cases is, and the rows of the log-prob operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

import fastpref
from fastpref.plans import plans
from fastpref.plans.head import tile_rows
from fastpref.reference import LogitTransform, TokenStatistics
from fastpref.validate import inputs
from fastpref.validate.ideal import Exact, Partition
from fastpref.validate.inputs import FAMILIES, IGNORE, Draw, Inputs

Results = dict[str, Tensor]
EVERYTHING = frozenset(("*",))


class Operator(NamedTuple):
    """A row of the table. `fused` and `formula` return the same results by name.

    Results that can be differentiated are, with respect to the inputs `wrt`. The upstream gradient is arbitrary, and 1
    for a loss.
    """

    name: str
    make: Callable[[Draw], Inputs]
    fused: Callable[[Inputs], Results]  # through fastpref
    formula: Callable[[Exact, Inputs], Results]  # fp64: under `Exact` the truth, under `Ideal` the ideal
    wrt: tuple[str, ...]
    families: tuple[str, ...] = tuple(FAMILIES)
    always_exact: frozenset[str] = frozenset()  # results that are bitwise right whatever the inputs
    exact: frozenset[str] = EVERYTHING  # results, and gradients "d_<input>", bitwise right on integers
    half: bool = True  # False: half-precision inputs are only cast up
    large: bool = False  # runs at the largest vocabularies too
    group: str = ""  # one line of the short table; its own if empty
    composed: bool = False  # made of operators that have their own rows: one dtype and family do where time is short


def token_logprobs() -> Operator:
    return Operator(
        "token_logprobs",
        inputs.logits,
        lambda x: {"logps": fastpref.token_logprobs(x.logits, x.labels, **x.transform)},
        lambda spec, x: {"logps": spec.token_logprobs(x.logits, x.labels, **x.transform)},
        ("logits",),
        large=True,
    )


def token_statistics() -> Operator:
    def results(found: TokenStatistics) -> Results:
        return {name: value for name, value in found._asdict().items() if value is not None}

    def constants(found: Results) -> Results:
        """Detaches what fastpref does not differentiate: all but log-probs and entropy."""
        return {name: value if name in ("logps", "entropy") else value.detach() for name, value in found.items()}

    return Operator(
        "token_statistics",
        inputs.logits,
        lambda x: results(fastpref.token_statistics(x.logits, x.labels, **x.transform)),
        lambda spec, x: constants(results(spec.token_statistics(x.logits, x.labels, **x.transform))),
        ("logits",),
        always_exact=frozenset(("is_top1",)),
    )


def hidden_logps(spec: Exact, x: Inputs, pieces: Partition) -> Tensor:
    return spec.linear_token_logprobs(x.hidden, x.weight, x.labels, x.floats.get("bias"), pieces, **x.transform)


def slice_width(x: Inputs, workspace_bytes: int | None) -> int:
    """Columns in a slice of plan `recompute`, as `fastpref.plans.plans.backward_recompute` cuts them."""
    vocab, scored = x.weight.shape[0], int((x.labels != IGNORE).sum())
    head = plans.Head(x.weight, None, LogitTransform(), IGNORE)
    width = tile_rows(head, scored, workspace_bytes) * vocab // max(1, scored)
    return min(vocab, max(128, width // 128 * 128))


def linear_token_logprobs(plan: str, wrt: tuple[str, ...]) -> Operator:
    def a_third(x: Inputs) -> int:
        """Room for a third of the logits, which makes several tiles of rows and slices of the vocabulary."""
        return max(1, x.labels.numel() // 3) * x.weight.shape[0] * x.weight.element_size()

    def fused(x: Inputs) -> Results:
        return {
            "logps": fastpref.linear_token_logprobs(
                labels=x.labels, plan=plan, workspace_bytes=a_third(x), **x.floats, **x.transform
            )
        }

    def formula(spec: Exact, x: Inputs) -> Results:
        width = slice_width(x, a_third(x)) if plan == "recompute" else None
        return {"logps": hidden_logps(spec, x, Partition(plan == "frozen", (), width))}

    return Operator(f"linear_token_logprobs {plan}", inputs.head, fused, formula, wrt, large=True)
