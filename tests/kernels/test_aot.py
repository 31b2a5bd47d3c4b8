"""What the compilers make of the kernels, for GPUs that need not be here: `python -m benchmarks.resources`."""

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
THREADS = {"sm_80": 256, "sm_90": 256, "sm_100": 256, "gfx942": 512}  # 8 warps
BLOCK = 4096
SHARED_BYTES = 8192


@pytest.fixture(scope="module")
def compiled() -> dict:
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.resources", "--json"],
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


def test_rows_are_read_16_bytes_at_a_time_though_the_vocabulary_is_odd(kernels):
    """V = 50257 in rows 50272 apart: each sweep of the row kernels reads its full blocks with 16-byte loads only."""
    forwards = [k for k in kernels if k["kernel"] == "row_logprob"]
    backwards = [k for k in kernels if k["kernel"] == "row_gradient"]
    for k in forwards + backwards:
        per_sweep = BLOCK * ELEMENT_BYTES[k["dtype"]] // (16 * THREADS[k["target"]])
        sweeps = 2 if "U" in k["variant"].split(", ") and k["kernel"] == "row_logprob" else 1
        loads = k["loop_loads"] if k["kernel"] == "row_logprob" else k["loads"]
        assert loads.get("16") == sweeps * per_sweep, f"{_name(k)}: {loads}"
    for k in forwards:
        assert set(k["loop_loads"]) == {"16"}, f"{_name(k)}: {k['loop_loads']} in a loop"
        assert k["stores"].get("16", 0) == k["loop_loads"]["16"] // 2 * ("U" in k["variant"]), (
            f"{_name(k)}: {k['stores']}"
        )


def test_the_plain_forward_fits_6_programs_of_8_warps_on_an_h100(kernels):
    """65,536 registers, 256 threads a program, 40 registers a thread."""
    (registers,) = (
        k["registers"]
        for k in kernels
        if (k["kernel"], k["variant"], k["dtype"], k["target"]) == ("row_logprob", "plain", "bf16", "sm_90")
    )
    assert registers <= 40


def test_both_rows_of_an_exact_kl_are_read_16_bytes_at_a_time(kernels):
    for k in (k for k in kernels if k["kernel"] == "token_kl" and k["target"].startswith("sm_")):
        assert set(k["loop_loads"]) == {"16"}, f"{_name(k)}: {k['loop_loads']} in a loop"


def test_shared_memory_is_for_reductions_alone(kernels):
    """48 KiB is what a launch gets without opting in; far less than that never limits how many programs fit."""
    assert {_name(k): k["shared"] for k in kernels if k["shared"] > SHARED_BYTES} == {}


def test_the_candidate_product_fits_hopper(compiled):
    """benchmarks/linear_lse.py: tensor cores fed by TMA, nothing spilled, within an SM's 227 KiB."""
    assert len(compiled["candidates"]) >= 3
    for candidate in compiled["candidates"]:
        assert candidate["wgmma"] and candidate["tma"], candidate
        assert (candidate["spills"], candidate["stack"]) == (0, 0) and candidate["shared"] <= 227 * 1024, candidate
