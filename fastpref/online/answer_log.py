"""Requests that were answered, on the disk the moment they are: what a killed run has paid for is not asked again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from fastpref.online.answers import Answer, Request
from fastpref.online.records import Journal, sidecar

Key = tuple[int, int]  # (record, request of it)
MakeRequest = Callable[[int, int], Request]


class Ask(Protocol):
    """Answers requests in any order."""

    def __call__(self, requests: Iterable[tuple[Key, Request]]) -> Generator[tuple[Key, Answer]]: ...


def in_order(
    ask: Ask, sizes: Sequence[int], request: MakeRequest, keep: Callable[[Key, Answer], None] | None = None,
    *, start: int = 0, known: dict[Key, Answer] | None = None,
) -> Iterator[list[Answer]]:  # fmt: skip
    """Yields the answers of each record from `start` on, in order, however they come.

    Args:
        ask: see `Ask`.
        sizes: how many requests each record has.
        request: makes the request of a key.
        keep: called with each answer when it comes.
        start: the first record.
        known: answers that need not be asked for. New ones are added.
    """
    answers = {} if known is None else known
    todo = [(i, j) for i in range(start, len(sizes)) for j in range(sizes[i]) if (i, j) not in answers]
    left, index = Counter(i for i, _ in todo), start

    def ready() -> Iterator[list[Answer]]:
        nonlocal index
        while index < len(sizes) and not left[index]:
            yield [answers[index, j] for j in range(sizes[index])]
            index += 1

    yield from ready()
    with closing(ask((key, request(*key)) for key in todo)) as found:
        for key, answer in found:
            if keep is not None:
                keep(key, answer)
            answers[key] = answer
            left[key[0]] -= 1
            yield from ready()


class AnswerLog:
    """The answers to the requests of an output file's records, in `OUTPUT.answers.jsonl`, in the order in which they
    came.

    Args:
        output: the journal of the output, which says what both depend on.
        sizes: how many requests each record has.
        overwrite: begin anew.
    """

    def __init__(self, output: Journal, sizes: Sequence[int], overwrite: bool = False) -> None:
        self.path = _beside(output.path)
        self._sizes, self._start = sizes, output.done
        self._journal = Journal(self.path, sum(sizes), output.settings, overwrite)
        records = map(json.loads, self.path.read_bytes().splitlines()) if self._journal.done else ()
        self.answers: dict[Key, Answer] = {(r["record"], r["request"]): Answer.of(r) for r in records}

    def in_order(self, ask: Ask, request: MakeRequest, progress: Callable[[int], None]) -> Iterator[list[Answer]]:
        """Yields the answers of each record that the output lacks, in order. Asks for those that are not there.

        Args:
            ask: see `Ask`.
            request: makes the request of a key.
            progress: called with the number of new answers.
        """

        def keep(key: Key, answer: Answer) -> None:
            self._journal.append([{"record": key[0], "request": key[1], **answer.record()}])
            progress(1)

        yield from in_order(ask, self._sizes, request, keep, start=self._start, known=self.answers)

    @staticmethod
    def remove(output: Path) -> None:
        """Once the output is complete and says it all."""
        path = _beside(output)
        for file in (path, sidecar(path)):
            file.unlink(missing_ok=True)


def _beside(output: Path) -> Path:
    return output.with_name(output.name + ".answers.jsonl")
