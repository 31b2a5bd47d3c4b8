"""Finds the examples that Accelerate repeats where the data do not come out even on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

POSITION = "position"  # of an example in its stream


class NumberedStream(torch.utils.data.IterableDataset):
    """A stream whose examples carry their position, so that a repeated one can be recognised."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position, example in enumerate(self.stream):
            yield {**example, POSITION: position}

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)


def real_examples(examples: Sequence[dict[str, Any]], accelerator: Any, filled: bool, last: bool = True) -> int:
    """How many examples of a rank's batch are not repeated. They come first.

    Ranks get consecutive batches of one size. In a data set only the last batch can be filled up, and its length says
    by how much: Accelerate no longer knows once a resumed run has skipped batches. In a stream, an example was repeated
    if its position is not its place.

    Args:
        examples: the batch.
        accelerator: whose active data loader gave it.
        filled: whether a last batch is filled up.
        last: whether none of the batches that the loader gave came after this one.
    """
    size, rank, world = len(examples), accelerator.process_index, accelerator.num_processes
    if POSITION in examples[0]:
        first = examples[0][POSITION]
        if first % (size * world) != rank * size:
            return 0
        return sum(example[POSITION] == first + i for i, example in enumerate(examples))
    state = accelerator.gradient_state
    if not filled or not last or not state.end_of_dataloader:
        return size
    left = len(state.active_dataloader.dataset) % (size * world)
    return min(size, max(0, left - rank * size)) if left else size
