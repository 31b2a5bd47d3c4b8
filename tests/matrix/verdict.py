"""Whether a cell did what the table says, with what error."""

from __future__ import annotations

import math
from pathlib import Path

from tests.matrix import run
from tests.matrix.table import HOST, REFUSED, Cell, outcome

FP32 = (2e-6, 4e-6)  # of the loss and the gradients: twice what TRL's own are
SPREAD = 3.0  # of a cell's two updates: over many, see test_precision
MEAN = 1.1


def fault(cell: Cell, found: run.Found, folder: Path) -> str | None:
    wanted = outcome(cell)
    if found.errors is None:
        return None if wanted.what == REFUSED and wanted.text in found.error else f"raised {found.error[:400]}"
    if wanted.what == REFUSED:
        return f"ran, where the table says: {wanted.text}"
    fallback = [text for text in found.errors.said if "as TRL does" in text or "as without fastpref" in text]
    if bool(fallback) != (wanted.what == HOST) or not all(wanted.text in text for text in fallback):
        return f"said {fallback}"
    if wanted.what == HOST:
        return None  # its numbers are its own
    if is_tight(cell):
        limits = FP32
    else:
        own = run.own_errors(cell, folder)
        limits = (math.inf, SPREAD * own.gradients)  # a loss may be right by chance
    within = all(error <= limit for error, limit in zip(found.errors[:2], limits, strict=True))
    return None if within else f"errors {found.errors[:2]}, want at most {limits}"


def is_tight(cell: Cell) -> bool:
    if cell.precision != "fp32":
        return False
    if cell.trains != "qlora" or cell.reference == "none" or cell.host == "mixin":
        return True
    if cell.host == "loop":  # its reference is a quantised copy in evaluation, unless it has another
        return cell.reference == "explicit" or not quantised_evaluation_in_bf16()
    return False  # adapters in bf16, as TRL's DPO


def quantised_evaluation_in_bf16() -> bool:
    """Whether bitsandbytes computes in bf16 what asks for no gradient, here: on CPUs that have AVX512-BF16."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def ratio(cell: Cell, found: run.Found, folder: Path) -> float | None:
    """Of the gradients' error to the host's own, in half precision."""
    if found.errors is None or outcome(cell).what == HOST or is_tight(cell):
        return None
    return found.errors.gradients / run.own_errors(cell, folder).gradients


def mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
