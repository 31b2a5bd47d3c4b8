"""What the compilers make of every kernel: registers, spills, shared memory and the widths of memory accesses.

    python -m benchmarks.resources [--json]

Compiles ahead of time for GPUs that need not be here. Each case calls a launcher on meta tensors and compiles what
it would have launched, so block sizes, warps and constants are those of a real call.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.losses import DPO_LOSS_TYPES
from fastpref.reference import STATISTICS, LogitTransform, PairedObjective, UnpairedObjective

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}

ROWS, HIDDEN, PAIRS, LENGTH = 4096, 4096, 64, 512
VOCAB, STRIDE = 50257, 50272  # the hard case: an odd vocabulary, in rows that we have padded to a multiple of 16
SOFTCAP = LogitTransform(temperature=0.7, logit_scale=0.5, softcap=30.0)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _row_logprob(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits = _meta(ROWS, STRIDE, dtype=dtype)[:, :VOCAB]
    exact = _meta(ROWS) if options.pop("target", False) else None
    options = {"transform": LogitTransform(), **options}
    launcher(logits, _meta(ROWS, dtype=torch.int64), ignore_index=-100, target_logits=exact, **options)


def _row_gradient(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    z = _meta(ROWS, STRIDE, dtype=dtype)[:, :VOCAB]
    rows = _meta(ROWS)
    options |= dict.fromkeys(options.pop("given", ()), rows)
    options = {"transform": LogitTransform(), **options}
    launcher(z, _meta(ROWS, dtype=torch.int64), rows, rows, z, ignore_index=-100, **options)


def _target_logits(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    bias = _meta(VOCAB, dtype=dtype) if options["bias"] else None
    hidden, weight = _meta(ROWS, HIDDEN, dtype=dtype), _meta(VOCAB, HIDDEN, dtype=dtype)
    launcher(hidden, weight, bias, _meta(ROWS, dtype=torch.int64))


def _paired_loss(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens = 2 * PAIRS * LENGTH
    packed = _meta(2 * PAIRS + 1, dtype=torch.int64) if options.pop("packed", True) else None
    objective = PairedObjective(**{"label_smoothing": 0.1, **options})
    launcher(
        _meta(tokens, dtype=dtype), _meta(tokens, dtype=torch.int64), packed, _meta(2 * PAIRS), None, None,
        _meta(dtype=torch.int64), objective, num_pairs=PAIRS, total_pairs=PAIRS, ignore_index=-100,
    )  # fmt: skip


def _unpaired_loss(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens, sequences = 2 * PAIRS * LENGTH, 2 * PAIRS
    packed = _meta(sequences + 1, dtype=torch.int64) if options.pop("packed", True) else None
    shift = None if options["loss"] == "apo_zero_unpaired" else _meta()
    launcher(
        _meta(tokens, dtype=dtype), _meta(tokens, dtype=torch.int64), packed, _meta(sequences),
        _meta(sequences, dtype=torch.bool), shift, UnpairedObjective(**options),
        first_sequence=0, num_sequences=sequences, ignore_index=-100,
    )  # fmt: skip


def _token_kl(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    policy, ref = (_meta(ROWS, STRIDE, dtype=dtype)[:, :VOCAB] for _ in range(2))
    rows = _meta(ROWS)
    labels = _meta(ROWS, dtype=torch.int64) if options.get("write_k", False) else None
    exact = {} if labels is None else {"target_logits": rows, "ref_target_logits": rows}
    launcher(policy, ref, labels=labels, **{"transform": LogitTransform(), **exact, **options})


def _token_kl_gradient(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    policy, ref = (_meta(ROWS, STRIDE, dtype=dtype)[:, :VOCAB] for _ in range(2))
    rows = _meta(ROWS)
    launcher(policy, ref, rows, rows, rows, policy, grad=rows, **{"transform": LogitTransform(), **options})


def _penalized_rewards(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens, mask = _meta(PAIRS, LENGTH, dtype=dtype), _meta(PAIRS, LENGTH, dtype=torch.bool)
    launcher(_meta(PAIRS, dtype=dtype), tokens, tokens, mask, _meta(dtype=dtype), **options)


def _penalized_rewards_backward(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens, mask = _meta(PAIRS, LENGTH, dtype=dtype), _meta(PAIRS, LENGTH, dtype=torch.bool)
    launcher(tokens, _meta(PAIRS, dtype=dtype), tokens, tokens, mask, _meta(dtype=dtype), **options)


def _kl_estimate(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tokens = _meta(PAIRS * LENGTH, dtype=dtype)
    launcher(tokens, tokens, **options)


def _row_scores(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    layout = options.pop("layout")
    hidden = _meta(2 * PAIRS, LENGTH, HIDDEN, dtype=dtype)
    hidden = hidden if layout == "positions" else hidden.flatten(0, 1)
    index = _meta(2 * PAIRS + (layout == "edges"), dtype=torch.int64)
    head = hidden, _meta(HIDDEN, dtype=dtype), _meta(1, dtype=dtype), index
    if "need_hidden" in options:
        launcher(_meta(2 * PAIRS), _meta(), *head, layout=layout, **options)
    else:
        launcher(*head, layout=layout)


def _bradley_terry(launcher: Callable, dtype: torch.dtype, options: dict[str, Any]) -> None:
    launcher(_meta(2 * PAIRS), _meta(PAIRS), **options)


CALLS = {
    "row_scores": _row_scores,
    "row_scores_gradient": _row_scores,
    "bradley_terry": _bradley_terry,
    "token_kl": _token_kl,
    "token_kl_gradient": _token_kl_gradient,
    "kl_estimate": _kl_estimate,
    "penalized_rewards": _penalized_rewards,
    "penalized_rewards_backward": _penalized_rewards_backward,
    "row_logprob": _row_logprob,
    "row_gradient": _row_gradient,
    "target_logits": _target_logits,
    "paired_loss": _paired_loss,
    "unpaired_loss": _unpaired_loss,
}
KERNELS = {  # launcher -> (module, the kernel that it launches)
    "row_scores": ("bradley_terry", "_row_scores_kernel"),
    "row_scores_gradient": ("bradley_terry", "_row_scores_gradient_kernel"),
    "bradley_terry": ("bradley_terry", "_bradley_terry_kernel"),
    "token_kl": ("token_kl", "_token_kl_kernel"),
    "token_kl_gradient": ("token_kl", "_token_kl_gradient_kernel"),
    "kl_estimate": ("sampled_kl", "_kl_estimate_kernel"),
    "penalized_rewards": ("sampled_kl", "_penalized_rewards_kernel"),
    "penalized_rewards_backward": ("sampled_kl", "_penalized_rewards_backward_kernel"),
    "row_logprob": ("row_logprob", "_row_logprob_kernel"),
    "row_gradient": ("row_logprob", "_row_gradient_kernel"),
    "target_logits": ("row_logprob", "_target_logit_kernel"),
    "paired_loss": ("paired_loss", "_paired_loss_kernel"),
    "unpaired_loss": ("unpaired_loss", "_unpaired_loss_kernel"),
}

# (launcher, variant) -> options of the call; for every target in bf16 and fp32, for sm_90 in fp16 too
ROW_VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    ("row_logprob", "plain"): {},
    ("row_logprob", "target"): {"target": True},
    ("row_logprob", "U"): {"write_u": True},
    ("row_logprob", "U, target"): {"write_u": True, "target": True},
    ("row_logprob", "U, target, softcap"): {"write_u": True, "target": True, "transform": SOFTCAP},
    ("row_logprob", "statistics"): {"statistics": STATISTICS},
    ("row_logprob", "statistics, softcap"): {"statistics": STATISTICS, "transform": SOFTCAP},
    ("row_gradient", "U"): {"first_column": 128},
    ("row_gradient", "plain"): {"given": ("grad_logps",)},
    ("row_gradient", "entropy, softcap"): {"given": ("grad_logps", "entropy", "grad_entropy"), "transform": SOFTCAP},
    ("target_logits", "bias"): {"bias": True},
    ("token_kl", "reverse"): {"direction": "reverse"},
    ("token_kl", "forward, softcap"): {"direction": "forward", "transform": SOFTCAP},
    ("token_kl", "K, reverse"): {"direction": "reverse", "write_k": True},
    ("token_kl", "K, reverse, softcap"): {"direction": "reverse", "write_k": True, "transform": SOFTCAP},
    ("token_kl", "K, forward"): {"direction": "forward", "write_k": True},
    ("token_kl_gradient", "reverse"): {"direction": "reverse"},
    ("token_kl_gradient", "reverse, softcap"): {"direction": "reverse", "transform": SOFTCAP},
    ("token_kl_gradient", "forward"): {"direction": "forward"},
}
# variant -> fields of the objective; log-probs are fp32; for every target
PAIR_VARIANTS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, padded": {"packed": False},
    "sigmoid + bco_pair + sft": {"losses": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0)},
    "sigmoid + aot + aot_unpaired": {"losses": ("sigmoid", "aot", "aot_unpaired"), "weights": (1.0, 1.0, 1.0)},
    "sigmoid, mean log-probs": {"average": True, "gamma": 0.5},
}
# the same for unpaired losses
UNPAIRED_VARIANTS: dict[str, dict[str, Any]] = {
    "kto": {"loss": "kto"},
    "kto, padded, class means": {"loss": "kto", "packed": False, "mean": "class"},
    "apo_zero_unpaired": {"loss": "apo_zero_unpaired"},
    "bco, class means": {"loss": "bco", "mean": "class"},
}
# variant -> options; log-probs are fp32; for every target
SAMPLED_VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    (kernel, estimator): {"estimator": estimator}
    for kernel in ("kl_estimate", "penalized_rewards", "penalized_rewards_backward")
    for estimator in ("k1", "k3")
}
# for every target and the dtypes of hidden states
REWARD_VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    **{("row_scores", layout): {"layout": layout} for layout in ("positions", "edges")},
    ("row_scores_gradient", "positions"): {
        "layout": "positions", "need_hidden": True, "need_weight": True, "need_bias": True,
    },
    ("row_scores_gradient", "edges, frozen head"): {
        "layout": "edges", "need_hidden": True, "need_weight": False, "need_bias": False,
    },
}  # fmt: skip
# the same, for sm_90 alone: one kernel each, of which every other target compiles the like
SM90_VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"losses": (name,)} for name in (*DPO_LOSS_TYPES, "ipo_sum") if name != "sigmoid"},
    **{f"sigmoid, {f}": {"f_divergence": f} for f in ("forward_kl", "js_divergence", "alpha_divergence")},
}


class Case(NamedTuple):
    kernel: str
    variant: str
    dtype: str
    target: str
    options: dict[str, Any]


ROW_DTYPES = [*((t, dtype) for t in TARGETS for dtype in ("bf16", "fp32")), ("sm_90", "fp16")]
CASES = [
    *(Case(k, v, dtype, t, o) for t, dtype in ROW_DTYPES for (k, v), o in ROW_VARIANTS.items()),
    *(Case("paired_loss", v, "fp32", t, o) for t in TARGETS for v, o in PAIR_VARIANTS.items()),
    *(Case("paired_loss", v, "fp32", "sm_90", o) for v, o in SM90_VARIANTS.items()),
    *(Case("unpaired_loss", v, "fp32", t, o) for t in TARGETS for v, o in UNPAIRED_VARIANTS.items()),
    *(Case(k, v, "fp32", t, o) for t in TARGETS for (k, v), o in SAMPLED_VARIANTS.items()),
    *(Case(k, v, dtype, t, o) for t, dtype in ROW_DTYPES for (k, v), o in REWARD_VARIANTS.items()),
    *(Case("bradley_terry", "centred", "fp32", t, {"center_coefficient": 0.01}) for t in TARGETS),
]


class Resources(NamedTuple):
    """Of one compiled kernel. Accesses are counts of global instructions by their width in bytes."""

    kernel: str
    variant: str
    dtype: str
    target: str
    registers: int
    spills: int  # instructions that access spilled registers (sm), or registers spilled (gfx)
    stack: int  # bytes a thread, spills included
    shared: int  # bytes a program
    loads: dict[int, int]
    loop_loads: dict[int, int]  # those inside a loop
    stores: dict[int, int]


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int


def recorded_launch(case: Case) -> Launch:
    """What the launcher would have launched: its kernel, with every argument by name."""
    module_name, kernel_name = KERNELS[case.kernel]
    module = importlib.import_module(f"fastpref_kernels.{module_name}")
    kernel = getattr(module, kernel_name)
    recorder = mock.MagicMock()
    with mock.patch.object(module, kernel_name, recorder):
        CALLS[case.kernel](getattr(module, case.kernel), DTYPES[case.dtype], dict(case.options))
    (launched,) = recorder.__getitem__.return_value.call_args_list
    named = dict(launched.kwargs)
    num_warps = named.pop("num_warps")
    return Launch(kernel, dict(zip(kernel.arg_names, launched.args, strict=False)) | named, num_warps)


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """Specialised as Triton does at run time: None and 1 are constants, multiples of 16 are known to be such."""
    constant_names = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in constant_names or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = POINTERS[value.dtype] if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps})


WIDTHS = {  # bytes of one access, by the suffix of the instruction; LDG and STG without one move 4
    **{"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1},
    **{"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4},
    **{"ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1},
}


class Instruction(NamedTuple):
    text: str
    in_loop: bool


def _accesses(code: list[Instruction], pattern: str) -> dict[int, int]:
    """Width in bytes -> instructions that match `pattern`, whose group is the suffix."""
    found: Counter[int] = Counter()
    for instruction in code:
        if access := re.search(pattern, instruction.text):
            found[next((WIDTHS[x] for x in re.split(r"[._]", access[1]) if x in WIDTHS), 4)] += 1
    return dict(sorted(found.items()))


def _traffic(code: list[Instruction], load: str, store: str) -> dict[str, dict[int, int]]:
    loop = [instruction for instruction in code if instruction.in_loop]
    return {"loads": _accesses(code, load), "loop_loads": _accesses(loop, load), "stores": _accesses(code, store)}


def _matched(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in\n{text[:2000]}"
    return list(map(int, found.groups()))


def _nvidia(cubin: bytes) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", run.stdout)]
    branches = [(at, int(to[1], 16)) for at, what in lines if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what))]
    loops = [(to, at) for at, to in branches if to < at]  # to == at is the trap behind the last instruction
    code = [Instruction(what, any(first <= at <= last for first, last in loops)) for at, what in lines]
    registers, stack, local = _matched(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    spills = sum(_accesses(code, r"\b(?:LDL|STL)((?:\.\w+)*)").values())
    traffic = _traffic(code, r"\bLDG((?:\.\w+)*)", r"\bSTG((?:\.\w+)*)")
    return {"registers": registers, "spills": spills, "stack": stack + local, **traffic}


def _amd(amdgcn: str) -> dict[str, Any]:
    code, in_loop = [], False
    for line in amdgcn.splitlines():
        if re.match(r"\.LBB\w+:|; %bb", line):  # the assembler says of every block whether a loop contains it
            in_loop = "Loop" in line
        code.append(Instruction(line, in_loop))
    (vgprs,), (vgpr_spills,), (sgpr_spills,), (stack,) = (
        _matched(rf"\.{field}:\s+(\d+)", amdgcn)
        for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    load, store = (rf"\b(?:global|buffer)_{what}_(\w+)" for what in ("load", "store"))
    return {
        "registers": vgprs,
        "spills": vgpr_spills + sgpr_spills,
        "stack": stack,
        **_traffic(code, load, store),
    }


def measure(case: Case) -> Resources:
    binary = compiled(recorded_launch(case), TARGETS[case.target])
    found = _nvidia(binary.asm["cubin"]) if "cubin" in binary.asm else _amd(binary.asm["amdgcn"])
    return Resources(*case[:4], shared=binary.metadata.shared, **found)


def measure_all(cases: list[Case], workers: int = 2) -> list[Resources]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, cases, chunksize=4))


def table(results: list[Resources]) -> str:
    def accesses(counts: dict[int, int]) -> str:
        return " ".join(f"{count}x{width}B" for width, count in sorted(counts.items(), reverse=True))

    header = ("target", "kernel", "variant", "dtype", "regs", "spills", "stack", "shared", "loads", "stores")
    lines = [
        (r.target, r.kernel, r.variant, r.dtype, *map(str, (r.registers, r.spills, r.stack, r.shared)),
         accesses(r.loads), accesses(r.stores))
        for r in results
    ]  # fmt: skip
    sizes = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, sizes)).rstrip() for line in (header, *lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    as_json = parser.parse_args(argv).json
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it to compile them")
    results = measure_all(CASES)
    if as_json:
        print(json.dumps({"triton": triton.__version__, "kernels": [r._asdict() for r in results]}, indent=1))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
