"""Samples several responses to each prompt. Every response has random numbers of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.common import checks
from fastpref.data import images
from fastpref.data.batches import WINDOW_BATCHES, batches_by_length, in_windows, pad_id, padded
from fastpref.data.encode import prompt_ids
from fastpref.data.randomness import draw, keys
from fastpref.models.vision import in_dtype

Message = dict[str, Any]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature=0` is greedy, for `k=1`. `top_k=0` and `top_p=1` leave nothing out."""

    k: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("max_new_tokens", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, want an integer, at least {least}")
        checks.within("temperature", self.temperature, 0, float("inf"))
        checks.positive("repetition_penalty", self.repetition_penalty)
        checks.positive("top_p", self.top_p)
        checks.within("top_p", self.top_p, 0, 1, closed=True)
        if self.min_p is not None:
            checks.within("min_p", self.min_p, 0, 1, closed=True)
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"k: got {self.k} with temperature 0, want 1: greedy responses are all the same")


class Response(NamedTuple):
    """A sampled response."""

    text: str
    tokens: int  # what ends it included
    finished: bool  # it ended by itself, not at max_new_tokens
    ids: list[int]  # the tokens, what ends it included


def sample_responses(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt | Mapping[str, Any]],
    sampling: Sampling | None = None, *, batch_size: int = 16, start: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[Response]]:  # fmt: skip
    """Yields `sampling.k` responses to each prompt from `start` on, in order.

    The random numbers of a response depend only on the seed, the prompt's index and the response's index. Batches are
    made of prompts of similar length, within windows of consecutive prompts that do not depend on `start`. So with the
    same batch size, machine and versions, a run from `start` gives exactly what a run from 0 gives there. Another batch
    size changes the logits by rounding, and a token only where two were as close as that.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer. A vision-language model's processor, for records with images.
        prompts: messages, which go through the chat template; or text, which is continued as it is; or records with a
            `prompt` and, as TRL has them, `tools` and `chat_template_kwargs` for the template, and `images`.
        sampling: how to sample.
        batch_size: responses sampled at once.
        start: index of the first prompt.
        progress: called with the number of responses that each batch finished.

    Raises:
        ValueError: names the prompt that the chat template refuses, or that has no tokens.
    """
    ids = all_prompt_ids(prompts, tokenizer)
    how = sampling or Sampling()
    yield from sample_encoded(
        model, tokenizer, prompts, ids, how, batch_size=batch_size, start=start, progress=progress
    )


def sample_encoded(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt | Mapping[str, Any]], ids: Sequence[list[int]], how: Sampling,
    *, batch_size: int, start: int = 0, progress: Callable[[int], None] | None = None,
) -> Iterator[list[Response]]:  # fmt: skip
    """What `sample_responses` yields, where the prompts' token ids are known (see `all_prompt_ids`)."""
    pictured = {i for i, p in enumerate(prompts) if isinstance(p, Mapping) and images.listed(p)}

    def run(window: list[tuple[int, list[int]]]) -> list[list[Response]]:
        items = [(index, response) for index, _ in window for response in range(how.k)]
        tokens = dict(window)
        found: dict[tuple[int, int], Response] = {}
        for kind in ([i for i in items if i[0] not in pictured], [i for i in items if i[0] in pictured]):
            for chosen in batches_by_length([len(tokens[index]) for index, _ in kind], batch_size):
                some = [kind[i] for i in chosen]
                pictures = {index: prompts[index] for index, _ in some} if some[0][0] in pictured else {}
                found.update(zip(some, sample_batch(model, tokenizer, tokens, some, how, pictures), strict=True))
                if progress:
                    progress(len(some))
        return [[found[index, response] for response in range(how.k)] for index in tokens]

    size = max(1, WINDOW_BATCHES * batch_size // how.k)
    for responses in in_windows(run, list(enumerate(ids)), size, start):
        yield from responses


def all_prompt_ids(prompts: Sequence[Prompt | Mapping[str, Any]], tokenizer: Any) -> list[list[int]]:
    """The token ids of all prompts.

    Raises:
        ValueError: names the prompt that the chat template refuses, or that has no tokens.
    """
    found = []
    for i, prompt in enumerate(prompts):
        try:
            record = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
            if images.checked_processor(record, tokenizer):
                found.append(images.encode(dict(record), tokenizer, ())["prompt_ids"])
            else:
                found.append(prompt_ids(record, images.tokenizer_of(tokenizer)))
        except ValueError as error:
            raise ValueError(f"prompts[{i}]: {error}") from None
        if not found[-1]:
            raise ValueError(f"prompts[{i}]: got no tokens, want at least 1")
    return found


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens with which the model or its tokenizer ends a response."""
    own = getattr(model.generation_config, "eos_token_id", None)
    known = [*(own if isinstance(own, list) else [own]), images.tokenizer_of(tokenizer).eos_token_id]
    return sorted({token for token in known if token is not None})


@torch.no_grad()
def sample_batch(
    model: Any, tokenizer: Any, tokens: Mapping[int, list[int]], items: Sequence[tuple[int, int]], how: Sampling,
    pictures: Mapping[int, Any] | None = None,
) -> list[Response]:  # fmt: skip
    """Samples one batch, a response to each of the `items`, which are (prompt, response) numbers.

    The numbers are the keys of a response's random numbers, with `how.seed`. `tokens` has each prompt's ids. `pictures`
    has the prompts' records if they have images: all or none of a batch.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    processor, tokenizer = tokenizer, images.tokenizer_of(tokenizer)
    prompts = list(dict.fromkeys(prompt for prompt, _ in items))
    row = torch.tensor([prompts.index(prompt) for prompt, _ in items], device=model.device)
    pad = pad_id(tokenizer, model)
    ids, mask = (x.to(model.device) for x in padded([tokens[p] for p in prompts], pad, "left"))
    if pictures:
        cache = _seen(processor, {prompt: pictures[prompt] for prompt in prompts}, [p for p, _ in items], model)
    else:
        cache = _prompt_cache(model, ids, mask, row) if len(prompts) < len(items) else {}
    ids, mask = ids[row], mask[row]
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=how.max_new_tokens, repetition_penalty=how.repetition_penalty,
        no_repeat_ngram_size=0, eos_token_id=ends, pad_token_id=pad,
    )  # fmt: skip
    table = torch.from_numpy(np.stack([keys(how.seed, *item, how.max_new_tokens) for item in items]))
    broken = torch.zeros((), dtype=torch.bool, device=model.device)

    def watched(input_ids: Tensor, scores: Tensor) -> Tensor:
        broken.logical_or_(scores.isnan().any())  # read once a batch: to look at it here would be a sync per token
        return scores

    processors = LogitsProcessorList([watched])
    if how.temperature > 0:
        processors.extend(_processors(how, table.to(model.device), ids.shape[1]))
    output = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors, **cache
    )
    if bool(broken):
        raise ValueError(f"model: got NaN among the logits of {type(model).__name__} in {model.dtype}, want numbers")
    return [_response(row, ends, tokenizer) for row in output[:, ids.shape[1] :].tolist()]


def _seen(processor: Any, records: Mapping[int, Any], prompts: Sequence[int], model: Any) -> dict[str, Any]:
    """What a vision-language model takes beside the token ids of `prompts` with images, padded on the left.

    `records` has each of them once.
    """
    opened = {p: [images.opened(source) for source in images.listed(record)] for p, record in records.items()}
    texts = {p: images.texts_of(record, processor, (), len(opened[p]))[0] for p, record in records.items()}
    found = images.process(processor, [opened[p] for p in prompts], [texts[p] for p in prompts], side="left")
    own = {name: value.to(model.device) for name, value in found.items() if isinstance(value, Tensor)}
    return in_dtype({n: value for n, value in own.items() if n not in ("input_ids", "attention_mask")}, model)


def _prompt_cache(model: Any, ids: Tensor, mask: Tensor, row: Tensor) -> dict[str, Any]:
    """Keys and values of the prompts without their last tokens, computed once for all responses to a prompt.

    `row` says which prompt each response answers. Nothing where layers keep anything else, such as a recurrent state.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    backbone = model.base_model
    layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    placed = "position_ids" in inspect.signature(backbone.forward).parameters
    if ids.shape[1] < 2 or not placed or not layers <= {"full_attention", "sliding_attention"}:
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = backbone(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True
    )
    cache = getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache or any(
        type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    ):
        return {}
    cache.batch_select_indices(row)
    return {"past_key_values": cache}


def _processors(how: Sampling, table: Tensor, prompt_length: int) -> list[Any]:
    """What transformers does when it samples, but for the draw.

    Its own draw takes random numbers for the whole batch one after the other, so a response would depend on those
    beside it.
    """
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    def drawn(input_ids: Tensor, scores: Tensor) -> Tensor:
        token = draw(scores, table[:, input_ids.shape[1] - prompt_length].to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0)

    processors: list[Any] = [TemperatureLogitsWarper(float(how.temperature))]
    if how.top_k:
        processors.append(TopKLogitsWarper(how.top_k))
    if how.top_p < 1:
        processors.append(TopPLogitsWarper(float(how.top_p)))
    if how.min_p is not None:
        processors.append(MinPLogitsWarper(float(how.min_p)))
    processors.append(drawn)
    return processors


def _response(ids: list[int], ends: list[int], tokenizer: Any) -> Response:
    count = next((i for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:count], skip_special_tokens=True)
    sampled = ids if count is None else ids[: count + 1]
    return Response(text, len(sampled), count is not None, sampled)
