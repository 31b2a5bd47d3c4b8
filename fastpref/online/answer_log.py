"""Requests that were answered, on the disk the moment they are: what a killed run has paid for is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from fastpref.online.answers import Answer, Request
from fastpref.online.records import Journal, read_records, sidecar

Key = tuple[int, int]  # (record, request of it)


class Ask(Protocol):
    """Answers requests in any order."""

    def __call__(self, requests: Iterable[tuple[Key, Request]]) -> Generator[tuple[Key, Answer]]: ...


class AnswerLog:
    """The answers to the requests of an output file's records, in `OUTPUT.answers.jsonl`, in the order in which they
    came.

    Args:
        output: the journal of the output, which says what both depend on.
        sizes: how many requests each record has.
        overwrite: begin anew.
    """

    def __init__(self, output: Journal, sizes: Sequence[int], overwrite: bool = False) -> None:
        self.path = output.path.with_name(output.path.name + ".answers.jsonl")
        self._sizes, self._start = sizes, output.done
        self._journal = Journal(self.path, sum(sizes), output.settings, overwrite)
        records = read_records(self.path) if self._journal.done else []
        self.answers: dict[Key, Answer] = {(r["record"], r["request"]): Answer.of(r) for r in records}

    def in_order(
        self, ask: Ask, request: Callable[[int, int], Request], progress: Callable[[int], None]
    ) -> Iterator[list[Answer]]:
        """Yields the answers of each record that the output lacks, in order. Asks for those that are not there.

        Args:
            ask: see `Ask`.
            request: makes the request of a key.
            progress: called with the number of new answers.
        """
        index, left = self._start, [0] * len(self._sizes)
        for i, _ in self._todo():
            left[i] += 1

        def ready() -> Iterator[list[Answer]]:
            nonlocal index
            while index < len(left) and not left[index]:
                yield [self.answers[index, j] for j in range(self._sizes[index])]
                index += 1

        yield from ready()
        with closing(ask((key, request(*key)) for key in self._todo())) as found:
            for (i, j), answer in found:
                self._journal.append([{"record": i, "request": j, **answer.record()}])
                self.answers[i, j] = answer
                left[i] -= 1
                progress(1)
                yield from ready()

    def _todo(self) -> Iterator[Key]:
        every = ((i, j) for i in range(self._start, len(self._sizes)) for j in range(self._sizes[i]))
        return (key for key in every if key not in self.answers)

    @staticmethod
    def remove(output: Path) -> None:
        """Once the output is complete and says it all."""
        path = output.with_name(output.name + ".answers.jsonl")
        for file in (path, sidecar(path)):
            file.unlink(missing_ok=True)
