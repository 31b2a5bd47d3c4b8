"""Every suite under pytest-benchmark, at the sizes of `--quick`.

    python -m pytest benchmarks --benchmark-only

For watching a change, not for quoting: what is quoted comes from `fastpref bench`, interleaved with its peers.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import suite
from benchmarks.head import Case, HeadProblem

PROVIDERS = ("fastpref", "eager", "products")
CASES = [(name, case) for name in suite.NAMES for case in suite.load(name).cases["quick"]]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}: {case.label}" for name, case in CASES])
def test_suite(rated, device, name: str, case, provider: str) -> None:
    problem = suite.load(name).build(case, device)
    if provider not in problem.providers:
        pytest.skip(f"{name} has no {provider}")
    calls, _, _ = suite.gate(problem, [provider])
    rated(calls[provider], flops=problem.flops, bytes=0 if problem.flops else problem.bytes)


PLANS = ("fastpref_store", "fastpref_pair", "fastpref_recompute")


@pytest.mark.parametrize("scored", [256, 128], ids=["dense", "half masked"])
@pytest.mark.parametrize("plan", PLANS)
def test_plan(rated, device, plan: str, scored: int) -> None:
    problem = HeadProblem(Case("plan", 256, 8192, 2, 64, scored, torch.float32), device)
    calls, _, _ = suite.gate(problem, [plan])
    rated(calls[plan], flops=problem.flops)
