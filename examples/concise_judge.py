"""A judge for `fastpref score --function examples/concise_judge.py:score`: concise answers that end properly."""

from __future__ import annotations

COST = 0.01  # of a word
ENDINGS = (".", "!", "?")


def score(prompt: str | list[dict[str, str]], responses: list[str]) -> list[float]:
    """One number per response, higher is better."""
    return [_score(response.strip()) for response in responses]


def _score(response: str) -> float:
    if not response:
        return -2.0
    return float(response.endswith(ENDINGS)) - COST * len(response.split())
