"""One cell of the matrix: two updates, each one's loss and gradients beside those in fp64."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import datasets
import torch
import torch.nn.functional as F
import transformers
from support import relative_error
from torch import Tensor, nn

import fastpref
from fastpref import trainers
from fastpref.data.collate import TokenizedPair
from fastpref.integrations import trl as fast_trl
from fastpref.integrations.transformers import PreferenceLossMixin, batch_loss, pair_batch, reference_logps
from fastpref.models import output_head, unwrapped
from tests import support_ranks, trl_hosts
from tests.matrix import fp64, models
from tests.matrix.fp64 import BETA, GAMMA
from tests.matrix.table import ADAPTED, Cell

STEPS, ALPHA, LEARNING_RATE = 2, 0.6, 0.05
ADAPTERS = ADAPTED.split()
# what a host is without fastpref: TRL's trainers, or a loop over logits
OWN = {"patch": "trl", "subclass": "trl", "trainers": "trl", "mixin": "logits", "loop": "logits"}


class Errors(NamedTuple):
    """Root mean squares over the updates: of the loss (absolute: it is of size 1), of the gradients (relative)."""

    loss: float
    gradients: float
    said: list[str]  # warnings


class PairTrainer(PreferenceLossMixin, transformers.Trainer):
    pass


class Judge:
    """Follows a run: before each update the loss and gradients in fp64, after it those that were found."""

    def __init__(self, cell: Cell, explicit: Any, named: Callable[[], nn.Module]) -> None:
        self.cell, self.named = cell, named
        self.policy = fp64.twin(cell.trains)
        self.reference = None if cell.reference == "none" else self._reference(explicit)
        self.loss_errors: list[float] = []
        self.gradient_errors: list[float] = []

    def _reference(self, explicit: Any) -> Any:
        if explicit is not None:
            return fp64.put(fp64.twin("all"), models.whole_weights(explicit))
        return fp64.put(fp64.twin(self.cell.trains), models.whole_weights(self.named()))

    def _reference_sums(self) -> Tensor | None:
        if self.reference is None:
            return None
        adapters = hasattr(self.reference, "disable_adapter")
        # the reference of an adapter that goes on is that adapter as it came; loops have only "adapters off"
        kept = self.cell.trains == "continued" and self.cell.host not in ("mixin", "loop", "logits")
        off = self.reference.disable_adapter() if adapters and not kept else contextlib.nullcontext()
        with torch.no_grad(), off:
            return fp64.logps(self.reference, models.sequences(models.pairs()))[:, 0]

    def before(self) -> None:
        fp64.put(self.policy, models.whole_weights(self.named()))
        self.policy.zero_grad()
        self.wanted = fp64.loss(self.policy, self._reference_sums(), models.pairs())
        self.wanted.backward()

    def after(self, loss: Tensor, scale: float = 1.0) -> None:
        loss = loss.detach().double()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)
            loss /= torch.distributed.get_world_size()
        found, wanted = models.whole_gradients(self.named()), models.whole_gradients(self.policy)
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        self.loss_errors.append(float(loss - self.wanted))
        flat = [torch.cat([gradients[name].flatten() for name in wanted]) for gradients in (found, wanted)]
        self.gradient_errors.append(relative_error(flat[0] / scale, flat[1]))

    def updated(self) -> None:
        """TR-DPO, arXiv 2404.09656, eq. 3."""
        if self.cell.reference == "synchronised":
            policy = models.whole_weights(self.named())
            for name, value in self.reference.named_parameters():
                value.data.lerp_(policy[name], ALPHA)

    def errors(self, said: list[str]) -> Errors:
        assert len(self.loss_errors) == STEPS
        return Errors(
            *(math.sqrt(sum(e * e for e in es) / STEPS) for es in (self.loss_errors, self.gradient_errors)), said
        )


def run(cell: Cell, folder: Path) -> Errors:
    """The cell's errors.

    Raises:
        ValueError: it is refused.
    """
    wrapper = cell.ranks
    with (
        support_ranks.fresh(wrapper), half_on_cpu(), warnings.catch_warnings(record=True) as said,
        fast_trl.patched() if cell.host == "patch" else contextlib.nullcontext(),
    ):  # fmt: skip
        warnings.simplefilter("always")
        torch.manual_seed(0)
        explicit = models.base("all", cell.precision, seed=1).eval() if cell.reference == "explicit" else None
        judge = (loop if cell.host in ("loop", "logits") else trainer)(cell, explicit, folder)
        return judge.errors([str(w.message) for w in said])


class Found(NamedTuple):
    errors: Errors | None
    error: str = ""  # the type and the text of what was raised instead


def attempt(cell: Cell, folder: Path) -> Found:
    try:
        return Found(run(cell, folder))
    except Exception as error:  # the table says which cells raise what
        return Found(None, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def half_on_cpu() -> Iterator[None]:
    """fp16 autocast and its loss scaling, which Accelerate has on a GPU only."""
    init = accelerate.Accelerator.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.native_amp = self.state.mixed_precision != "no"
        if self.state.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    accelerate.Accelerator.__init__ = __init__
    try:
        yield
    finally:
        accelerate.Accelerator.__init__ = init


_own: dict[Cell, Errors] = {}


def own_errors(cell: Cell, folder: Path) -> Errors:
    """The host's own, on one rank; those of a loop over logits where TRL cannot run it."""
    for host in dict.fromkeys((OWN[cell.host], "logits")):
        own = cell._replace(host=host, layout="padded", ranks="one")
        if own not in _own:
            found = attempt(own, folder / str(own))
            if found.errors is None:
                continue
            _own[own] = found.errors
        return _own[own]
    raise AssertionError(f"{cell}: not even a loop over logits runs it")


# trainers


def arguments(cell: Cell, folder: Path) -> dict[str, Any]:
    batch = len(models.pairs()) if cell.ranks == "one" else len(models.pairs()) // 2
    found = support_ranks.options(cell.ranks, batch, max_steps=STEPS, learning_rate=LEARNING_RATE)
    del found["gradient_checkpointing"], found["max_length"]  # the hosts' own
    found |= {"bf16": cell.precision == "bf16", "fp16": cell.precision == "fp16", "output_dir": str(folder)}
    if cell.host != "mixin":
        found |= {"beta": BETA}
    if cell.reference in ("precomputed", "online", "explicit") and cell.host != "mixin":
        found["precompute_ref_log_probs"] = cell.reference == "precomputed"
    if cell.reference == "synchronised":
        found |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": ALPHA}
    return found


def built(cell: Cell, explicit: Any, folder: Path) -> Any:
    model, given = models.base(cell.trains, cell.precision), arguments(cell, folder)
    extra: dict[str, Any] = {"processing_class": models.tokenizer()}
    reference_free = cell.reference == "none"
    if explicit is not None:
        extra["ref_model"] = explicit
    if cell.trains in ADAPTERS and cell.trains != "continued" and cell.host != "mixin":
        torch.manual_seed(3)
        extra["peft_config"] = models.lora(cell.trains)
    else:
        model = models.adapted(model, cell.trains)
    if cell.host == "mixin":
        return mixin(cell, model, explicit, given)
    if cell.host == "trainers":
        kind = "SimPO" if reference_free else "DPO"
        given |= {"layout": cell.layout, "fp16": False}
        given |= {"simpo_gamma": GAMMA} if reference_free else {"reference_cache": str(folder / "reference")}
        trainer_class, config_class = getattr(trainers, f"{kind}Trainer"), getattr(trainers, f"{kind}Config")
        args = config_class(**given)
        if cell.precision == "fp16":  # as on a GPU
            args.fp16, args.mixed_precision = True, "fp16"
    else:
        trainer_class, config_class = trl_hosts.trainer_class("cpo" if reference_free else "dpo")
        if cell.host == "subclass":
            trainer_class = fast_trl.DPOTrainer
        if reference_free:
            given |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": BETA * GAMMA / BETA, "max_length": 64}
        args = config_class(**given)
    found = trainer_class(model=model, args=args, train_dataset=data(folder), **extra)
    if getattr(found, "packing", None) is not None and cell.layout != "shared":
        found.packing.layout, found.packing.ours = cell.layout, cell.layout == "packed"
    return found


def data(folder: Path) -> Any:
    """On disk: TRL's ranks share what one of them precomputed in the folder that a data set came from."""
    path = folder / "data"
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        trl_hosts.dataset("dpo").save_to_disk(path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return datasets.load_from_disk(path)


def mixin(cell: Cell, model: Any, explicit: Any, given: dict[str, Any]) -> Any:
    del given["max_steps"]
    rows = [TokenizedPair(*pair) for pair in models.pairs()]
    pad, ref_logps, reference = models.tokenizer().pad_token_id, {}, None
    if cell.reference == "precomputed":
        output_head(model)
        batch = pair_batch(rows, pad)
        with autocast(cell):
            found = reference_logps(model, batch).chunk(2)
        ref_logps = {id(row): sides for row, sides in zip(rows, zip(*found, strict=True), strict=True)}
    elif cell.reference == "explicit":
        reference = explicit
    elif cell.reference == "online":
        reference = "adapters" if cell.trains in ADAPTERS else copy.deepcopy(model)

    def collate(taken: list) -> dict[str, Tensor]:
        batch = pair_batch(taken, pad)
        if ref_logps:
            batch["ref_logps"] = torch.stack([ref_logps[id(row)][side] for side in (0, 1) for row in taken])
        return batch

    args = transformers.TrainingArguments(
        max_steps=STEPS, remove_unused_columns=False, gradient_checkpointing=True, **given
    )
    return PairTrainer(model, args, collate, rows, loss_fn=loss_fn(cell), ref_model=reference)


def trainer(cell: Cell, explicit: Any, folder: Path) -> Judge:
    found = built(cell, explicit, folder)
    judge = Judge(cell, explicit, lambda: found.accelerator.unwrap_model(found.model))
    step = found.training_step

    def judged(*args: Any, **kwargs: Any) -> Tensor:
        if judge.loss_errors:
            judge.updated()
        judge.before()
        loss = step(*args, **kwargs)
        scaler = found.accelerator.scaler
        judge.after(loss, 1.0 if scaler is None else scaler.get_scale())
        return loss

    found.training_step = judged
    found.train()
    return judge


# loops


def loss_fn(cell: Cell) -> nn.Module:
    return fastpref.SimPOLoss(BETA, GAMMA) if cell.reference == "none" else fastpref.DPOLoss(BETA)


def autocast(cell: Cell) -> contextlib.AbstractContextManager:
    if cell.precision in ("bf16", "fp16"):
        return torch.autocast("cpu", models.DTYPES[cell.precision])
    return contextlib.nullcontext()


def loop(cell: Cell, explicit: Any, folder: Path) -> Judge:
    """`batch_loss`, or ("logits") what it replaces."""
    model = models.adapted(models.base(cell.trains, cell.precision), cell.trains).train()
    output_head(model)
    wrapped: Any = model
    judge = Judge(cell, explicit, lambda: unwrapped(wrapped))
    reference = explicit
    if reference is None and cell.reference != "none":
        reference = copy.deepcopy(model).eval()
    rows, pad = [TokenizedPair(*pair) for pair in models.pairs()], models.tokenizer().pad_token_id
    if cell.ranks != "one":
        rank = torch.distributed.get_rank()
        rows = rows[2 * rank : 2 * rank + 2]
    batch = pair_batch(rows, pad)
    if cell.ranks == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    elif cell.ranks == "fsdp2":
        for unit in (*(m for m in model.modules() if type(m).__name__ == support_ranks.LAYER), model):
            torch.distributed.fsdp.fully_shard(unit)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    scaler, function = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=cell.precision == "fp16"), loss_fn(cell)
    step = eager_loss if cell.host == "logits" else fast_loss
    for _ in range(STEPS):
        judge.before()
        optimizer.zero_grad()
        with autocast(cell):
            loss = step(function, wrapped, reference, batch)
        scaler.scale(loss).backward()
        judge.after(loss, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
    return judge


def fast_loss(function: Any, model: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    given = {} if reference is None else {"ref_logps": reference_logps(reference, batch)}
    return batch_loss(function, model, batch | given).loss


def eager_loss(function: Any, model: Any, reference: Any, batch: dict[str, Tensor]) -> Tensor:
    def sums(of: Any) -> tuple[Tensor, Tensor]:
        logits = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        scored = batch["shift_labels"] != -100
        logps = (
            logits.float().log_softmax(-1).gather(-1, batch["shift_labels"].clamp(min=0)[..., None])[..., 0] * scored
        )
        return logps.sum(1), logps.sum(1) / scored.sum(1)

    if reference is None:
        chosen, rejected = sums(model)[1].chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()
    off = reference.disable_adapter() if hasattr(reference, "disable_adapter") else contextlib.nullcontext()
    with torch.no_grad(), off:
        wanted = sums(reference)[0]
    chosen, rejected = (sums(model)[0] - wanted).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()
