"""What is said about odd records: one sentence for each kind, with their count and the numbers of the first few."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# flags: a record may have several
OTHER_PROMPT, ALTERED, SAME, LEFT_OUT, TWO_ENDS, TWO_BEGINNINGS = 1, 2, 4, 8, 16, 32
SHOWN = 5
SENTENCES = {
    LEFT_OUT: "left out, {records} do not fit max_length={max_length} {first}",
    ALTERED: (
        "the chat template leaves out or changes what the assistant wrote in {records} {first}: what is scored is not "
        "what was sampled; responses_as_written scores it as it is"
    ),
    TWO_ENDS: (
        "{records} {first} end in EOS twice, the chat template's and one that TRL's CPO and ORPO put after it, whose "
        "losses these are; with responses_as_written there is one"
    ),
    TWO_BEGINNINGS: (
        "in {records} {first} the generation header opens the reasoning, and the response opens it again: it was not "
        "sampled after this header"
    ),
    SAME: "{records} {first} have the same tokens in chosen and rejected, which teach nothing",
    OTHER_PROMPT: (
        "the prompt's tokens are not a prefix of prompt and response in {records} {first}: the chat template renders "
        "it in another way, or tokens merge across its end. What follows the part in common counts as response, so "
        "that the model is trained in another context than it sees in generation; responses_as_written keeps it whole"
    ),
}


class Remarks:
    """Collects flags of numbered records (from 1 on). `say` logs what was found since it was last called.

    The end of a stream may be far, so it is also told of the 1st, 10th, 100th, ... record of a kind as it passes.
    """

    def __init__(self, name: str, max_length: int | None = None, *, stream: bool = False) -> None:
        self.name, self.max_length, self.stream = name, max_length, stream
        self.forget()

    def forget(self) -> None:
        """Begins anew, with nothing found."""
        self.seen = 0
        self.first: dict[int, list[int]] = {flag: [] for flag in SENTENCES}
        self.counts = dict.fromkeys(SENTENCES, 0)

    def add(self, record: int, flags: int) -> None:
        """Adds the flags of one record."""
        self.seen += 1
        for flag in SENTENCES:
            if flags & flag:
                self.counts[flag] += 1
                if len(self.first[flag]) < SHOWN:
                    self.first[flag].append(record)
                if self.stream and self.counts[flag] == 10 ** (len(str(self.counts[flag])) - 1):
                    self._log(flag, so_far=" so far")

    def add_all(self, flags: np.ndarray) -> None:
        """Adds the flags of all records, in order."""
        self.seen += len(flags)
        for flag in SENTENCES:
            found = np.flatnonzero(flags & flag)
            self.counts[flag] += len(found)
            self.first[flag] += (found[:SHOWN] + 1).tolist()

    def say(self) -> None:
        """Logs what was found since the last call."""
        for flag, count in self.counts.items():
            if count:
                self._log(flag)
        self.forget()

    def sentence(self, flag: int, so_far: str = "") -> str:
        """What is said of one kind of flag."""
        count = self.counts[flag]
        first = ", ".join(map(str, self.first[flag])) + (", ..." if count > SHOWN else "")
        return SENTENCES[flag].format(
            records=f"{count} of {self.seen} records{so_far}", first=f"(number {first})", max_length=self.max_length
        )

    def _log(self, flag: int, so_far: str = "") -> None:
        logger.warning("%s: %s", self.name, self.sentence(flag, so_far))


def with_remarks(dataset: Any, told: Remarks | None) -> Any:
    """Attaches to a stream what is to be said at its end."""
    if told is not None:
        dataset.fastpref_remarks = told
    return dataset


def remarks_of(dataset: Any) -> Remarks | None:
    """What `with_remarks` attached, or None."""
    return getattr(dataset, "fastpref_remarks", None)


def say_remarks(dataset: Any) -> None:
    """At a stream's end, says how many of its records were left out or are odd."""
    if (told := remarks_of(dataset)) is not None:
        told.say()
