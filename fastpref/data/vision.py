"""From a batch's images to what a vision-language model takes beside its token ids: pixels, their grids, positions.

An image runs once for all sequences with its prompt where their beginning runs once (`shared`), else once for each.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.data import images
from fastpref.data.packing import Scored

GRID = "image_grid_thw"  # of models whose positions have three axes
BY_TOKEN = ("mm_token_type_ids", "token_type_ids")


@dataclass
class Vision:
    """Makes a batch's images ready. `positions` gives a sequence's positions `[3, 1, T]`, of models that have such."""

    processor: Any
    positions: Callable[..., Tensor] | None = None
    seen: bool = False  # images, in the data
    mixed: bool | None = False  # records with images and without, in one data set; None: not known of a stream
    sharded: bool = False  # the model, over ranks, all of which have to run its tower or none
    _last: tuple[list[Any], dict[str, Any]] = field(default=([], {}), repr=False)  # runs, and what was made of them

    @functools.cached_property
    def image_tokens(self) -> frozenset[int]:
        """The ids of the tokens in whose place an image's features stand."""
        return frozenset(images.image_token_ids(self.processor))

    def check_mixed(self, mixed: bool | None = False) -> None:
        """Notes whether a data set is `mixed`.

        Raises:
            ValueError: one is, and the model is sharded: the ranks would wait for each other.
        """
        if not self.mixed and mixed is not False:
            self.mixed = mixed
        if self.mixed and self.sharded:
            raise ValueError(
                "images: got records without any beside others with some, want some in each record: the model is "
                "sharded (FSDP, ZeRO-3), and where one rank runs its vision tower all have to"
            )

    def inputs(
        self, sequences: Sequence[Scored], examples: Sequence[Mapping[str, Any]], layout: str,
        places: Sequence[np.ndarray], shape: Sequence[int],
    ) -> dict[str, Any]:  # fmt: skip
        """What the model takes beside the token ids of a batch.

        Args:
            sequences: one of each example, then perhaps another of each, and so on.
            examples: with `images` and `prompt_text`.
            layout: of the batch.
            places: where the tokens of each sequence lie in the batch.
            shape: of the batch's token ids.

        Returns:
            The processor's tensors of all images that run, in the order of their tokens; what it says of each token, in
                the batch's shape; and perhaps `position_ids`, `[3, 1, N]`.
        """
        which = list(range(len(sequences)))  # of the runs each sequence belongs to
        if layout == "shared":
            contexts = list(dict.fromkeys(s.context for s in sequences))  # in the order in which their trees are
            which = [contexts.index(s.context) for s in sequences]
        runs = [examples[which.index(run) % len(examples)] for run in range(max(which) + 1)]
        if self.sharded and self.mixed is None and not any(run["images"] for run in runs):
            self.check_mixed(True)
        found = self._processed(runs)
        mask = found.pop("attention_mask")
        del found["input_ids"]
        prompts = {name: found.pop(name) for name in BY_TOKEN if name in found}
        kinds: dict[str, list[Tensor]] = {}
        for name, values in prompts.items():
            own = [row[: int(m.sum())] for row, m in zip(values, mask, strict=True)]
            kinds[name] = [_filled(own[run], len(s.ids)) for run, s in zip(which, sequences, strict=True)]
            found[name] = _laid_out(kinds[name], places, shape)
        if self.positions is not None and layout != "padded" and GRID in found:
            by_run = found[GRID].split([len(run["images"]) for run in runs])
            own = self._positions(sequences, kinds[BY_TOKEN[0]], [by_run[run] for run in which])
            found["position_ids"] = _laid_out(own, places, shape)
        return found

    def _processed(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`_made` of the runs. Kept for the next call: KTO has two batches, or three, of the same prompts."""
        wanted = [(run["pixels"], run["prompt_text"]) for run in runs]
        if self._last[0] != wanted:
            self._last = wanted, self._made(runs)
        return dict(self._last[1])

    def _made(self, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of prompts with images together; those without have zeros wherever something is said of tokens."""
        pictures = [[images.opened(source) for source in run["images"]] for run in runs]
        texts = [run["prompt_text"] for run in runs]
        some = [i for i, own in enumerate(pictures) if own] or list(range(len(runs)))
        found = dict(images.process(self.processor, [pictures[i] for i in some], [texts[i] for i in some]))
        for name in ("input_ids", "attention_mask", *BY_TOKEN):
            if name in found:
                rows = found[name].new_zeros(len(runs), found[name].shape[1])
                rows[some] = found[name]
                found[name] = rows
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _positions(self, sequences: Sequence[Scored], kinds: Sequence[Tensor], grids: Sequence[Tensor]) -> list[Tensor]:
        """The positions `[3, T]` of each sequence, as if it were alone."""
        assert self.positions is not None
        found = []
        for sequence, kind, grid in zip(sequences, kinds, grids, strict=True):
            if len(grid):
                found.append(self.positions(torch.tensor([list(sequence.ids)]), kind[None], grid)[:, 0])
            else:
                found.append(torch.arange(len(sequence.ids)).expand(3, -1))
        return found


def context_of(example: Mapping[str, Any]) -> bytes:
    """The `Scored.context` of an example's sequences: its prompt with its images, or nothing if it is of texts."""
    if "pixels" not in example:
        return b""
    return hashlib.blake2b(f"{example['pixels']} {example['prompt_text']}".encode(), digest_size=16).digest()


def _filled(values: Tensor, length: int) -> Tensor:
    """Values of a prompt's tokens, and zeros for those of the response."""
    return torch.cat([values, values.new_zeros(max(0, length - len(values)))])[:length]


def _laid_out(values: Sequence[Tensor], places: Sequence[np.ndarray], shape: Sequence[int]) -> Tensor:
    """Values `[..., T]` of each sequence's tokens in the shape `[..., *shape]` of a batch; 0 where it is padded."""
    leading = values[0].shape[:-1]
    found = values[0].new_zeros(*leading, shape[0] * shape[1])
    for value, place in zip(values, places, strict=True):
        found[..., torch.from_numpy(place)] = value
    return found.view(*leading, *shape)
