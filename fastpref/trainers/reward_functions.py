"""The rewards of sampled responses: any functions with TRL's signature, and reward models."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.data import encode
from fastpref.data.batches import batches_by_length, pad_id, padded
from fastpref.models.adapters import adapter_config
from fastpref.objectives.reward import RewardHead
from fastpref.trainers.loading import load_model

NOT_COLUMNS = ("prompt", "completion", "completion_ids", "prompt_ids")


class RewardFunctions:
    """Calls reward functions on a batch of responses.

    A function is called as TRL calls it, `function(prompts=..., completions=..., completion_ids=..., trainer_state=...,
    log_extra=..., log_metric=..., **columns)`, and returns a number for each response, or None. It may be a coroutine
    function. A reward model is a model for sequence classification with one label, its name, or a `RewardHead`.

    Args:
        functions: one, or several.
        tokenizers: of the models among them; None is the model's own.
        args: the trainer's configuration.
        where: what the functions are called in errors.
    """

    def __init__(self, functions: Any, tokenizers: Any, args: Any, where: str) -> None:
        given = list(functions) if isinstance(functions, list | tuple) else [functions]
        tokenizers = tokenizers if isinstance(tokenizers, list | tuple) else [tokenizers] * len(given)
        if len(tokenizers) != len(given):
            raise ValueError(f"reward_processing_classes: got {len(tokenizers)}, want one for each of {len(given)}")
        self.args, self.functions, self.names = args, [], []
        for i, (function, tokenizer) in enumerate(zip(given, tokenizers, strict=True)):
            if isinstance(function, str | nn.Module):
                function = ScoringModel.of(function, tokenizer, args)
            elif not callable(function):
                raise TypeError(f"{where}[{i}]: got {type(function).__name__}, want a function, a model or its name")
            self.functions.append(function)
            self.names.append(_name(function))
        self.extras: dict[str, list[Any]] = {}
        self.numbers: dict[str, list[float]] = {}

    def __len__(self) -> int:
        return len(self.functions)

    def to(self, device: torch.device) -> None:
        """Moves the models to a device."""
        for function in self.functions:
            if isinstance(function, ScoringModel):
                function.model.to(device)

    def log_extra(self, column: str, values: list[Any]) -> None:
        """What functions call to add a column to the completions that are logged."""
        self.extras.setdefault(column, []).extend(values)

    def log_metric(self, name: str, value: float) -> None:
        """What functions call to log a number."""
        self.numbers.setdefault(name, []).append(float(value))

    def __call__(
        self, records: Sequence[Mapping[str, Any]], completions: Sequence[Any], ids: Sequence[list[int]], state: Any
    ) -> Tensor:
        """Rewards `[n, F]`, fp32, NaN where a function gave none.

        Raises:
            ValueError: a function gave another number of rewards, or something that is no number.
        """
        columns = {n: [record[n] for record in records] for n in records[0] if n not in NOT_COLUMNS}
        given = columns | {
            "prompts": [record["prompt"] for record in records], "completions": list(completions),
            "completion_ids": list(ids), "trainer_state": state, "log_extra": self.log_extra,
            "log_metric": self.log_metric,
        }  # fmt: skip
        found = torch.full((len(records), len(self)), torch.nan)
        waiting = {i: f(**given) for i, f in enumerate(self.functions) if _is_async(f)}
        rewards = _awaited(waiting)
        for i, function in enumerate(self.functions):
            rewards[i] = rewards[i] if i in waiting else function(**given)
            found[:, i] = self._checked(rewards[i], len(records), self.names[i])
        missing = found.isnan().all(1)
        if len(self) and missing.any():
            first = int(missing.nonzero()[0])
            warnings.warn(
                f"reward_funcs: {int(missing.sum())} of {len(records)} responses got no reward from any function, and "
                f"are not learnt from; the first answers {str(records[first]['prompt'])[:200]!r}",
                stacklevel=2,
            )
        return found

    def _checked(self, rewards: Any, number: int, name: str) -> Tensor:
        try:
            found = [torch.nan if reward is None else float(reward) for reward in rewards]
        except (TypeError, ValueError):
            raise ValueError(f"reward_funcs: {name} gave {rewards!r}, want {number} numbers or None") from None
        if len(found) != number:
            raise ValueError(f"reward_funcs: {name} gave {len(found)} rewards, want {number}, one for each response")
        values = torch.tensor(found, dtype=torch.float32)
        if values.isinf().any():
            raise ValueError(f"reward_funcs: {name} gave infinity, want finite numbers, or None for no opinion")
        return values


def _name(function: Any) -> str:
    if isinstance(function, ScoringModel):
        return function.name
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = function if inspect.isfunction(function) or inspect.ismethod(function) else type(function).__call__
    return inspect.iscoroutinefunction(call)


def _awaited(calls: Mapping[int, Any]) -> dict[int, Any]:
    """The results of coroutines that run at once. In a thread, since a notebook has a loop that runs already."""
    if not calls:
        return {}

    async def together() -> list[Any]:
        return await asyncio.gather(*calls.values())

    with ThreadPoolExecutor(1) as pool:
        return dict(zip(calls, pool.submit(asyncio.run, together()).result(), strict=True))


class ScoringModel:
    """A reward model as a reward function. It reads conversations as `RewardTrainer` makes them."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, batch_size: int) -> None:
        self.model, self.tokenizer, self.name, self.batch_size = model.eval(), tokenizer, name, batch_size

    @classmethod
    def of(cls, model: Any, tokenizer: Any, args: Any) -> ScoringModel:
        """From a model or its name.

        Raises:
            ValueError: the model has several labels, as a language model has, or no tokenizer can be found.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        given = model
        if isinstance(model, str):
            # an adapter's configuration is its base model's; a whole model's says whether it is a reward model
            labels = {} if adapter_config(model) is None else {"num_labels": 1}
            model = load_model(model, args, AutoModelForSequenceClassification, **labels)
        if getattr(model.config, "num_labels", 1) != 1:
            raise ValueError(
                f"reward_funcs: got {given if isinstance(given, str) else 'a model'} with {model.config.num_labels} "
                "labels, want 1, as a reward model has"
            )
        name = given if isinstance(given, str) else model.config._name_or_path
        if tokenizer is None:
            if not name:
                raise ValueError("reward_processing_classes: got None for a model that came from no folder, want one")
            tokenizer = AutoTokenizer.from_pretrained(name)
        return cls(_pooled(model), tokenizer, str(name).rstrip("/").split("/")[-1] or type(model).__name__,
                   args.per_device_eval_batch_size)  # fmt: skip

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **unused: Any) -> list[float]:
        rows = []
        for prompt, completion in zip(prompts, completions, strict=True):
            parted = encode.part({"prompt": prompt, "response": completion}, ("response",), self.tokenizer)
            rows.append(parted.prompt + parted.responses[0].ids)
        device, found = next(self.model.parameters()).device, [0.0] * len(rows)
        for chosen in batches_by_length([len(row) for row in rows], self.batch_size):
            ids, mask = padded([rows[i] for i in chosen], pad_id(self.tokenizer, self.model), "right")
            scores = self.model(ids.to(device), mask.to(device))
            for i, score in zip(chosen, getattr(scores, "logits", scores).flatten().tolist(), strict=True):
                found[i] = score
        return found


def _pooled(model: nn.Module) -> nn.Module:
    """A classifier that reads the last real token, whatever pads it. Of a model with another head, the model itself."""
    score = getattr(model, "score", None)
    backbone = getattr(model, "base_model", model)
    if isinstance(model, RewardHead) or type(score) is not nn.Linear or backbone is model:
        return model
    return RewardHead(backbone, score)
