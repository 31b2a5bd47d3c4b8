"""What gives responses their scores: reward models, DPO's implicit reward, or any Python function.

A scorer takes all records, each with `prompt` and `responses`, and an index. It yields the scores of every record from
that index on.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fastpref.common import checks
from fastpref.data.batches import WINDOW_BATCHES, in_windows
from fastpref.data.sampling import Prompt
from fastpref.objectives.reward import RewardHead
from fastpref.online.sequences import TokenSequence, policy_scores, rewards, sequences_of

Records = Sequence[Mapping[str, Any]]
Scores = Sequence[float | None]
Judge = Callable[[Prompt, list[str]], Scores]
AHEAD = 4  # calls of a judge that are under way for each worker: finished scores wait for slower ones before them


class Scorer(Protocol):
    """Yields the scores of every record from `start` on."""

    def __call__(self, records: Records, start: int = 0) -> Iterator[Scores]: ...


def load_function(spec: str) -> Judge:
    """The function that `package.module:name` or `path/to/file.py:name` names.

    Raises:
        ValueError: there is no such module, file or function, or it imports what is not installed.
    """
    place, _, name = spec.rpartition(":")
    if not place:
        raise ValueError(f"function: got {spec!r}, want module:name or file.py:name")
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"function: got {spec!r}, and there is no file {place}")
    try:
        module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise ValueError(f"function: got {spec!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"function: got {spec!r}, and {place} has no function {name!r}")
    return function


def _module_of_file(path: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def function_scorer(function: Judge, workers: int = 1) -> Scorer:
    """A scorer from a judge: a function `(prompt, responses) -> scores`, with None where it has no opinion.

    `workers` threads call it at once, which pays if it waits for a server.
    """
    checks.positive("workers", workers)

    def score(records: Records, start: int = 0) -> Iterator[Scores]:
        if workers == 1:
            yield from (function(r["prompt"], r["responses"]) for r in records[start:])
            return
        pool = ThreadPoolExecutor(workers)
        try:
            for begin in range(start, len(records), AHEAD * workers):
                some = records[begin : begin + AHEAD * workers]
                yield from pool.map(lambda r: function(r["prompt"], r["responses"]), some)
        finally:  # not `with`, which waits: an iterator that is dropped may be closed in a thread that just starts
            pool.shutdown(wait=False, cancel_futures=True)

    return score


def reward_function(scorer: Scorer, name: str = "scorer") -> Callable[..., list[float | None]]:
    """A scorer as a reward of online training, with TRL's signature: `(prompts, completions, **columns) -> rewards`.

    Neighbours with the same prompt are one record: a scorer that compares responses compares those of a group.

    Args:
        scorer: see `Scorer`.
        name: what the reward is called in logs.
    """

    def reward(prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        records = []
        for _, group in groupby(zip(prompts, completions, strict=True), key=lambda pair: pair[0]):
            pairs = list(group)
            responses = [c if isinstance(c, str) else c[-1]["content"] for _, c in pairs]
            records.append({"prompt": pairs[0][0], "responses": responses})
        return [score for scores in scorer(records) for score in scores]

    reward.__name__ = name
    return reward


def _windowed(
    tokenizer: Any, batch_size: int, max_length: int | None, as_written: bool,
    run: Callable[[list[TokenSequence]], list[float]],
) -> Scorer:  # fmt: skip
    """A scorer from `run`, which scores sequences, on windows of records that do not depend on where it starts."""

    def window(records: list[Mapping[str, Any]]) -> list[Scores]:
        of_records = (sequences_of(record, tokenizer, responses_as_written=as_written)[0] for record in records)
        found = iter(run([sequence.cut(max_length) for some in of_records for sequence in some]))
        return [[next(found) for _ in record["responses"]] for record in records]

    def score(records: Records, start: int = 0) -> Iterator[Scores]:
        for scores in in_windows(window, records, WINDOW_BATCHES * batch_size, start):
            yield from scores

    return score


def reward_model_scorer(
    model: RewardHead, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None,
    responses_as_written: bool = False,
) -> Scorer:  # fmt: skip
    """A scorer by a reward model: its rewards of whole conversations, cut after `max_length` tokens."""
    return _windowed(
        tokenizer, batch_size, max_length, responses_as_written,
        lambda s: rewards(model, s, tokenizer, batch_size=batch_size).tolist(),
    )  # fmt: skip


def implicit_reward_scorer(
    model: Any, reference: Any, tokenizer: Any, beta: float = 0.1, *, batch_size: int = 8,
    max_length: int | None = None, responses_as_written: bool = False,
) -> Scorer:  # fmt: skip
    """A scorer by DPO's implicit reward, `beta * log(policy / reference)`.

    It is the reward of which DPO's policy is the optimum (Rafailov et al. 2023, eq. 5), up to a constant of the prompt.
    """
    checks.positive("beta", beta)

    def run(sequences: list[TokenSequence]) -> list[float]:
        found = policy_scores(model, sequences, tokenizer, reference=reference, batch_size=batch_size)
        assert found.ref_logps is not None
        return (beta * (found.logps - found.ref_logps)).tolist()

    return _windowed(tokenizer, batch_size, max_length, responses_as_written, run)
