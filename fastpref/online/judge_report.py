"""What a judge's answers say about the judge: position bias, agreement, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastpref.online import statistics
from fastpref.online.agreement import agreement_report, krippendorff_alpha
from fastpref.online.answer_log import Key
from fastpref.online.answers import Answer
from fastpref.online.records import read_records
from fastpref.online.text import number, quantiles_text, share_text, table
from fastpref.online.verdicts import Judging

EXAMPLES = 3  # of answers without a verdict


def report(
    output: str | os.PathLike[str], asked: Sequence[Sequence[tuple[int, ...]]],
    answers: Mapping[Key, tuple[Answer, float | None]], how: Judging, human: str,
) -> dict[str, Any]:  # fmt: skip
    """The report of a judge's file.

    Args:
        output: the file, complete.
        asked: the questions of each record.
        answers: of each (record, question), with its verdict or None.
        how: what was asked.
        human: the name of people's scores.

    Returns:
        JSON values. `unparsable`: how many answers were no verdict, how many of them were cut, and the ends of some.
            `position` (pairs): `first`, how often the response that stands first wins, of verdicts that are no tie (0.5
            if the order says nothing, as each pair is asked in both), and how the verdicts of the two orders compare.
            `grades`: their mean and quantiles. `samples`: Krippendorff's alpha of the samples of one question.
            `agreement` (see `agreement_report`). `tokens`: of prompts and answers; and `unknown`, of how many answers
            the server did not say them.
    """
    records = read_records(output)
    given = [pair for _, pair in sorted(answers.items())]
    bad = [answer for answer, verdict in given if verdict is None]
    table = _table(asked, answers, how)
    unscored = sum(s is None for r in records for s in _last(r["scores"]))
    return {
        "how": how.how,
        "prompts": len(records),
        "responses": sum(len(r["responses"]) for r in records),
        "responses_without_a_score": unscored,
        "answers": len(given),
        "unparsable": {
            "count": len(bad),
            "cut": sum(not answer.finished for answer in bad),
            "examples": [answer.text[-200:] for answer in bad[:EXAMPLES]],
        },
        "position": _position(table) if how.how == "pairs" else None,
        "grades": _grades(table) if how.how == "grades" else None,
        "samples": krippendorff_alpha(
            table.reshape(-1, how.samples).T, "ordinal" if how.how == "pairs" else "interval"
        ),
        "agreement": agreement_report(records, human),
        "tokens": {
            "prompts": sum(answer.prompt_tokens or 0 for answer, _ in given),
            "answers": sum(answer.tokens or 0 for answer, _ in given),
            "unknown": sum(answer.prompt_tokens is None or answer.tokens is None for answer, _ in given),
        },
    }


def _last(scores: Any) -> Sequence[float | None]:
    """This judge's scores: the ones that were added last."""
    return list(scores.values())[-1] if isinstance(scores, Mapping) else scores


def _table(
    asked: Sequence[Sequence[tuple[int, ...]]], answers: Mapping[Key, tuple[Answer, float | None]], how: Judging
) -> np.ndarray:
    """Verdicts, NaN where there is none: `[pairs, 2 orders, samples]` or `[responses, 1, samples]`."""
    flat = [answers[i, j][1] if (i, j) in answers else None for i, some in enumerate(asked) for j in range(len(some))]
    values = np.array([np.nan if v is None else v for v in flat], dtype=np.float64)
    return values.reshape(-1, 2 if how.how == "pairs" else 1, how.samples)


def _position(table: np.ndarray) -> dict[str, Any]:
    decided = table[~np.isnan(table) & (table != 0.5)]
    first, second = table[:, 0].ravel(), table[:, 1].ravel()
    both = ~np.isnan(first) & ~np.isnan(second)
    first, second = first[both], second[both]
    return {
        "first": statistics.share(decided == 1),
        "ties": statistics.share(table[~np.isnan(table)] == 0.5),
        "in_both_orders": int(both.sum()),
        "same": statistics.share(first == 1 - second),
        "first_in_both": int(((first == 1) & (second == 1)).sum()),
        "second_in_both": int(((first == 0) & (second == 0)).sum()),
        "tie_in_one": int(((first == 0.5) != (second == 0.5)).sum()),
    }


def _grades(table: np.ndarray) -> dict[str, Any]:
    found = table[~np.isnan(table)]
    return {"mean": statistics.mean(found), "quantiles": statistics.quantiles(found)}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    bad, tokens, position = found["unparsable"], found["tokens"], found["position"]
    none = found["responses_without_a_score"]
    rows = [
        (
            "prompts",
            f"{found['prompts']}, with {found['responses']} responses" + (f", {none} without a score" * (none > 0)),
        ),
        ("answers", f"{found['answers']}"),
        ("  without a verdict", f"{bad['count']}, {bad['cut']} of them cut"),
        *(("", repr(text[-60:])) for text in bad["examples"]),
    ]
    if position:
        same, first = position["same"], position["first"]
        rows += [
            ("the first wins", share_text(first) + ", without ties"),
            ("ties", share_text(position["ties"])),
            ("the same in both orders", share_text(same)),
            ("  the first in both", f"{position['first_in_both']}"),
            ("  the second in both", f"{position['second_in_both']}"),
            ("  a tie in one", f"{position['tie_in_one']}"),
        ]
    if found["grades"] and found["grades"]["quantiles"]:
        quantiles = quantiles_text(found["grades"]["quantiles"], "g")
        rows.append(("grades", f"mean {found['grades']['mean']:.2f};  {quantiles}"))
    if found["samples"] is not None:
        rows.append(("agreement of samples, alpha", number(found["samples"])))
    if found["agreement"]:
        rows += _agreement_rows(found["agreement"])
    unknown = f", unknown of {tokens['unknown']} answers" if tokens["unknown"] else ""
    rows.append(("tokens", f"{tokens['prompts']:,} of prompts, {tokens['answers']:,} of answers{unknown}"))
    return table(rows)


def _agreement_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (f"{' and '.join(two['judges'])} agree", f"{share_text(two['agree'])}, kappa {number(two['cohen_kappa'])}")
        for two in found["pairs"]
    ]
    rows.append(("all judges", f"alpha {number(found['krippendorff_alpha'])}, Fleiss' kappa "
                 f"{number(found['fleiss_kappa'])} of {found['items_of_all']} items"))  # fmt: skip
    for name, beside in (found["human"] or {}).items():
        rows.append(
            (f"{name} is right, by people", f"{share_text(beside['right'])}, kappa {number(beside['cohen_kappa'])}")
        )
    return rows
