"""What is said of streams (`IterableDataset`), whose records are only known once they have been read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from fastpref.data.remarks import remarks_of, say_remarks


class StreamRemarks(TrainerCallback):
    """At the end of an epoch, a run or an evaluation, says which of a stream's records were left out or are odd."""

    def __init__(self, train_dataset: Any, eval_dataset: Any) -> None:
        self.training, self.evaluation = train_dataset, eval_dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (told := remarks_of(self.training)) is not None:
            told.forget()  # what an interrupted run has read

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say_remarks(self.training)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        say_remarks(self.training)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        given = self.evaluation
        for dataset in given.values() if isinstance(given, Mapping) else [given]:
            say_remarks(dataset)
