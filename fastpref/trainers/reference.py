"""The reference policy of a trainer: which model it is, and its log-probs of a whole data set."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpref import models
from fastpref.data.collators import PackedCollator
from fastpref.data.reference_cache import Fingerprint, ReferenceCache
from fastpref.models import inner_model, is_peft
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.loading import disable_dropout

COPY = "ref"  # the adapter that keeps what a PeftModel's own adapter was before training


class Reference:
    """A model of its own, or the policy with its adapters off (or with a frozen copy of the adapter it came with)."""

    def __init__(self, policy: Any, own: Any = None) -> None:
        self.policy, self.own = policy, own

    @classmethod
    def of(cls, policy: Any, ref_model: Any, *, fresh_adapters: bool, keep_copy: bool) -> Reference:
        """`keep_copy`: the policy's weights will change while the reference is still needed."""
        if ref_model is not None and inner_model(ref_model) is inner_model(policy):
            raise ValueError("ref_model: got the policy itself, want another model or None (the policy as it is now)")
        if ref_model is None and is_peft(policy):
            if not fresh_adapters or _initialised_from_weights(policy):
                _copy_adapter(policy)
        elif ref_model is None and keep_copy:
            ref_model = copy.deepcopy(policy)
        if ref_model is not None:
            ref_model.eval().requires_grad_(False)
        return cls(policy, ref_model)

    @property
    def is_lost_by_training(self) -> bool:
        """Is it the policy's own weights, which training changes?"""
        return self.own is None and not is_peft(self.policy)

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """The model to run, under no_grad and in evaluation mode."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.own is not None:
                yield self.own
                return
            training = self.policy.training
            self.policy.eval()
            stack.callback(self.policy.train, training)
            if is_peft(self.policy):
                stack.enter_context(_adapter(self.policy))
            yield self.policy

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        with self.model() as model:
            copied = is_peft(model) and COPY in model.peft_config
            for name, value in model.state_dict().items():
                if not is_peft(model) or "lora_" not in name or (copied and f".{COPY}." in name):
                    yield name, value

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of its weights and its config, as they are when first asked: hashed once for all data sets."""
        found = Fingerprint().weights(self.weights())
        model = self.own or self.policy
        found.config(inner_model(model).config)
        if is_peft(model) and COPY in model.peft_config:
            found.text(json.dumps(model.peft_config[COPY].to_dict(), sort_keys=True, default=str))
        return found.hexdigest()


def _initialised_from_weights(policy: Any) -> bool:
    """PiSSA and its kin move a part of the base weights into the fresh adapter: without it, the model is another."""
    how = getattr(policy.peft_config[policy.active_adapter], "init_lora_weights", True)
    return isinstance(how, str) and how.lower().startswith(("pissa", "olora", "corda", "loftq"))


def _copy_adapter(policy: Any) -> None:
    config = copy.deepcopy(policy.peft_config[policy.active_adapter])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the copy's weights are given, and the base keeps its own
    policy.add_adapter(COPY, config)
    for name, value in policy.named_parameters():
        if f".{policy.active_adapter}." in name:
            policy.get_parameter(name.replace(f".{policy.active_adapter}.", f".{COPY}.")).data.copy_(value.data)


@contextlib.contextmanager
def _adapter(policy: Any) -> Iterator[None]:
    if COPY not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    active = policy.active_adapter
    policy.set_adapter(COPY)
    try:
        yield
    finally:
        policy.set_adapter(active)


def ready_reference(model: Any, collator: PackedCollator, disable: bool) -> None:
    """An explicit reference model, tried on the policy's batches; where it cannot run them, both get padded ones."""
    if disable:
        disable_dropout(model)
    if choose_layout(model, collator.layout) != (collator.layout, collator.ours):
        collator.layout, collator.ours = "padded", False
    models.output_head(inner_model(model))


class SyncReference(TrainerCallback):
    """TR-DPO (arXiv 2404.09656, eq. 3): `reference = alpha * policy + (1 - alpha) * reference`, every so many steps."""

    def __init__(self, reference: Any, unwrap: Callable[[Any], Any]) -> None:
        self.reference, self.unwrap = reference, unwrap

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps:
            return
        models.reshard(self.reference)
        policy = dict(self.unwrap(model).named_parameters())
        for name, value in self.reference.named_parameters():
            value.lerp_(policy[name].to(value.device, value.dtype), args.ref_model_mixup_alpha)


def fingerprint(reference: Reference, dataset: Any, columns: Sequence[str], settings: Sequence[Any]) -> str:
    """Of all that a reference's log-probs depend on: the model, the token ids (and so the tokenizer, the template, the
    data and its truncation), and `settings`."""
    found = Fingerprint().text(reference.fingerprint, *settings, *columns)
    return found.rows(dataset.select_columns(list(columns)), columns).hexdigest()


def fill_cache(
    cache: ReferenceCache, dataset: Any, compute: Callable[[list[dict[str, Any]]], Tensor], *, tokens: int,
    rank: int, world: int, progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Compute what is missing; the ranks share the shards. `compute(examples)` gives `[len(examples), columns]`."""
    for shard, rows in cache.missing():
        if shard % world != rank:  # by its number: another rank may write while this one looks
            continue
        examples = dataset.select(rows).to_list()
        lengths = [e["length"] for e in examples]
        order = sorted(range(len(examples)), key=lengths.__getitem__, reverse=True)  # the largest batch comes first
        found: dict[int, Tensor] = {}
        while order:
            batch = _take(order, lengths, tokens)
            for i, value in zip(batch, compute([examples[i] for i in batch]).cpu(), strict=True):
                found[i] = value
            progress(len(batch))
        cache.write(shard, torch.stack([found[i] for i in range(len(examples))]))


def _take(order: list[int], lengths: Sequence[int], tokens: int) -> list[int]:
    """The next examples within `tokens`, at least one; removed from `order`."""
    taken: list[int] = []
    total = 0
    while order and (not taken or total + lengths[order[0]] <= tokens):
        total += lengths[order[0]]
        taken.append(order.pop(0))
    return taken
