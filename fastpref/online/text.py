"""Figures as text, for reports on a terminal. None, of what is not defined, is a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of names and what is said of them."""
    return [f"{name:36} {text}" for name, text in rows]


def number(value: float | None, form: str = "+.2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def interval(share: Mapping[str, Any]) -> str:
    low, high = share["interval"]
    return f"[{low:.1%}, {high:.1%}]"


def share_text(share: Mapping[str, Any], none: str = "-") -> str:
    """With its interval and of how many, or `none` of none."""
    return none if share["share"] is None else f"{share['share']:.1%} {interval(share)} of {share['count']}"


def quantiles_text(quantiles: Mapping[str, float], form: str) -> str:
    """Of `statistics.quantiles`."""
    return "  ".join(f"{100 * float(q):g} %: {value:{form}}" for q, value in quantiles.items())
