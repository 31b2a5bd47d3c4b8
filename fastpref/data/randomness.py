"""Random draws that depend on a key alone: not on the device, the library's version or the rest of the batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def keys(seed: int, prompt: int, response: int, count: int) -> np.ndarray:
    """Two 32-bit words for each token of a response, `[count, 2]`. They are PCG64's, which NumPy never changes."""
    words = np.random.PCG64(np.random.SeedSequence([seed, prompt, response])).random_raw(count)
    return np.stack([words >> np.uint64(32), words & np.uint64(MASK)], 1).astype(np.int64)


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32-bit words, held in int64: C. Wellons' lowbias32 (github.com/skeeto/hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def uniforms(key: Tensor, count: int) -> Tensor:
    """fp32 `[S, count]` in (0, 1), from keys `[S, 2]`."""
    at = torch.arange(count, device=key.device)
    words = _mixed((_mixed(at ^ key[:, :1]) + key[:, 1:]) & MASK)
    return ((words.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def draw(logits: Tensor, key: Tensor) -> Tensor:
    """A token `[S, 1]` for each row of logits `[S, V]`, by its key `[S, 2]`, with the probabilities of the softmax.

    It is the Gumbel-max trick, as exponential races: the smallest of E_v / p_v wins, with E_v exponential. Logits that
    differ by rounding give another token only if two racers are as close as that. A draw by cumulated probabilities
    would shift all its boundaries at once. With fp32 logits of 49,152 tokens that was seen within a few dozen draws.
    """
    exponentials = -torch.log1p(-uniforms(key, logits.shape[1]))  # accurate where small, which is where winners are
    return (logits.float() - exponentials.log()).argmax(-1, keepdim=True)
