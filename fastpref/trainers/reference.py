"""The reference of a trainer: which model it is, and how its log-probs of a whole data set are computed."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from fastpref import models
from fastpref.data import formats
from fastpref.data.batches import by_prompt
from fastpref.data.collators import PackedCollator
from fastpref.data.reference_cache import Fingerprint, ReferenceCache
from fastpref.models import adapters, inner_model, is_peft
from fastpref.models.adapters import Snapshot, initialised_from_weights
from fastpref.trainers.config import unsupported
from fastpref.trainers.layout import choose_layout
from fastpref.trainers.loading import disable_dropout


class Reference:
    """The reference policy. It is one of these:

    - a model of its own (`own`): given by the user, or a copy of the policy;
    - the policy with its adapters off, and with what else trains as it was (`before`);
    - the policy with its adapters on, and with all that trains as it was (`before`);
    - the policy itself, where the log-probs are computed before training begins.
    """

    def __init__(self, policy: Any, own: Any = None, before: Snapshot | None = None, adapted: bool = True) -> None:
        self.policy, self.own, self.before, self._adapted = policy, own, before, adapted

    @classmethod
    def of(cls, policy: Any, ref_model: Any, *, fresh_adapters: bool, keep_copy: bool) -> Reference:
        """Chooses the reference.

        Args:
            policy: the model that trains.
            ref_model: the reference that the user gave, or None.
            fresh_adapters: the policy's adapters are new, from `peft_config`.
            keep_copy: the policy's weights will change while the reference is still needed.

        Raises:
            ValueError: `ref_model` is the policy itself.
        """
        if ref_model is not None and inner_model(ref_model) is inner_model(policy):
            raise ValueError("ref_model: got the policy itself, want another model or None (the policy as it is now)")
        if ref_model is None and is_peft(policy):
            off = fresh_adapters and not initialised_from_weights(policy.peft_config[policy.active_adapter])
            return cls(policy, before=Snapshot(policy, outside=off), adapted=not off)
        if ref_model is None and keep_copy:
            ref_model = copy.deepcopy(policy).requires_grad_(False)
        return cls(policy, None if ref_model is None else ref_model.eval())  # what was given may be trained later

    @property
    def is_lost_by_training(self) -> bool:
        """Whether the reference is the policy's own weights, which training changes."""
        return self.own is None and self.before is None

    @contextlib.contextmanager
    def model(self) -> Iterator[Any]:
        """The model to run, under `no_grad`, in evaluation mode."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if self.own is not None:
                yield self.own
                return
            stack.enter_context(models.evaluating(self.policy))
            if not self._adapted:
                stack.enter_context(adapters.adapters_off(self.policy))
            if self.before is not None:
                stack.enter_context(self.before.restored())
            yield self.policy

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of its weights, config and adapters, taken when first asked and used for all data sets."""
        with self.model() as model:
            unused = set() if self._adapted else adapters.own_names(model)
            found = Fingerprint().weights((n, v) for n, v in model.state_dict().items() if n not in unused)
            found.config(inner_model(model).config)
            return (found.text(adapters.describe(model)) if self._adapted else found).hexdigest()


def ready_reference(model: Any, collator: PackedCollator, disable: bool) -> None:
    """Tries an explicit reference model on the policy's batches.

    If it cannot run their layout, policy and reference both get padded batches.
    """
    if disable:
        disable_dropout(model)
    models.keep_arithmetic(model, for_good=True)
    if choose_layout(model, collator.layout, collator.pictures()) != (collator.layout, collator.ours):
        collator.layout, collator.ours = "padded", False
    models.output_head(inner_model(model))


def came_with(dataset: Any, columns: Sequence[str]) -> bool:
    """Whether a data set has a reference's log-probs, in these columns.

    Raises:
        ValueError: it has some of the columns only.
    """
    there = [name for name in columns if name in formats.column_names(dataset)]
    if there and len(there) < len(columns):
        missing = ", ".join(name for name in columns if name not in there)
        raise ValueError(f"{there[0]}: got a data set that has it without {missing}, want both or neither")
    return bool(there)


def check_moves(policy: Any, trainer: Any) -> None:
    """Checks that a trainer can move its reference towards the policy.

    Raises:
        ValueError: it cannot.
    """
    from torch.distributed.fsdp import FSDPModule

    if is_peft(policy):
        raise ValueError("sync_ref_model: got True with adapters, want False: a reference has other parameters")
    if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
        raise unsupported("sync_ref_model", True, "want DDP or FSDP2: elsewhere it would not be resumed from")
    if trainer.is_fsdp_enabled and not hasattr(FSDPModule, "reset_iter_state"):
        reason = f"FSDP2 of torch {torch.__version__} keeps a part whole that had no backward; want 2.13, or DDP"
        raise unsupported("sync_ref_model", True, reason)


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
    """A hash of all that a reference's log-probs depend on: the model, the token ids and `settings`.

    The token ids stand for the tokenizer, the template, the data and its truncation.
    """
    found = Fingerprint().text(reference.fingerprint, *settings, *columns)
    return found.rows(dataset.select_columns(list(columns)), columns).hexdigest()


def fill_cache(
    cache: ReferenceCache, dataset: Any, compute: Callable[[list[dict[str, Any]]], Iterable[Tensor]], *, tokens: int,
    rank: int, world: int, progress: Callable[[int], None],
    joined: Callable[[list[Tensor]], Tensor] = torch.stack,
) -> None:  # fmt: skip
    """Computes what the cache lacks. The ranks share the shards.

    `compute` gives the values of each example, on the CPU. `joined` makes a shard of them.
    """
    for shard, rows in cache.missing():
        if shard % world != rank:  # by its number: another rank may write while this one looks
            continue
        examples = dataset.select(rows).to_list()
        lengths = [e["length"] for e in examples]
        order = by_prompt([e.get("prompt_ids") or () for e in examples], lengths)
        found: dict[int, Tensor] = {}
        while order:
            batch = _take(order, lengths, tokens)
            for i, value in zip(batch, compute([examples[i] for i in batch]), strict=True):
                found[i] = value
            progress(len(batch))
        cache.write(shard, joined([found[i] for i in range(len(examples))]))


def _take(order: list[int], lengths: Sequence[int], tokens: int) -> list[int]:
    """Takes the next examples that fit within `tokens`, at least one, out of `order`."""
    taken: list[int] = []
    total = 0
    while order and (not taken or total + lengths[order[0]] <= tokens):
        total += lengths[order[0]]
        taken.append(order.pop(0))
    return taken


class Progress:
    """A tqdm bar that appears only once something is computed: a full cache shows none."""

    def __init__(self, text: str, total: int, disable: bool | None) -> None:
        self._options = {"desc": text, "total": total, "disable": disable}
        self._bar: Any = None

    def __enter__(self) -> Callable[[int], None]:
        return self._advance

    def _advance(self, number: int) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(**self._options)
        self._bar.update(number)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
