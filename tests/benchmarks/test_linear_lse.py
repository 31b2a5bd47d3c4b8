"""The candidate for the no-gradient plan: log-probs from one product that keeps no logits."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE, relative_error

pytest.importorskip("triton")
from benchmarks.linear_lse import Tiles, linear_logprobs

TILES = Tiles(16, 64, 16, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "vocab", "d"), [(37, 333, 48), (16, 64, 16), (1, 65, 24)])
def test_log_probs(n, vocab, d, dtype):
    """Of sizes that fill their tiles and of sizes that do not; more tiles than programs."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d, device=DEVICE).to(dtype), torch.randn(vocab, d, device=DEVICE).to(dtype)
    labels = torch.randint(vocab, (n,), device=DEVICE)
    labels[-1] = vocab - 1
    wanted = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    found = linear_logprobs(hidden, weight, labels, TILES)
    assert found.dtype == torch.float32 and relative_error(found, wanted) < 1e-6
    assert torch.equal(found, linear_logprobs(hidden, weight, labels, TILES))


def test_large_logits_do_not_overflow():
    hidden, weight = torch.full((2, 16), 100.0, device=DEVICE), torch.full((70, 16), 10.0, device=DEVICE)
    weight[3] = -10.0
    labels = torch.tensor([0, 3], device=DEVICE)
    wanted = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert relative_error(linear_logprobs(hidden, weight, labels, TILES), wanted) < 1e-6
