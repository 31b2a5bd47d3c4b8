"""`fastpref pairs`: preference data from scores or rankings, with a report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.common.files import check_writable
from fastpref.data.judgements import COMBINE
from fastpref.online.command import at_least, command
from fastpref.online.mixing import mix_pairs
from fastpref.online.pairing import HOW, LIST, PairRules, make_pairs
from fastpref.online.prompts import load_pairs
from fastpref.online.records import Record, read_records, write_json, write_records
from fastpref.online.text import interval, number, quantiles_text, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, PairRules()
    add("--scores", required=True, metavar="IN.jsonl", help="records with prompt, responses, and scores or ranks")
    add("--output", required=True, metavar="OUT.jsonl", help="pairs as TRL and `fastpref train` read them")
    add("--how", choices=(*HOW, LIST), default=default.how,
        help="which responses to pair; list: all of them with their ranks (default: %(default)s)")  # fmt: skip
    add("--min-margin", type=at_least(float, 0), default=default.min_margin, help="(default: %(default)s)")
    add("--max-pairs-per-prompt", type=at_least(int, 1), metavar="N", help="the N with the largest margins")
    add("--min-agreement", type=at_least(float, 0), default=default.min_agreement, metavar="SHARE",
        help="of several judges, how many must prefer the chosen one; 1 is all (default: %(default)s)")  # fmt: skip
    add("--combine", choices=COMBINE, default=default.combine, help="several judges' scores (default: %(default)s)")
    add("--only-finished", action="store_true", help="leave out responses that were cut at their maximal length")
    add("--weight", type=at_least(float, 0), metavar="W", help="of each pair that is made (default: no weights; 1 with "
        "--mix)")  # fmt: skip
    add("--mix", action="append", default=[], type=_weighted_file, metavar="FILE[=W]", help="put these pairs beside, "
        "with weight W (default: 1): in any format that `fastpref train` reads. May be given again")  # fmt: skip
    add("--json", metavar="FILE", help="the report")


def _weighted_file(text: str) -> tuple[str, float]:
    path, equals, weight = text.rpartition("=")
    return (path, at_least(float, 0)(weight)) if equals else (text, 1.0)


@command("pairs")
def run(args: argparse.Namespace) -> int:
    names = ("how", "min_margin", "max_pairs_per_prompt", "min_agreement", "combine", "only_finished")
    rules = PairRules(**{name: getattr(args, name) for name in names})
    for option in ("output", "json"):
        check_writable(f"--{option}", getattr(args, option))
    report = pairs_file(
        read_records(args.scores), args.output, rules, json_path=args.json, weight=args.weight, mix=dict(args.mix)
    )
    made = "lists" if rules.how == LIST else "pairs"
    print("\n".join(report_lines(report, made)))
    if not report["pairs"]:
        raise ValueError(f"{args.scores}: got no {made} that pass, so {args.output} was not written")
    return 0


def pairs_file(
    records: Sequence[Record], output: str | os.PathLike[str], rules: PairRules | None = None,
    *, json_path: str | os.PathLike[str] | None = None, weight: float | None = None,
    mix: Mapping[str, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes the pairs, if there are any, and the report of `make_pairs` as JSON. Returns the report.

    With a `weight`, or files to `mix` in, by name with their weights, all pairs have a `weight` (see
    `fastpref.online.mixing.mix_pairs`). The report then says of each source how many pairs and which weight it has.
    """
    if rules is not None and rules.how == LIST and (mix or weight is not None):
        raise ValueError("weight, mix: got one of them with how 'list', want it with pairs")
    pairs, report = make_pairs(records, rules)
    if pairs and (mix or weight is not None):
        sources = {"scores": (pairs, 1.0 if weight is None else weight)}
        sources |= {path: (load_pairs(path), of_file) for path, of_file in (mix or {}).items()}
        pairs, left_out = mix_pairs(sources)
        found = {name: {"pairs": len(some), "weight": of_source} for name, (some, of_source) in sources.items()}
        report |= {"mixed": found, "columns_left_out": left_out}
    if pairs:
        write_records(output, pairs)
    if json_path is not None:
        write_json(json_path, report)
    return report


def report_lines(report: Mapping[str, Any], made: str = "pairs") -> list[str]:
    """The report as lines for a terminal. `made` is the name of what was written."""
    length, margins = report["length"], report["margins"]
    rows = [
        ("prompts", f"{report['prompts']}, {report['prompts_with_pairs']} of them with {made}"),
        ("responses", f"{report['responses']}"),
        (made, f"{report['pairs']}"),
        *((f"  dropped: {reason}", f"{count}") for reason, count in report["dropped"].items()),
    ]
    if report["pairs"]:
        rows += [("margin", f"mean {margins['mean']:.3f};  {quantiles_text(margins['quantiles'], '.3f')}")]
        if report["agreement"] is not None:
            rows += [("judges that agree", f"{report['agreement']:.1%}")]
        wins = length["longer_wins"]
        rows += [
            ("chosen is longer", f"{length['chosen_longer']:.1%}, by {length['mean_difference']:+.1f} characters"),
            ("'the longer wins' is right", "-" if wins["share"] is None else f"{wins['share']:.1%} {interval(wins)}"),
            ("correlation with length", f"of margins {number(length['margin_correlation'])}, "
             f"of scores within prompts {number(length['score_correlation'])}"),
        ]  # fmt: skip
    for name, source in report.get("mixed", {}).items():
        rows.append((f"weight {source['weight']:g}", f"{source['pairs']} pairs of {name}"))
    if report.get("columns_left_out"):
        rows.append(("columns that not all pairs have", f"left out: {', '.join(report['columns_left_out'])}"))
    return table(rows)
