"""Samples of online training: who makes them, in which order prompts come, and how they are packed into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref.data.batches import batches_by_length
from fastpref.data.collators import Example, PackedCollator
from fastpref.data.encode import prompt_ids
from fastpref.data.packing import Scored
from fastpref.data.sampling import Sampling, sample_batch
from fastpref.data.template import without_none


class Sampled(NamedTuple):
    """A response as it was sampled.

    `ids` ends with what ends the response, if it ended. `logps` are the sampler's log-probs of these tokens (None for a
    token that it has none for), or None if it gives none.
    """

    ids: list[int]
    finished: bool
    logps: list[float | None] | None = None


class Sampler(Protocol):
    """Anything that samples responses to prompts of token ids: a server, another engine.

    It may also have a method `update(model, step)`, which is called before every round of sampling, with the policy.
    Without one it goes on sampling from what it has, and the importance correction is all that knows: this is said
    once. `repeatable = False` says that the same numbers need not give the same responses, so that a run that is
    resumed goes on, but not to the bit.
    """

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[tuple[int, int]]
    ) -> Sequence[Sampled]:
        """One response to each of the `prompts`.

        Args:
            prompts: token ids. A prompt is there once for each of its responses.
            sampling: how. `sampling.k` says nothing here.
            numbers: (prompt, response) for each: no two responses of a run have the same. With `sampling.seed` they may
                serve as its random seed.
        """
        ...


EVALUATION = 2**40  # number of an evaluation's first prompt: each evaluation samples with the same random numbers


def sampling_of(args: Any) -> Sampling:
    """How a configuration samples, a response at a time."""
    return Sampling(
        1, args.max_completion_length, args.temperature, args.top_p, args.top_k, args.repetition_penalty, args.seed,
        args.min_p,
    )  # fmt: skip


class ModelSampler:
    """Samples from the model itself, by `generate`. Every response has random numbers of its own."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def __call__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[tuple[int, int]]
    ) -> list[Sampled]:
        found: dict[int, Sampled] = {}
        for chosen in batches_by_length([len(ids) for ids in prompts], self.batch_size):
            tokens = {numbers[i][0]: list(prompts[i]) for i in chosen}
            some = sample_batch(self.model, self.tokenizer, tokens, [numbers[i] for i in chosen], sampling)
            found.update(zip(chosen, (Sampled(r.ids, r.finished) for r in some), strict=True))
        return [found[i] for i in range(len(prompts))]


def with_prompt_ids(
    record: dict[str, Any], index: int, tokenizer: Any, template: dict[str, Any], name: str, version: str
) -> dict[str, Any]:
    """A record's prompt as token ids. `template` has more arguments of the chat template.

    Raises:
        ValueError: names the record.
    """
    record = without_none(record)
    kwargs = {**template, **record.get("chat_template_kwargs", {})}
    try:
        found = prompt_ids({**record, "chat_template_kwargs": kwargs}, tokenizer)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name}_dataset, record {index}: {error}") from None
    if not found:
        raise ValueError(f"{name}_dataset, record {index}: got a prompt without tokens, want at least 1")
    return {"prompt_ids": found}


@dataclass
class Sample:
    """A response that is learnt from."""

    group: int  # its prompt's number in the run
    prompt_ids: list[int]
    ids: list[int]
    learn: bool = True  # False: counts in means over sequences, and no more
    advantage: float = 0.0
    slope: float = 1.0  # see `Advantages`
    sampler_logps: Tensor | None = None  # of each token, as all below
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None  # exact, at the prefix of each token

    @property
    def tokens(self) -> int:
        """How many of its tokens are scored."""
        return len(self.ids) if self.learn else 0

    def penalty(self, estimator: str) -> Tensor:
        """Its KL from the reference, in nats, 0-d: exact, or by the sampled tokens (k1)."""
        if estimator == "exact":
            assert self.kl is not None
            return self.kl.sum()
        assert self.old_logps is not None and self.ref_logps is not None
        return (self.old_logps - self.ref_logps).sum()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return asdict(self)


class RepeatSampler(torch.utils.data.Sampler[int]):
    """The order of prompts: each `repeats` times in a row, and every block of prompts `rounds` times.

    The order of the first epoch is that of TRL's `RepeatSampler`. Any other has a seed of its own, so that a run that
    goes on in it need not know those before. An incomplete block at the end is left out.
    """

    def __init__(self, number: int, repeats: int, block: int = 1, rounds: int = 1, seed: int | None = None) -> None:
        self.number, self.repeats, self.block, self.rounds, self.seed, self.epoch = (
            number, repeats, block, rounds, seed, 0
        )  # fmt: skip

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.number))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.number, generator=generator).tolist()
        for begin in range(0, self.number - self.number % self.block, self.block):
            for _ in range(self.rounds):
                for index in order[begin : begin + self.block]:
                    yield from [index] * self.repeats

    def __len__(self) -> int:
        return self.number // self.block * self.block * self.rounds * self.repeats


def shuffled_groups(samples: Sequence[Sample], parts: int, seed: int) -> list[list[Sample]]:
    """The samples in `parts` equal batches, in which the samples of a prompt stay side by side where they can.

    TRL shuffles single samples. Then a prompt would have to run in as many batches as its samples are in.
    """
    if parts == 1:
        return [list(samples)]
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample)
    known = list(groups.values())
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [sample for i in order for sample in known[i]]
    size = len(mixed) // parts
    return [mixed[i * size : (i + 1) * size] for i in range(parts)]


class RolloutCollator(PackedCollator):
    """Packs samples, the prompt of a group once. An example has a `sample`, or is a record with its prompt's ids."""

    def groups(self, examples: Sequence[Example]) -> list[list[Scored]]:
        return [[_scored(e["sample"]) if "sample" in e else _prompt(e)] for e in examples]

    def __call__(self, examples: Sequence[Example]) -> Any:
        return list(examples)  # records, which are yet to be answered

    def samples(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """The parts of a batch; each has its `samples` in the order of its sequences."""
        return [self.part(some) for some in self.split([{"sample": sample} for sample in samples])]

    def part(self, examples: Sequence[Example]) -> dict[str, Any]:
        samples = [example["sample"] for example in examples]
        tokens = sum(len(s.ids) + len(s.prompt_ids) for s in samples)
        return super().part(examples) | {"tokens": tokens, "samples": Samples(samples)}


class Samples:
    """A part's samples, wrapped so that code that looks for tensors in batches does not look into them."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def joined(self, name: str, device: torch.device | str) -> Tensor | None:
        """An attribute of all scored tokens `[M]`, or None where a sample has none."""
        values = [getattr(sample, name) for sample in self.samples]
        if any(value is None for value in values):
            return None
        kept = [v[: s.tokens] for v, s in zip(values, self.samples, strict=True)]
        return _sent(torch.cat(kept), device)

    def each(self, name: str, device: torch.device | str) -> Tensor:
        """A number of each sample, fp32 `[S]`."""
        return _sent(torch.tensor([getattr(sample, name) for sample in self.samples], dtype=torch.float32), device)


def _sent(values: Tensor, device: torch.device | str) -> Tensor:
    """Values of the host on `device`. A GPU copies them while it works: from pinned memory nobody waits."""
    if values.device.type == "cpu" and torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _scored(sample: Sample) -> Scored:
    ids = sample.prompt_ids + sample.ids if sample.learn else sample.prompt_ids
    return Scored(ids, len(sample.prompt_ids))


def _prompt(record: dict[str, Any]) -> Scored:
    return Scored(record["prompt_ids"], len(record["prompt_ids"]))
