"""Input families: what the operators are fed. Numbers are drawn from a seed, on the device itself."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref import reference

IGNORE = -100
# family -> what it is there for
FAMILIES = {
    "random": "ordinary rows, a bias, some ignored labels",
    "peaky": "one logit dominates, and most labels are that one: 1 - p cancels",
    "tie": "equal logits, in pairs and in whole rows; equal pairs",
    "extreme": "logits of +-1e4, margins in the hundreds",
    "masked": "a vocabulary with -inf columns, every other row ignored",
    "empty": "nothing to score: an empty completion, or no label at all",
    "transform": "logit_scale, softcap and temperature, well into saturation",
    "odd": "a vocabulary of odd size, longer than one block of the kernels",
    "integers": "saturated rows of integers: every sum is exact",
}


class Size(NamedTuple):
    """The sizes of the cases on one kind of device."""

    rows: int
    hidden: int
    vocab: int  # a power of two: means of integers must be exact
    odd_vocab: int
    odd_rows: int
    pairs: int
    tokens: int  # of the longest sequence


SIZES = {
    "cpu": Size(rows=40, hidden=48, vocab=512, odd_vocab=5003, odd_rows=22, pairs=4, tokens=12),
    "cuda": Size(rows=512, hidden=512, vocab=32768, odd_vocab=50257, odd_rows=256, pairs=4, tokens=64),
}
LARGE_VOCABULARIES = (151665, 262144)  # on an accelerator: Qwen's odd one, and Gemma's


class Inputs(NamedTuple):
    """What an operator is fed. Its tensors are attributes by their names."""

    floats: dict[str, Any]  # tensors in the case's dtype; gradients are taken with respect to some of them
    fixed: dict[str, Any]  # labels, offsets, reference log-probs
    transform: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        for found in (self.floats, self.fixed):
            if name in found:
                return found[name]
        raise AttributeError(name)


class Draw:
    """One family's random numbers: the same for every operator, backend and dtype that asks."""

    def __init__(self, family: str, dtype: torch.dtype, device: torch.device) -> None:
        self.family, self.dtype, self.device = family, dtype, device
        self.size = SIZES.get(device.type, SIZES["cuda"])
        self.generator = torch.Generator(device).manual_seed(zlib.crc32(family.encode()))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    @property
    def vocab(self) -> int:
        if self.family.startswith("V="):
            return int(self.family[2:])
        return self.size.odd_vocab if self.family == "odd" else self.size.vocab

    @property
    def rows(self) -> int:
        return self.size.rows if self.vocab == self.size.vocab else self.size.odd_rows

    def upstream(self, like: Tensor) -> Tensor:
        """An arbitrary gradient for a result. It is exact in fp32, and a small integer where sums must be exact."""
        values = self.integers(-3, 4, *like.shape) if self.family == "integers" else self.normal(*like.shape)
        return values.to(torch.float64)


def head(draw: Draw, labels: Tensor | None = None) -> Inputs:
    """Hidden states `[n, d]`, a head `[V, d]`, labels `[n]`. If labels are given, they say which rows are scored."""
    n, d, vocab = draw.rows if labels is None else labels.numel(), draw.size.hidden, draw.vocab
    ignored = draw.uniform(n) < (0.5 if draw.family == "masked" else 0.15)
    if draw.family == "empty":
        ignored[:] = True
    if labels is not None:
        ignored = labels.reshape(-1) == IGNORE
    y = draw.integers(0, vocab, n)
    floats: dict[str, Any] = {}
    transform: dict[str, Any] = {}
    if draw.family == "integers":
        floats, transform, y = _saturated(draw, y)
    else:
        hidden, weight = draw.normal(n, d), draw.normal(vocab, d) * (2 / d**0.5)
        if draw.family == "peaky":  # the direction of one token's row, so that its logit is about 20
            top = torch.where(draw.uniform(n) < 0.7, y, draw.integers(0, vocab, n))
            hidden += 20 * weight[top] / weight[top].square().sum(1, keepdim=True)
        elif draw.family == "tie":
            weight[1::2] = weight[: vocab // 2 * 2 : 2]
            hidden[::5] = 0
        elif draw.family == "extreme":
            hidden *= 3000
            weight[1::2] = weight[: vocab // 2 * 2 : 2]  # the largest logit twice: an entropy of log 2, not of 1e-300
        elif draw.family == "transform":
            transform = {"temperature": 0.7, "logit_scale": 1.5, "softcap": 8.0}
            hidden *= 2
        floats = {"hidden": hidden, "weight": weight}
        if draw.family in ("random", "masked", "transform"):
            floats["bias"] = draw.normal(vocab)
        if draw.family == "masked":  # a padded vocabulary and some forbidden tokens
            floats["bias"][vocab - vocab // 16 :] = float("-inf")
            floats["bias"][3::50] = float("-inf")
            y = torch.where(floats["bias"][y].isinf(), y // 50 * 50 % (vocab - vocab // 8), y)
    floats = {name: value.to(draw.dtype) for name, value in floats.items()}
    y = y.masked_fill(ignored, IGNORE)
    return Inputs(floats, {"labels": y if labels is None else y.view(labels.shape)}, transform)


def _saturated(draw: Draw, y: Tensor) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Integers such that each row has one logit at least 1024 above all others, after the temperature.

    So softmax is 0 or 1 even in fp64, and U is -1, 0 or 1. Everything fits the 8 bits of bf16.
    """
    n, d, vocab = y.numel(), draw.size.hidden, draw.vocab
    spikes = 4
    hidden, weight = draw.integers(-1, 2, n, d), draw.integers(-1, 2, vocab, d)
    hidden[:, 20:], weight[:, :spikes] = 0, 0  # at most 16 from the others
    kind = draw.integers(0, spikes, n)
    hidden[:, :spikes] = torch.nn.functional.one_hot(kind, spikes)
    top = 5 + 11 * torch.arange(spikes, device=draw.device)
    weight[top] = 0
    weight[top, torch.arange(spikes, device=draw.device)] = 64
    y = torch.where(draw.uniform(n) < 0.3, top[kind], y)
    return {"hidden": hidden.float(), "weight": weight.float()}, {"temperature": 1 / 32}, y


def logits(draw: Draw) -> Inputs:
    """The logits of `head`, rounded to the dtype."""
    return _as_logits(head(draw))


def _as_logits(x: Inputs) -> Inputs:
    wide = {name: value.double() for name, value in x.floats.items()}
    dtype = x.floats["hidden"].dtype
    z = torch.nn.functional.linear(wide["hidden"], wide["weight"], wide.get("bias"))
    z = z.view(*x.fixed["labels"].shape, -1)
    return Inputs({"logits": z.to(dtype)}, x.fixed, x.transform)


def _completions(draw: Draw, *, packed: bool) -> tuple[Tensor, Tensor | None]:
    """Which rows are scored, and where sequences begin.

    Returns:
        (0 on scored rows and IGNORE on prompts and padding, cu_seqlens): `[2B, T]`, or `[N]` if packed.
    """
    sequences, longest = 2 * draw.size.pairs, draw.size.tokens
    lengths = draw.integers(longest // 2, longest + 1, sequences)
    at = torch.arange(longest, device=draw.device)
    labels = torch.where((at >= 2) & (at < lengths[:, None]), 0, IGNORE)
    if draw.family == "empty":
        labels[1] = IGNORE
    if not packed:
        return labels, None
    inside = at < lengths[:, None]
    return labels[inside], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _with_reference(draw: Draw, x: Inputs, logps: Tensor, cu_seqlens: Tensor | None) -> Inputs:
    """Reference log-probs a few nats away from the policy's."""
    sums = reference.sequence_logprobs(logps, x.fixed["labels"], cu_seqlens=cu_seqlens)
    away = draw.upstream(sums) * (16 if draw.family == "integers" else 3)
    refs = (sums + away).to(torch.float64 if draw.dtype == torch.float64 else torch.float32)
    return x._replace(fixed=x.fixed | {"ref_logps": refs, "cu_seqlens": cu_seqlens})


def pair_logits(draw: Draw) -> Inputs:
    labels, _ = _completions(draw, packed=False)
    x = _as_logits(head(draw, labels))
    logps = reference.token_logprobs(x.logits.double(), x.labels, **x.transform)
    return _with_reference(draw, x, logps, None)


def pair_hidden(draw: Draw) -> Inputs:
    labels, cu_seqlens = _completions(draw, packed=True)
    x = head(draw, labels)
    wide = {name: value.double() for name, value in x.floats.items()}
    logps = reference.linear_token_logprobs(labels=x.labels, **wide, **x.transform)
    return _with_reference(draw, x, logps, cu_seqlens)


def pair_sums(draw: Draw) -> Inputs:
    """Sequence log-probs as a trainer has them."""
    pairs = 16
    floats: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        length = draw.integers(8, 200, pairs)
        policy = -length * (0.5 + draw.uniform(pairs))
        away = draw.normal(pairs) * (800 if draw.family == "extreme" else 3)
        if draw.family == "tie":  # chosen = rejected = reference
            length, policy, away = torch.full_like(length, 20), torch.full_like(policy, -31.25), torch.zeros_like(away)
        elif draw.family == "integers":
            length, policy, away = torch.full_like(length, 32), policy.round(), (away * 4).round()
        elif draw.family == "empty":
            length[1], policy[1], away[1] = 0, 0.0, 0.0
        policy = policy.to(draw.dtype)
        floats[side] = policy
        fixed |= {f"ref_{side}": policy + away.to(draw.dtype), f"{side}_lengths": length}
    return Inputs(floats, fixed, {})
