"""Makes preference pairs from scored or ranked responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from fastpref.common import checks
from fastpref.data.judgements import COMBINE, judged_scores, ranks_of
from fastpref.online import statistics
from fastpref.online.prompts import checked_prompt, checked_responses
from fastpref.online.records import Record

MADE_HERE = (
    "prompt",
    "responses",
    "response_tokens",
    "response_ids",
    "finished",
    "scores",
    "ranks",
    "chosen",
    "rejected",
)


@dataclass(frozen=True)
class PairRules:
    """Which responses to a prompt become a pair.

    Args:
        how: `"best-worst"`, one pair a prompt; `"best-rest"`, the best one against each other; `"all"`; or `"list"`,
            all responses with their ranks, in one record.
        min_margin: the least difference of scores. Equal scores are never a pair. In a list, scores closer than that
            to the best one of a rank share the rank.
        max_pairs_per_prompt: how many pairs of a prompt are kept: those with the largest margins.
        min_agreement: with several judges, the least share of them that prefers the chosen one.
        combine: how several judges' scores become one. `"mean"` is for scores on one scale. `"rank"` is the mean over
            judges of the share of the other responses that a response beats (Borda; a tie is half a win).
        only_finished: leave out responses that were cut at their maximal length.
    """

    how: str = "best-worst"
    min_margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    min_agreement: float = 0.0
    combine: str = "mean"
    only_finished: bool = False

    def __post_init__(self) -> None:
        checks.choice("how", self.how, (*HOW, LIST))
        checks.choice("combine", self.combine, COMBINE)
        checks.within("min_margin", self.min_margin, 0, math.inf)
        checks.within("min_agreement", self.min_agreement, 0, 1, closed=True)
        if self.max_pairs_per_prompt is not None:
            checks.positive("max_pairs_per_prompt", self.max_pairs_per_prompt)
        if self.how == LIST and (self.max_pairs_per_prompt is not None or self.min_agreement):
            name = "min_agreement" if self.min_agreement else "max_pairs_per_prompt"
            raise ValueError(f"{name}: got {getattr(self, name)} with how 'list', want it with pairs")


class Candidate(NamedTuple):
    """A response that may be in a pair."""

    text: str
    judged: np.ndarray  # [judges], higher is better
    score: float  # all judges' in one
    ids: list[int] | None = None  # the sampled tokens


LIST = "list"
HOW: dict[str, Callable[[int], Sequence[tuple[int, int]]]] = {  # of k candidates, the best one first
    "best-worst": lambda k: [(0, k - 1)] if k > 1 else [],
    "best-rest": lambda k: [(0, i) for i in range(1, k)],
    "all": lambda k: list(combinations(range(k), 2)),
}


def make_pairs(records: Sequence[Record], rules: PairRules | None = None) -> tuple[list[Record], dict[str, Any]]:
    """Preference pairs, as TRL reads them, and a report of what was kept and why.

    A pair has `prompt`, `chosen`, `rejected` (messages; text, if the prompt is), `margin`, `chosen_score`,
    `rejected_score`, and the record's other fields. With several judges it has `agreement`; from `response_ids` it has
    `chosen_response_ids` and `rejected_response_ids`. TRL's reward trainer takes `margin` as the margin of its loss.

    With `how="list"` a record is a prompt's responses, at least two, with their `ranks` and `scores`, best first; see
    `fastpref.data.ranked`. The report's figures are then of the best and the worst of each.

    Of responses that differ only in white space, the first counts. Line breaks and the indentation of lines are a real
    difference.

    Raises:
        ValueError: a record has no prompt, no responses, or no score or rank for each response; or its `finished` or
            `response_ids` are not one for each.
    """
    rules = rules or PairRules()
    pairs: list[Record] = []
    lists: list[Record] = []
    counts: Counter[str] = Counter()
    scored: list[tuple[int, float, int]] = []  # (prompt, score, characters) of each candidate
    for i, record in enumerate(records):
        candidates = _candidates(record, f"record {i + 1}", rules, counts)
        scored += [(i, c.score, len(c.text)) for c in candidates]
        if rules.how == LIST:
            made = [(candidates[0], candidates[-1])] if len(candidates) > 1 else []
            lists += [_list(record, candidates, rules.min_margin)] if made else []
        else:
            made = _pairs_of(candidates, rules, counts)
        counts["prompts without a pair"] += not made
        pairs += [_pair(record, *two) for two in made]
    report = _report(len(records), pairs, counts, scored)
    return (lists if rules.how == LIST else pairs), report


def _candidates(record: Record, where: str, rules: PairRules, counts: Counter[str]) -> list[Candidate]:
    """The responses that may be in a pair, the best one first."""
    checked_prompt(record, where)
    responses = checked_responses(record, where)
    judged = judged_scores(record, len(responses), where)
    counts["responses"] += len(responses)
    finished = _of_each(record, "finished", responses, True, where)
    ids = _of_each(record, "response_ids", responses, None, where)
    seen: set[str] = set()
    kept = []
    for i, text in enumerate(responses):
        normal = _without_layout(text)
        if np.isnan(judged[:, i]).any():
            counts["responses without a score"] += 1
        elif rules.only_finished and not finished[i]:
            counts["unfinished responses"] += 1
        elif normal in seen:
            counts["duplicate responses"] += 1
        else:
            seen.add(normal)
            kept.append(i)
    if not kept:
        return []
    found = [
        Candidate(responses[i], judged[:, i], float(score), ids[i])
        for i, score in zip(kept, COMBINE[rules.combine](judged[:, kept]), strict=True)
    ]
    return sorted(found, key=lambda c: -c.score)


def _of_each(record: Record, name: str, responses: Sequence[str], default: Any, where: str) -> list[Any]:
    """What a record says of each of its responses, or `default` for each."""
    values: Any = record.get(name)
    if values is None:
        return [default] * len(responses)
    if not isinstance(values, list) or len(values) != len(responses):
        got = f"{len(values)} values" if isinstance(values, list) else repr(values)
        raise ValueError(f"{where}: got {name} of {got}, want {len(responses)}, one per response")
    return values


def _without_layout(text: str) -> str:
    """Lines with their indentation, which has meaning in code, and single blanks. Blank lines do not count."""
    lines = ((line[: len(line) - len(line.lstrip())], " ".join(line.split())) for line in text.splitlines())
    return "\n".join(("" if indent == " " else indent) + words for indent, words in lines if words)


def agreement(chosen: Candidate, rejected: Candidate) -> float:
    """The share of judges that prefer the chosen one."""
    return float((chosen.judged > rejected.judged).mean())


def _pairs_of(
    candidates: Sequence[Candidate], rules: PairRules, counts: Counter[str]
) -> list[tuple[Candidate, Candidate]]:
    """The pairs that the rules want and accept, by falling margin."""
    passed = []
    for i, j in HOW[rules.how](len(candidates)):
        chosen, rejected = candidates[i], candidates[j]
        margin = chosen.score - rejected.score
        if margin <= 0:
            counts["pairs with equal scores"] += 1
        elif margin < rules.min_margin:
            counts["pairs below the margin"] += 1
        elif agreement(chosen, rejected) < rules.min_agreement:
            counts["pairs that judges disagree on"] += 1
        else:
            passed.append((chosen, rejected))
    passed.sort(key=lambda two: two[1].score - two[0].score)
    kept = passed[: rules.max_pairs_per_prompt]
    counts["pairs over the maximum"] += len(passed) - len(kept)
    return kept


def _pair(record: Record, chosen: Candidate, rejected: Candidate) -> Record:
    prompt = record["prompt"]

    def response(text: str) -> Any:
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    pair = {"prompt": prompt, "chosen": response(chosen.text), "rejected": response(rejected.text)}
    pair |= {"margin": chosen.score - rejected.score, "chosen_score": chosen.score, "rejected_score": rejected.score}
    if chosen.ids is not None and rejected.ids is not None:
        pair |= {"chosen_response_ids": chosen.ids, "rejected_response_ids": rejected.ids}
    if len(chosen.judged) > 1:
        pair["agreement"] = agreement(chosen, rejected)
    return pair | {name: value for name, value in record.items() if name not in MADE_HERE and name not in pair}


def _list(record: Record, candidates: Sequence[Candidate], min_margin: float) -> Record:
    """A prompt's candidates, the best one first, in one record."""
    scores = [c.score for c in candidates]
    found = {"prompt": record["prompt"], "responses": [c.text for c in candidates], "scores": scores}
    found["ranks"] = ranks_of(np.array(scores), min_margin)
    if all(c.ids is not None for c in candidates):
        found["response_ids"] = [c.ids for c in candidates]
    return found | {name: value for name, value in record.items() if name not in MADE_HERE}


def characters(response: Any) -> int:
    """Of a response as text or messages."""
    return len(response) if isinstance(response, str) else sum(len(m.get("content") or "") for m in response)


def _report(
    prompts: int, pairs: Sequence[Record], counts: Counter[str], scored: Sequence[tuple[int, float, int]]
) -> dict[str, Any]:
    responses, without = (counts.pop(name, 0) for name in ("responses", "prompts without a pair"))
    margins = [p["margin"] for p in pairs]
    differences = [characters(p["chosen"]) - characters(p["rejected"]) for p in pairs]
    groups, *columns = np.array(scored).reshape(-1, 3).T
    return {
        "prompts": prompts,
        "prompts_with_pairs": prompts - without,
        "responses": responses,
        "pairs": len(pairs),
        "dropped": {reason: count for reason, count in sorted(counts.items()) if count},
        "agreement": statistics.mean([p["agreement"] for p in pairs if "agreement" in p]),
        "margins": {"mean": statistics.mean(margins), "quantiles": statistics.quantiles(margins)},
        "length": statistics.length_differences(differences)
        | {
            "margin_correlation": statistics.correlation(margins, differences),
            # over responses, each less the mean of its prompt
            "score_correlation": statistics.correlation(*(statistics.centred_by_group(c, groups) for c in columns)),
        },
    }
