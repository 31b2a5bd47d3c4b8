"""Who is measured at the head. A provider turns a batch into a loss; everything else is common to all."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.objectives import BETA, IGNORE, KTO_Z0, OBJECTIVES, Batch, Objective
from benchmarks.suite import Absent

Loss = Callable[[Batch], Tensor]
TokenLogps = Callable[[Tensor, Tensor, Batch], Tensor]  # (hidden [..., d], labels [...], batch) -> [...]


class Provider(NamedTuple):
    """One way to compute the loss."""

    loss: Loss
    reference: bool = True  # takes the reference model's log-probs


def step(loss: Loss, batch: Batch) -> Tensor:
    """Forward and backward into `.grad`, as in a training loop. Returns the loss, detached."""
    batch.clear_gradients()
    value = loss(batch)
    value.backward()
    return value.detach()


def _from_tokens(objective: Objective, logps: TokenLogps, *, compacted: bool) -> Loss:
    """A loss from a library's token log-probs, of all rows or of the scored ones."""

    def loss(batch: Batch) -> Tensor:
        scored = batch.scored
        if compacted:
            found = logps(batch.hidden[scored], batch.labels[scored], batch)
            tokens = found.new_zeros(scored.shape).masked_scatter(scored, found)
        else:
            tokens = logps(batch.hidden, batch.labels.clamp(min=0), batch).masked_fill(~scored, 0)
        return objective.of_sequences(tokens.sum(1), batch)

    return loss


def _eager(hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    # Lean: nothing holds the logits once log_softmax has its result, which is all that autograd keeps of them.
    logits = F.linear(hidden, batch.weight)
    if batch.softcap is not None:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    logps = logits.log_softmax(-1, dtype=torch.float32)
    del logits
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def products(batch: Batch) -> Callable[[], object]:
    """The plan's own matrix products and nothing else, at full size over the scored rows, in the compute dtype.

    Each allocates its output, like any caller of `torch.mm`.
    """
    rows = batch.hidden.detach()[batch.scored]
    weight = batch.weight.detach()

    def run() -> object:
        u = torch.mm(rows, weight.t())
        d_hidden = torch.mm(u, weight)
        return d_hidden, torch.mm(u.t(), rows) if batch.products == 3 else None

    return run


def products_in_place(batch: Batch) -> Callable[[], object]:
    """The same products into outputs that stay allocated, so that no page of them is ever new.

    No caller who must hand out a gradient can reach this bound.
    """
    rows = batch.hidden.detach()[batch.scored]
    weight = batch.weight.detach()
    u, d_hidden = weight.new_empty(rows.shape[0], weight.shape[0]), torch.empty_like(rows)
    d_weight = torch.empty_like(weight) if batch.products == 3 else None

    def run() -> None:
        torch.mm(rows, weight.t(), out=u)
        torch.mm(u, weight, out=d_hidden)
        if d_weight is not None:
            torch.mm(u.t(), rows, out=d_weight)

    return run


def imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # not every broken installation says ImportError
        raise Absent(f"cannot import {module}: {error}") from error


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("its Triton kernels need a GPU")


def _trl() -> TokenLogps:
    """TRL 1.16's head, asked for log-probs alone.

    TRL's DPO trainer has it compute entropy and more beside them.
    """
    chunk = imported("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE  # the backward imports it too
    function = getattr(imported("trl.kernels"), "ChunkedLogProbFunction", None)
    if function is None:
        raise Absent("trl.kernels has no ChunkedLogProbFunction (want TRL 1.16)")

    def logps(hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        found, *_ = function.apply(rows, batch.weight, None, labels.flatten(), 1.0, chunk, batch.softcap, 1.0, ())
        return found.view(labels.shape)

    return logps


def _torch_linear() -> TokenLogps:
    """PyTorch's own fused head, in chunks, for an arbitrary gradient of each token."""
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")

    def logps(hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        if batch.softcap is not None:
            raise Absent("has no soft cap")
        return -function(hidden, batch.weight, labels, reduction="none", options=options())

    return logps


def _cce() -> TokenLogps:
    """Apple's cut-cross-entropy as it comes, with its gradient filter."""
    function = imported("cut_cross_entropy").linear_cross_entropy

    def logps(hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        return -function(hidden, batch.weight, labels, softcap=batch.softcap, reduction="none")

    return logps


LIGER = {
    "dpo": ("LigerFusedLinearDPOLoss", {"beta": BETA, "use_ref_model": False, "compute_nll_loss": False,
                                        "average_log_prob": False}),
    "simpo": ("LigerFusedLinearSimPOLoss", {"beta": 2.0, "gamma": 0.5, "compute_nll_loss": False}),
    "orpo": ("LigerFusedLinearORPOLoss", {"beta": BETA}),
    "kto": ("LigerFusedLinearKTOLoss", {"beta": BETA, "use_ref_model": False}),
}  # fmt: skip


def _liger(objective: str) -> Loss:
    """Liger's fused losses as they come (compiled), without a reference.

    They take a reference model's hidden states, not its log-probs, and would run that model's head too.
    """
    name, options = LIGER[objective]
    loss_fn = getattr(imported("liger_kernel.chunked_loss"), name)(ignore_index=IGNORE, **options)

    def loss(batch: Batch) -> Tensor:
        if batch.softcap is not None:
            raise Absent("has no soft cap")
        if objective == "kto":
            kl = batch.ref_logps.new_tensor(KTO_Z0)
            return loss_fn(batch.hidden, batch.weight, batch.labels, preference_labels=batch.desirable, kl=kl)[0]
        return loss_fn(batch.weight, batch.hidden, batch.labels)[0]

    return loss


def _liger_cross_entropy() -> Loss:
    module = imported("liger_kernel.transformers.fused_linear_cross_entropy")

    def loss(batch: Batch) -> Tensor:
        loss_fn = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, softcap=batch.softcap)
        return loss_fn(batch.weight, batch.hidden.flatten(0, 1), batch.labels.flatten())

    return loss


NAMES = (
    "fastpref", "fastpref_store", "fastpref_pair", "fastpref_recompute", "eager", "eager_compacted", "eager_compiled",
    "trl", "trl_compacted", "liger", "liger_cross_entropy", "cce", "torch_linear_cross_entropy",
)  # fmt: skip


def names_for(objective: str, trainable: bool) -> tuple[str, ...]:
    """The providers that can compute this objective."""
    inapplicable = {"liger_cross_entropy"} if objective != "nll" else {"liger", "fastpref_pair"}
    if not trainable:  # the plan is `frozen` then, and no other
        inapplicable |= {"fastpref_store", "fastpref_pair", "fastpref_recompute"}
    return tuple(name for name in NAMES if name not in inapplicable)


def provider(name: str, objective_name: str, device: torch.device) -> Provider:
    """A provider by name.

    Raises:
        Absent: it cannot run here.
    """
    objective = OBJECTIVES[objective_name]
    of_tokens = functools.partial(_from_tokens, objective)
    if name.startswith("fastpref"):
        plan = name.removeprefix("fastpref").lstrip("_") or "auto"
        return Provider(lambda batch: objective.fused(batch, plan))
    if name in ("eager", "eager_compacted"):
        return Provider(of_tokens(_eager, compacted=name != "eager"))
    if name == "eager_compiled":
        return Provider(torch.compile(of_tokens(_eager, compacted=False)))
    if name in ("trl", "trl_compacted"):
        # where Triton runs, TRL's patched forward passes the scored rows alone; elsewhere all of them
        if name == "trl_compacted" and device.type == "cuda":
            raise Absent("the same as trl on CUDA, which compacts by itself")
        return Provider(of_tokens(_trl(), compacted=name == "trl_compacted" or device.type == "cuda"))
    if name == "torch_linear_cross_entropy":
        return Provider(of_tokens(_torch_linear(), compacted=True))
    if name == "liger":
        return Provider(_liger(objective_name), reference=False)
    _needs_cuda(device)
    if name == "cce":
        return Provider(of_tokens(_cce(), compacted=True))
    return Provider(_liger_cross_entropy())
