"""Who is measured: each provider turns a batch into the DPO loss, everything else is common."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref

BETA = 0.1
IGNORE = -100


class Batch(NamedTuple):
    """A padded `[B chosen; B rejected]` batch at the head's input."""

    hidden: Tensor  # [2B, T, d], requires grad
    weight: Tensor  # [V, d], requires grad when the head is trained
    labels: Tensor  # [2B, T], IGNORE on prompts and padding
    ref_logps: Tensor  # [2B]
    softcap: float | None

    @property
    def scored(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def products(self) -> int:
        """Matrix products that forward and backward cannot do without."""
        return 3 if self.weight.requires_grad else 2

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


class Provider(NamedTuple):
    name: str
    what: str
    loss: Callable[[Batch], Tensor]
    peer: bool = False
    reference: bool = True  # takes the reference model's log-probs


class Absent(Exception):
    """A provider that cannot run here, and why."""


def step(provider: Provider, batch: Batch) -> Tensor:
    """Forward and backward into `.grad`, as a training loop has it. Returns the loss, detached."""
    batch.clear_gradients()
    loss = provider.loss(batch)
    loss.backward()
    return loss.detach()


def dpo(sequence_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Rafailov et al. 2023 eq. 7, from summed log-probs `[2B]`."""
    chosen, rejected = (sequence_logps - ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def _dpo_of_tokens(token_logps: Tensor, batch: Batch) -> Tensor:
    return dpo(token_logps.masked_fill(~batch.scored, 0).sum(1), batch.ref_logps)


def _spread(token_logps: Tensor, batch: Batch) -> Tensor:
    """Log-probs of the scored rows back at their places, zeros elsewhere."""
    scored = batch.scored
    return token_logps.new_zeros(scored.shape).masked_scatter(scored, token_logps)


def _logprobs(hidden: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    # Lean: nothing holds the logits once log_softmax has its result, which is all that autograd keeps of them.
    logits = F.linear(hidden, batch.weight)
    if batch.softcap is not None:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    logps = logits.log_softmax(-1, dtype=torch.float32)
    del logits
    return logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _eager(batch: Batch) -> Tensor:
    return _dpo_of_tokens(_logprobs(batch.hidden, batch.labels, batch), batch)


def _eager_compacted(batch: Batch) -> Tensor:
    logps = _logprobs(batch.hidden[batch.scored], batch.labels[batch.scored], batch)
    return _dpo_of_tokens(_spread(logps, batch), batch)


def _fastpref(batch: Batch) -> Tensor:
    loss = fastpref.DPOLoss(beta=BETA)
    return loss.from_hidden(
        batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps, softcap=batch.softcap
    ).loss


def products(batch: Batch) -> Callable[[], object]:
    """The plan's own matrix products and nothing else: full size over the scored rows, in the compute dtype, each
    allocating its output as any caller of `torch.mm` would."""
    rows = batch.hidden.detach()[batch.scored]
    weight = batch.weight.detach()

    def run() -> object:
        u = torch.mm(rows, weight.t())
        d_hidden = torch.mm(u, weight)
        return d_hidden, torch.mm(u.t(), rows) if batch.products == 3 else None

    return run


def products_in_place(batch: Batch) -> Callable[[], object]:
    """The same into outputs that stay allocated: no page of them is ever new, a bound that no caller reaches who
    must hand out a gradient."""
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


def _imported(module: str) -> object:
    try:
        return importlib.import_module(module)
    except Exception as error:  # not every broken installation says ImportError
        raise Absent(f"cannot import {module}: {error}") from error


def _load_trl(*, compacted: bool, device: torch.device) -> Callable[[Batch], Tensor]:
    """TRL 1.16's head, asked for log-probs alone (its DPO trainer has it compute entropy and more beside them), on
    the rows that its patched forward passes: the scored ones where Triton runs, all of them elsewhere."""
    utils = _imported("trl.trainer.utils")  # the backward imports it
    function = getattr(_imported("trl.kernels"), "ChunkedLogProbFunction", None)
    if function is None:
        raise Absent("trl.kernels has no ChunkedLogProbFunction (want TRL 1.16)")
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE  # type: ignore[attr-defined]
    if compacted and device.type == "cuda":
        raise Absent("the same as trl on CUDA, which compacts by itself")

    def loss(batch: Batch) -> Tensor:
        compact = compacted or batch.hidden.is_cuda
        if compact:
            rows, labels = batch.hidden[batch.scored], batch.labels[batch.scored]
        else:
            rows, labels = batch.hidden.flatten(0, 1), batch.labels.clamp(min=0).flatten()
        logps, *_ = function.apply(rows, batch.weight, None, labels, 1.0, chunk, batch.softcap, 1.0, ())
        return _dpo_of_tokens(_spread(logps, batch) if compact else logps.view(batch.labels.shape), batch)

    return loss


def _load_liger() -> Callable[[Batch], Tensor]:
    """Liger's fused DPO as it comes (compiled), without a reference: it takes a reference model's hidden states,
    not its log-probs, and would run that model's head too."""
    module = _imported("liger_kernel.chunked_loss")
    loss_fn = module.LigerFusedLinearDPOLoss(  # type: ignore[attr-defined]
        ignore_index=IGNORE, beta=BETA, compute_nll_loss=False, use_ref_model=False, average_log_prob=False
    )

    def loss(batch: Batch) -> Tensor:
        if batch.softcap is not None:
            raise Absent("has no softcap")
        return loss_fn(batch.weight, batch.hidden, batch.labels)[0]

    return loss


def _provider(name: str, device: torch.device) -> Provider:
    if name == "fastpref":
        return Provider(name, "DPOLoss.from_hidden", _fastpref)
    if name == "eager":
        return Provider(name, "logits, log_softmax, gather", _eager)
    if name == "eager_compacted":
        return Provider(name, "the same on the scored rows", _eager_compacted)
    if name == "eager_compiled":
        return Provider(name, "torch.compile of eager", torch.compile(_eager))
    if name == "trl":
        loss = _load_trl(compacted=False, device=device)
        return Provider(name, "TRL's ChunkedLogProbFunction", loss, peer=True)
    if name == "trl_compacted":
        loss = _load_trl(compacted=True, device=device)
        return Provider(name, "the same on the scored rows", loss, peer=True)
    return Provider("liger", "Liger's fused DPO, no reference", _load_liger(), peer=True, reference=False)


NAMES = ("fastpref", "eager", "eager_compacted", "eager_compiled", "trl", "trl_compacted", "liger")


def load(names: Iterable[str], device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """(providers that can run here, name -> reason for the others)."""
    found, absent = [], {}
    for name in names:
        try:
            found.append(_provider(name, device))
        except Absent as error:
            absent[name] = str(error)
    return found, absent
