"""What the compilers make of the kernels, for GPUs that need not be here: `python -m benchmarks.resources`.

With another Triton than the installed one, whose registers and instructions may differ a little:

    pip install --no-deps --target FOLDER triton
    FASTPREF_TRITON=FOLDER pytest tests/kernels/test_aot.py -k "spills or 16_bytes or barrier"
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# what reads logits or hidden states takes any of them; what comes after is fp32, or fp64 for fp64
ANY, WIDE, HALF_OR_FP32 = {"bf16", "fp16", "fp32", "fp64"}, {"fp32", "fp64"}, {"bf16", "fp16", "fp32"}
READS_ROWS = {"row_logprob", "row_gradient", "token_kl", "token_kl_gradient", "row_scores", "row_scores_gradient"}
DTYPES = dict.fromkeys(READS_ROWS, ANY) | {"target_logits": HALF_OR_FP32}
SHARED_BYTES = 8192
# all that sm_90 gets; of the other targets each kernel, in bf16 where it takes it. The rest with FASTPREF_MATRIX=all
COVERING = r"on sm_90$|bf16 on|^(?!row_|target_|token_kl|paired_loss).* fp32 on|weighted"


@pytest.fixture(scope="module")
def compiled() -> dict:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    kernels = [] if os.environ.get("FASTPREF_MATRIX") == "all" else ["--kernel", COVERING]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if other := os.environ.get("FASTPREF_TRITON"):
        environment["PYTHONPATH"] = os.pathsep.join([os.path.abspath(other), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--json", *kernels],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def kernels(compiled) -> list[dict]:
    return compiled["kernels"]


def _name(kernel: dict) -> str:
    return "{kernel} ({variant}) {dtype} on {target}".format(**kernel)


def test_nothing_spills(kernels):
    assert {_name(k): (k["spills"], k["stack"]) for k in kernels if k["spills"] or k["stack"]} == {}


def test_every_kernel_is_compiled_for_every_target(kernels):
    import fastpref_kernels

    launchers = fastpref_kernels.__all__
    assert {(k["kernel"], k["target"]) for k in kernels} == {(name, target) for name in launchers for target in TARGETS}


def test_every_kernel_is_compiled_for_every_dtype_it_takes(kernels):
    import fastpref_kernels

    found = {name: {k["dtype"] for k in kernels if k["kernel"] == name and k["target"] == "sm_90"}
             for name in fastpref_kernels.__all__}  # fmt: skip
    assert found == {name: DTYPES.get(name, WIDE) for name in found}


SWEEPS = {"row_logprob": ("U", 1), "token_kl": ("K", 2)}  # what the second sweep writes, rows that are read


def sweeping(kernels: list[dict]) -> list[dict]:
    return [k for k in kernels if k["kernel"] in SWEEPS and k["target"].startswith("sm_")]


def writes(k: dict) -> bool:
    return SWEEPS[k["kernel"]][0] in k["variant"].split(", ")


def mixes(k: dict) -> bool:
    """A Jensen-Shannon divergence needs both distributions before it can mix them: one sweep more."""
    return "jsd" in k["variant"].split(", ")


def test_rows_are_read_and_written_16_bytes_at_a_time_though_the_vocabulary_is_odd(kernels):
    """V = 50257 or 151665 in rows a multiple of 16 apart: full blocks move with 16-byte accesses only."""
    assert len(sweeping(kernels)) > 40
    for k in sweeping(kernels):
        full_blocks = k["loops"][::2]
        assert len(full_blocks) == 1 + mixes(k) + writes(k), f"{_name(k)}: {len(k['loops'])} loops"
        assert all(set(loop["loads"]) == {"16"} for loop in full_blocks), f"{_name(k)}: {full_blocks}"
        assert {sweep["elements"] for sweep in k["sweeps"]} == {k["block"] // (32 * k["num_warps"])}, _name(k)
        if writes(k):
            written = full_blocks[-1]["loads"]["16"] // SWEEPS[k["kernel"]][1]
            assert full_blocks[-1]["stores"] == {"16": written}, _name(k)
    for k in (k for k in kernels if k["kernel"] in ("row_gradient", "token_kl_gradient")):
        assert k["loads"].get("16") and k["stores"].get("16"), f"{_name(k)}: {k['loads']} {k['stores']}"


def test_loops_over_a_row_have_no_barrier_and_no_shuffle(kernels):
    """Each lane keeps its own sums; only their merge at the row's end crosses threads."""
    amd = [k for k in kernels if k["kernel"] in SWEEPS and k["target"] == "gfx942"]
    loops = [(k, loop) for k in sweeping(kernels) + amd for loop in k["loops"]]
    assert {_name(k) for k, loop in loops if loop["barriers"] or loop["shuffles"]} == set()
    assert all(k["loops"] for k in amd), "no loops found on gfx942"
    assert all(k["loads"].get("16") for k in amd), "16-byte loads on gfx942"


def _one(kernels: list[dict], kernel: str, variant: str, target: str = "sm_90") -> dict:
    (found,) = (
        k for k in kernels if (k["kernel"], k["variant"], k["dtype"], k["target"]) == (kernel, variant, "bf16", target)
    )
    return found


INSTRUCTIONS = [  # of an element of each sweep; a pair of elements for a KL
    ("row_logprob", "plain", (7.5,)),
    ("row_logprob", "U", (7.5, 7.5)),
    ("row_logprob", "U, 48k", (8, 7.5)),  # two more a load for the cache's hint
    ("token_kl", "reverse", (21,)),
    ("token_kl", "reverse, K", (23, 15)),
    ("token_kl", "jsd, K", (17, 58, 49)),  # a logarithm for each token in either sweep after the first
]


@pytest.mark.parametrize("kernel, variant, most", INSTRUCTIONS, ids=lambda x: str(x))
def test_instructions_an_element_on_an_h100(kernels, kernel, variant, most):
    found = [sweep["instructions"] for sweep in _one(kernels, kernel, variant)["sweeps"]]
    assert all(a <= b for a, b in zip(found, most, strict=True)), found


REGISTERS = [("plain", 40), ("U", 40), ("U, target", 40), ("U, 48k", 32), ("U, target, 48k", 32), ("statistics", 64)]


@pytest.mark.parametrize("variant, most", REGISTERS)
def test_registers_let_enough_programs_run_on_an_h100(kernels, variant, most):
    """65,536 of them an SM: 40 a thread are 6 programs of 256 threads. For short rows, 32 are two of 1,024, whose rows
    the L2 cache holds until their second sweep."""
    assert _one(kernels, "row_logprob", variant)["registers"] <= most


def test_rows_of_64_k_get_an_sm_to_themselves(kernels):
    """More than 32 registers a thread, 1,024 threads: twice as many rows would not stay in the L2 cache."""
    k = _one(kernels, "row_logprob", "U, 64k")
    assert k["num_warps"] == 32 and k["registers"] > 32


def test_shared_memory_is_for_reductions_alone(kernels):
    """48 KiB is what a launch gets without opting in; far less than that never limits how many programs fit."""
    assert {_name(k): k["shared"] for k in kernels if k["shared"] > SHARED_BYTES} == {}


def test_the_candidate_product_fits_hopper(compiled):
    """benchmarks/linear_lse.py: tensor cores fed by TMA, nothing spilled, within an SM's 227 KiB."""
    assert len(compiled["candidates"]) >= 3
    for candidate in compiled["candidates"]:
        assert candidate["wgmma"] and candidate["tma"], candidate
        assert (candidate["spills"], candidate["stack"]) == (0, 0) and candidate["shared"] <= 227 * 1024, candidate
