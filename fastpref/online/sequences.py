"""Prompts and responses as token ids, and their log-probs and rewards by a model, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref import kl_estimate, linear_token_kl, linear_token_logprobs, sequence_logprobs
from fastpref.data import encode, images
from fastpref.data.batches import batches_by_length, by_prompt, pad_id, padded
from fastpref.data.ids import IGNORE_INDEX
from fastpref.data.packing import Scored
from fastpref.data.vision import Vision
from fastpref.models import hidden_states, output_head
from fastpref.models.vision import in_dtype
from fastpref.objectives.reward import RewardHead
from fastpref.trainers.forward import by_sequence, head_labels, hidden_rows
from fastpref.trainers.trees import PromptTrees


class TokenSequence(NamedTuple):
    """The token ids of a prompt and of a response with what ends it, and which of these are scored (None: all)."""

    prompt: list[int]
    response: list[int]
    mask: list[int] | None = None

    def scored(self) -> Tensor:
        """Indices of the response's tokens that are scored. The first token of a sequence cannot be."""
        begin, end = len(self.prompt), len(self.prompt) + len(self.response)
        at = torch.arange(begin, end) if self.mask is None else torch.tensor(self.mask).nonzero()[:, 0] + begin
        return at[at > 0]

    def cut(self, max_length: int | None) -> TokenSequence:
        """The first `max_length` tokens."""
        if max_length is None:
            return self
        prompt = self.prompt[:max_length]
        room = max_length - len(prompt)
        return TokenSequence(prompt, self.response[:room], None if self.mask is None else self.mask[:room])


class PicturedSequence(TokenSequence):
    """The same, of a prompt with images. `record` has them, as `fastpref.data.images.encode` gives it."""

    record: Mapping[str, Any]

    @classmethod
    def of(cls, record: Mapping[str, Any], response: list[int]) -> PicturedSequence:
        """A response after the record's prompt."""
        found = cls(record["prompt_ids"], response)
        found.record = record
        return found

    def cut(self, max_length: int | None) -> PicturedSequence:
        """The first `max_length` tokens, which must have room for the prompt with all its images."""
        if max_length is None:
            return self
        room = max_length - len(self.prompt)
        if room < 0:
            raise ValueError(
                f"max_length: got {max_length}, want at least {len(self.prompt)}: a prompt with its images"
            )
        return PicturedSequence.of(self.record, self.response[:room])


def sequence_ids(record: Mapping[str, Any], response: str, tokenizer: Any) -> TokenSequence:
    """A response after the record's prompt, with what ends it, as the trainers make it."""
    return sequences_of({**record, "responses": [response]}, tokenizer)[0][0]


def sequences_of(
    record: Mapping[str, Any], tokenizer: Any, *, responses_as_written: bool = False
) -> tuple[list[TokenSequence], int]:
    """Each of the record's `responses` as `sequence_ids` gives it, or as it is written.

    Returns:
        (the sequences, flags of `fastpref.data.remarks`).
    """
    sequences, found = [], 0
    sampled = record.get("response_ids") or [None] * len(record["responses"])
    if len(sampled) != len(record["responses"]):
        raise ValueError(f"response_ids: got {len(sampled)}, want one list for each of {len(record['responses'])}")
    others = {name: value for name, value in record.items() if name != "response_ids"}  # it would be a response's own
    for text, ids in zip(record["responses"], sampled, strict=True):
        placed = text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]
        example = {**others, "response": placed, "response_response_ids": ids}
        if images.checked_processor(record, tokenizer):
            sequences += pictured(example, ("response",), tokenizer, responses_as_written=responses_as_written)
            continue
        parted = encode.part(
            example, ("response",), images.tokenizer_of(tokenizer), responses_as_written=responses_as_written
        )
        sequences.append(TokenSequence(parted.prompt, *parted.responses[0]))
        found |= parted.remarks
    return sequences, found


def pictured(example: Mapping[str, Any], sides: Sequence[str], processor: Any, **options: bool) -> list[TokenSequence]:
    """The responses after a prompt with images, as the trainers make them.

    Raises:
        ValueError: an image is wrong, or one of the options, which are of texts, is set.
    """
    for name, value in options.items():
        if value:
            raise ValueError(f"{name}: got True with images, want False")
    found = images.encode(dict(example), processor, sides)
    return [PicturedSequence.of(found, found[f"{side}_ids"]) for side in sides]


class PolicyScores(NamedTuple):
    """Sums over the tokens of each response, fp64 `[S]` on the CPU. None where they need a missing reference."""

    tokens: Tensor
    logps: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None  # KL(policy || reference) at each prefix, exact
    k3: Tensor | None  # its estimate from the response's own tokens


@torch.no_grad()
def policy_scores(
    model: Any, sequences: Sequence[TokenSequence], tokenizer: Any, *, reference: Any = None, batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> PolicyScores:  # fmt: skip
    """Log-probs of responses under a language model and, in the same sweep over the vocabulary, under a reference.

    Raises:
        ValueError: the two models' heads are not comparable.
    """
    head = output_head(model)
    ref_head = None if reference is None else output_head(reference)
    if ref_head is not None and (ref_head.options() != head.options() or len(ref_head.weight) != len(head.weight)):
        raise ValueError(
            f"reference: got a vocabulary of {len(ref_head.weight)} and {ref_head.options()}, want the policy's, "
            f"{len(head.weight)} and {head.options()}"
        )
    found = torch.zeros(5, len(sequences), dtype=torch.float64)
    for run in _runs([model] if reference is None else [model, reference], sequences, tokenizer, batch_size):
        labels = run.labels
        if ref_head is None:
            columns = [linear_token_logprobs(run.hidden[0], head.weight, labels, head.bias, **head.options())]
        else:
            both = linear_token_kl(
                run.hidden[0], head.weight, run.hidden[1], ref_head.weight, labels, head.bias, ref_head.bias,
                **head.options(),
            )  # fmt: skip
            assert both.logps is not None and both.ref_logps is not None
            columns = [both.logps, both.ref_logps, both.kl, kl_estimate(both.logps, both.ref_logps, "k3")]
        sums = [run.tokens, *map(run.total, columns)]
        found[: len(sums), run.chosen] = torch.stack([s.double() for s in sums]).cpu()
        if progress:
            progress(len(run.chosen))
    if ref_head is None:
        return PolicyScores(found[0], found[1], None, None, None)
    return PolicyScores(*found)


class _Run(NamedTuple):
    """A batch of sequences that has gone through some models' backbones."""

    chosen: list[int]  # which sequences
    hidden: list[Tensor]  # of each model, rows that the head multiplies
    labels: Tensor  # the tokens that they score
    tokens: Tensor  # [S], how many each sequence has
    total: Callable[[Tensor], Tensor]  # values of the labels, summed over each sequence's tokens [S]


def _runs(models: Sequence[Any], sequences: Sequence[TokenSequence], tokenizer: Any, size: int) -> Iterator[_Run]:
    if _with_images(sequences):
        for chosen in batches(sequences, size, "padded"):
            yield _padded_run(models, chosen, [sequences[i] for i in chosen], tokenizer)
        return
    trees = [PromptTrees(model) for model in models]
    if len({one.layout for one in trees}) > 1:
        trees = [PromptTrees(model, "padded") for model in models]
    for chosen in batches(sequences, size, trees[0].layout):
        yield _tree_run(trees, chosen, [sequences[i] for i in chosen])


def _padded_run(models: Sequence[Any], chosen: list[int], some: Sequence[TokenSequence], tokenizer: Any) -> _Run:
    device = next(models[0].parameters()).device
    pad = pad_id(images.tokenizer_of(tokenizer), models[0])
    ids, mask, labels = (x.to(device) for x in _labelled(some, pad))
    seen = _seen_inputs(some, tokenizer, ids)
    hidden = [hidden_states(model, ids, mask, **in_dtype(seen, model)) for model in models]
    return _Run(chosen, hidden, labels, (labels != IGNORE_INDEX).sum(1), lambda values: values.double().sum(1))


def _tree_run(trees: Sequence[PromptTrees], chosen: list[int], some: Sequence[TokenSequence]) -> _Run:
    packed = [_packed(one, some) for one in trees]
    batch = packed[0]
    edges = batch["cu_seqlens"]

    def total(values: Tensor) -> Tensor:
        return sequence_logprobs(by_sequence(values, batch).double(), batch["labels"], cu_seqlens=edges)

    hidden = [one.hidden(each) for one, each in zip(trees, packed, strict=True)]
    return _Run(chosen, hidden, head_labels(batch)[0], edges.diff(), total)


def _labelled(sequences: Iterable[TokenSequence], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask, and the token that each position scores."""
    rows = list(sequences)
    ids, mask = padded([s.prompt + s.response for s in rows], pad_token_id, "right")
    labels = torch.full_like(ids, IGNORE_INDEX)
    for i, sequence in enumerate(rows):
        at = sequence.scored()
        labels[i, at - 1] = ids[i, at]
    return ids, mask, labels


def _packed(trees: PromptTrees, sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    return trees.batch(*zip(*((s.prompt, s.response, s.mask) for s in sequences), strict=True))


def batches(sequences: Sequence[TokenSequence], size: int, layout: str) -> Iterator[list[int]]:
    """Batches of indices: responses to one prompt together where it runs once, else of similar length."""
    lengths = [len(s.prompt) + len(s.response) for s in sequences]
    if layout != "shared":
        yield from batches_by_length(lengths, size)
        return
    order = by_prompt([s.prompt for s in sequences], lengths)
    yield from (order[i : i + size] for i in range(0, len(order), size))


def _with_images(sequences: Sequence[TokenSequence]) -> bool:
    return any(isinstance(sequence, PicturedSequence) for sequence in sequences)


def _seen_inputs(sequences: Sequence[TokenSequence], processor: Any, input_ids: Tensor) -> dict[str, Any]:
    """What a model takes beside the padded token ids of sequences with images; nothing for texts."""
    if not _with_images(sequences):
        return {}
    vision = Vision(processor)
    scored = [Scored(s.prompt + s.response, len(s.prompt)) for s in sequences]
    text = {"images": [], "prompt_text": "", "pixels": []}
    records = [s.record if isinstance(s, PicturedSequence) else text for s in sequences]
    places = [row * input_ids.shape[1] + np.arange(len(s.ids)) for row, s in enumerate(scored)]
    found = vision.inputs(scored, records, "padded", places, input_ids.shape)
    return {name: value.to(input_ids.device) for name, value in found.items()}


@torch.no_grad()
def rewards(
    model: RewardHead, sequences: Sequence[TokenSequence], tokenizer: Any, *, batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """A reward model's scores of whole sequences, fp64 `[S]` on the CPU."""
    found = torch.zeros(len(sequences), dtype=torch.float64)
    trees = None if _with_images(sequences) else PromptTrees(model)
    for chosen in batches(sequences, batch_size, "padded" if trees is None else trees.layout):
        some = [sequences[i] for i in chosen]
        if trees is None:
            score = _padded_rewards(model, some, tokenizer)
        else:
            batch = _packed(trees, some)
            score = model.score_rows(hidden_rows(model, batch), batch["last_rows"])
        found[chosen] = score.double().cpu()
        if progress:
            progress(len(chosen))
    return found


def _padded_rewards(model: RewardHead, some: Sequence[TokenSequence], tokenizer: Any) -> Tensor:
    rows = [sequence.prompt + sequence.response for sequence in some]
    device = model.score.weight.device
    pad = pad_id(images.tokenizer_of(tokenizer), model)
    ids, mask = (x.to(device) for x in padded(rows, pad, "right"))
    return model(ids, mask, **in_dtype(_seen_inputs(some, tokenizer, ids), model.backbone))
