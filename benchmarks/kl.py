"""Suite: KL penalties, exact from logits, exact from hidden states, and estimated from sampled tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from benchmarks import measure
from benchmarks.shapes import HEADS
from benchmarks.suite import Results, Suite, Task
from fastpref import reference

BETA, ESTIMATOR = 0.05, "k3"


class Case(NamedTuple):
    kind: str  # of KINDS
    name: str
    rows: int  # tokens; sequences of 512 of them for the sampled kind
    d: int
    vocab: int
    dtype: torch.dtype
    trainable: bool = False

    @property
    def label(self) -> str:
        head = "" if self.kind != "from hidden states" else f", {'trainable' if self.trainable else 'frozen'} head"
        return f"{self.kind}, {self.name}{head}"


def _eager_kl(policy: Tensor, ref: Tensor) -> Tensor:
    log_p, log_q = (z.log_softmax(-1, dtype=torch.float32) for z in (policy, ref))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _torch_kl(policy: Tensor, ref: Tensor) -> Tensor:
    log_p, log_q = (z.log_softmax(-1, dtype=torch.float32) for z in (policy, ref))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _step(kl: Callable[[], Tensor], inputs: dict[str, Tensor], upstream: Tensor) -> Results:
    """The divergences, and the gradients of `inputs`."""
    for value in inputs.values():
        value.grad = None
    found = kl()
    found.backward(upstream)
    gradients = {f"d_{name}": value.grad for name, value in inputs.items() if value.grad is not None}
    return {"kl": found.detach(), **gradients}


def _truth(kl: Callable[..., Tensor], inputs: dict[str, Tensor], constants: tuple[Tensor, ...], upstream: Tensor):
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    return _step(lambda: kl(*wide.values(), *(c.detach().double() for c in constants)), wide, upstream.double())


def from_logits(case: Case, device: torch.device) -> Task:
    policy, ref = (2 * torch.randn(2, case.rows, case.vocab, device=device)).to(case.dtype).unbind(0)
    inputs, upstream = {"policy": policy.clone().requires_grad_()}, torch.rand(case.rows, device=device)

    def call(kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Results]:
        return lambda: _step(lambda: kl(inputs["policy"], ref), inputs, upstream)

    makers = {
        "fastpref": lambda: call(fastpref.token_kl),
        "eager": lambda: call(_eager_kl),
        "eager_compiled": lambda: call(torch.compile(_eager_kl)),
        "torch_kl_div": lambda: call(_torch_kl),
    }
    size = measure.row_bytes(case.rows, case.vocab, case.dtype.itemsize, 1)
    # both read by the forward and by the backward, which writes one gradient
    return Task(case.label, case.dtype, makers, lambda: _truth(reference.token_kl, inputs, (ref,), upstream),
                bytes=5 * size, peaks={"fastpref": size})  # fmt: skip


def from_hidden(case: Case, device: torch.device) -> Task:
    hidden, ref_hidden = torch.randn(2, case.rows, case.d, device=device).to(case.dtype).unbind(0)
    weight, ref_weight = (
        (torch.randn(2, case.vocab, case.d, device=device) * (2 / case.d**0.5)).to(case.dtype).unbind(0)
    )
    inputs = {"hidden": hidden.clone().requires_grad_()}
    weight = weight.clone().requires_grad_(case.trainable)
    if case.trainable:
        inputs["weight"] = weight
    upstream = torch.rand(case.rows, device=device)

    def call(kl: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Results]:
        return lambda: _step(lambda: kl(inputs["hidden"], weight, ref_hidden, ref_weight), inputs, upstream)

    def fused(*operands: Tensor) -> Tensor:
        return fastpref.linear_token_kl(*operands).kl

    def eager(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor) -> Tensor:
        return _eager_kl(F.linear(h, w), F.linear(ref_h, ref_w))

    def truth() -> Results:
        def kl(h: Tensor, *rest: Tensor) -> Tensor:
            w = rest[0] if case.trainable else weight.detach().double()
            return reference.linear_token_kl(h, w, *rest[-2:])

        return _truth(kl, inputs, (ref_hidden, ref_weight), upstream)

    makers = {
        "fastpref": lambda: call(fused),
        "eager": lambda: call(eager),
        "eager_compiled": lambda: call(torch.compile(eager)),
    }
    products = 4 if case.trainable else 3
    return Task(case.label, case.dtype, makers, truth,
                flops=measure.matmul_flops(case.rows, case.d, case.vocab, products))  # fmt: skip


def penalized(case: Case, device: torch.device) -> Task:
    """From token log-probs and sequence scores to the per-token rewards of RLHF, forward only."""
    shape = (case.rows // 512, 512)
    logps, ref_logps = (-torch.rand(2, *shape, device=device)).unbind(0)
    scores, mask = torch.randn(shape[0], device=device), torch.rand(shape, device=device) > 0.3

    def eager() -> Results:
        return {"rewards": reference.kl_penalized_rewards(scores, logps, ref_logps, mask, BETA, ESTIMATOR)[0]}

    def fused() -> Results:
        return {"rewards": fastpref.kl_penalized_rewards(scores, logps, ref_logps, mask, BETA, ESTIMATOR)}

    def truth() -> Results:
        r, p, q = (x.double() for x in (scores, logps, ref_logps))
        return {"rewards": reference.kl_penalized_rewards(r, p, q, mask, BETA, ESTIMATOR)[0]}

    makers = {
        "fastpref": lambda: fused,
        "eager": lambda: eager,
        "eager_compiled": lambda: torch.compile(eager),
    }
    tokens = case.rows
    return Task(case.label, torch.float32, makers, truth, bytes=tokens * (3 * 4 + 1))


KINDS = {"from logits": from_logits, "from hidden states": from_hidden, "sampled": penalized}


def build(case: Case, device: torch.device) -> Task:
    torch.manual_seed(0)
    return KINDS[case.kind](case, device)


def _case(kind: str, head: str, rows: int, dtype: torch.dtype, trainable: bool = False) -> Case:
    shape = HEADS[head]
    return Case(kind, head, rows, shape.d, shape.vocab, dtype, trainable)


def _cases(head: str, rows: int, dtype: torch.dtype) -> list[Case]:
    exact = functools.partial(_case, head=head, rows=rows, dtype=dtype)
    return [
        exact("from logits"), exact("from hidden states"), exact("from hidden states", trainable=True),
        Case("sampled", "64 x 512 tokens", 64 * 512, 0, 0, torch.float32),
    ]  # fmt: skip


CASES = {
    "small": [Case("from logits", "small", 512, 16, 64, torch.float32)],
    "quick": [case for case in _cases("smollm2-135m", 128, torch.float32) if not case.trainable],
    "cpu": _cases("smollm2-135m", 512, torch.float32),
    "cuda": [*_cases("llama-3-8b", 4096, torch.bfloat16), *_cases("qwen2.5-0.5b", 4096, torch.bfloat16)[:-1]],
}
SUITE = Suite("kl", "KL penalties, exact and sampled", build, CASES)
