"""How far half-precision log-probs are from the truth, by the usual path and by ours, on a head of realistic size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref

HIDDEN, VOCAB = 576, 49152  # SmolLM2-135M's head
TOKENS = 512  # of the sequences whose sums are compared
SEQUENCES = 64  # drawn from the rows
CONFIDENT = 0.9  # a token of at least this probability, where correcting the label's logit does most
BLOCK = 256  # rows of fp64 logits at once


def _gather(logps: Tensor, labels: Tensor) -> Tensor:
    return logps.gather(1, labels[:, None])[:, 0].double()


def _bf16_log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _gather(F.linear(hidden, weight).log_softmax(1), labels)


def _fp32_log_softmax(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _gather(F.linear(hidden, weight).float().log_softmax(1), labels)


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fastpref.linear_token_logprobs(hidden, weight, labels).double()


def _truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _gather(F.linear(hidden.double(), weight.double()).log_softmax(1), labels)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bf16 logits, log_softmax in bf16": _bf16_log_softmax,
    "bf16 logits, log_softmax in fp32": _fp32_log_softmax,
    "fastpref.linear_token_logprobs": _ours,
}


def _rows(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head and labels as a trained model has them.

    Logits spread by about 2.5, with one token 8 to 20 above 0. Labels are drawn from the model's own distribution.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    weight = normal(VOCAB, HIDDEN) * 0.1
    top = torch.randint(VOCAB, (rows,), generator=g, device=device)
    height = 8 + 12 * torch.rand(rows, 1, generator=g, device=device)
    hidden = normal(rows, HIDDEN) + height * weight[top] / weight[top].square().sum(1, keepdim=True)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    blocks = (F.linear(h, weight).float().softmax(1).multinomial(1, generator=g) for h in hidden.split(BLOCK))
    return hidden, weight, torch.cat(list(blocks))[:, 0]


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def compare(device: torch.device, rows: int = 1024) -> list[dict[str, str | float | int]]:
    """Rms errors against fp64 by method: of per-token log-probs, and of their sums over 512 tokens."""
    hidden, weight, labels = _rows(rows, device)
    g = torch.Generator(device).manual_seed(1)
    sequences = torch.randint(rows, (SEQUENCES, TOKENS), generator=g, device=device)

    def in_blocks(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        blocks = zip(hidden.split(BLOCK), labels.split(BLOCK), strict=True)
        with torch.no_grad():
            return torch.cat([f(h, weight, y) for h, y in blocks])

    truth = in_blocks(_truth)
    results: list[dict[str, str | float | int]] = []
    for name, method in METHODS.items():
        error = in_blocks(method) - truth
        results.append(
            {
                "method": name,
                "token_rms": _rms(error),
                "confident_token_rms": _rms(error[truth > math.log(CONFIDENT)]),
                "sequence_rms": _rms(error[sequences].sum(1)),
                "rows": rows,
                "tokens": TOKENS,
            }
        )
    return results
