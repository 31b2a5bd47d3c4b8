"""What the compilers make of every kernel: registers, spills, shared memory and the widths of memory accesses.

    python -m benchmarks.resources [--json]

Compiles ahead of time for GPUs that need not be here. Each case calls a launcher on meta tensors and compiles what
it would have launched, so block sizes, warps and constants are those of a real call.
"""

from __future__ import annotations

import argparse
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

import fastpref_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastpref.reference import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    STATISTICS,
    UNPAIRED_LOSSES,
    LogitTransform,
    PairedObjective,
    PolicyObjective,
    UnpairedObjective,
)

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
TOKENS = 2 * PAIRS * LENGTH
VOCAB, STRIDE = 50257, 50272  # the hard case: an odd vocabulary, in rows that we have padded to a multiple of 16
PLAIN = LogitTransform()
SOFTCAP = LogitTransform(temperature=0.7, logit_scale=0.5, softcap=30.0)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _indices(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int64)


def _logits(dtype: torch.dtype) -> torch.Tensor:
    return _meta(ROWS, STRIDE, dtype=dtype)[:, :VOCAB]


# Each calls a launcher of fastpref_kernels: (dtype of logits or hidden states, options of the variant).


def _row_logprob(dtype: torch.dtype, target: bool = False, transform=PLAIN, **options: Any) -> None:
    exact = _meta(ROWS) if target else None
    options |= {"transform": transform, "ignore_index": -100, "target_logits": exact}
    fastpref_kernels.row_logprob(_logits(dtype), _indices(ROWS), **options)


def _row_gradient(dtype: torch.dtype, given=(), transform=PLAIN, **options: Any) -> None:
    z, rows = _logits(dtype), _meta(ROWS)
    options |= {"transform": transform, "ignore_index": -100, **dict.fromkeys(given, rows)}
    fastpref_kernels.row_gradient(z, _indices(ROWS), rows, rows, z, **options)


def _target_logits(dtype: torch.dtype) -> None:
    head = (_meta(VOCAB, HIDDEN, dtype=dtype), _meta(VOCAB, dtype=dtype))
    fastpref_kernels.target_logits(_meta(ROWS, HIDDEN, dtype=dtype), *head, _indices(ROWS))


def _token_kl(dtype: torch.dtype, direction: str = "reverse", given=(), transform=PLAIN, **options) -> None:
    options |= {"direction": direction, "transform": transform, **dict.fromkeys(given, _meta(ROWS))}
    if given:
        options |= {"labels": _indices(ROWS), "mask": _meta(ROWS, dtype=torch.bool)}
    fastpref_kernels.token_kl(_logits(dtype), _logits(dtype), **options)


def _token_kl_gradient(dtype: torch.dtype, direction: str, transform=PLAIN) -> None:
    z, rows = _logits(dtype), _meta(ROWS)
    fastpref_kernels.token_kl_gradient(
        z, _logits(dtype), rows, rows, rows, z, direction=direction, transform=transform, grad=rows
    )


def _paired_loss(dtype: torch.dtype, packed: bool = True, weighted: bool = False, **objective: Any) -> None:
    edges = _indices(2 * PAIRS + 1) if packed else None
    weights = _meta(PAIRS) if weighted else None
    fastpref_kernels.paired_loss(
        _meta(TOKENS, dtype=dtype), _indices(TOKENS), edges, _meta(2 * PAIRS), None, weights, _indices(),
        PairedObjective(**({"label_smoothing": 0.1} | objective)), num_pairs=PAIRS, total_pairs=PAIRS,
        ignore_index=-100, token_weights=_meta(TOKENS) if weighted else None,
    )  # fmt: skip


def _unpaired_loss(dtype: torch.dtype, **objective: Any) -> None:
    fastpref_kernels.unpaired_loss(
        _meta(TOKENS, dtype=dtype), _indices(TOKENS), _indices(2 * PAIRS + 1), _meta(2 * PAIRS),
        _meta(2 * PAIRS, dtype=torch.bool), _meta(), UnpairedObjective(**objective),
        first_sequence=0, num_sequences=2 * PAIRS, ignore_index=-100,
    )  # fmt: skip


def _policy_loss(dtype: torch.dtype) -> None:
    objective = PolicyObjective(beta=0.04, entropy_coef=0.01)
    x = _meta(TOKENS, dtype=dtype)
    fastpref_kernels.policy_loss(x, x, x, x, x, x, objective)


def _bradley_terry(dtype: torch.dtype) -> None:
    fastpref_kernels.bradley_terry(_meta(2 * PAIRS, dtype=dtype), _meta(PAIRS), center_coefficient=0.01)


def _row_scores(dtype: torch.dtype) -> None:
    hidden, head = _meta(2 * PAIRS, LENGTH, HIDDEN, dtype=dtype), (_meta(HIDDEN, dtype=dtype), _meta(1, dtype=dtype))
    fastpref_kernels.row_scores(hidden, *head, _indices(2 * PAIRS), layout="positions")


def _row_scores_gradient(dtype: torch.dtype) -> None:
    hidden, head = _meta(2 * PAIRS, LENGTH, HIDDEN, dtype=dtype), (_meta(HIDDEN, dtype=dtype), _meta(1, dtype=dtype))
    fastpref_kernels.row_scores_gradient(
        _meta(2 * PAIRS), _meta(), hidden, *head, _indices(2 * PAIRS), layout="positions",
        need_hidden=True, need_weight=True, need_bias=True,
    )  # fmt: skip


def _kl_estimate(dtype: torch.dtype, estimator: str) -> None:
    fastpref_kernels.kl_estimate(_meta(TOKENS, dtype=dtype), _meta(TOKENS, dtype=dtype), estimator)


def _penalized_rewards(dtype: torch.dtype, estimator: str) -> None:
    scores, rows = _meta(PAIRS, dtype=dtype), _meta(PAIRS, LENGTH, dtype=dtype)
    mask = _meta(PAIRS, LENGTH, dtype=torch.bool)
    fastpref_kernels.penalized_rewards(scores, rows, rows, mask, _meta(dtype=dtype), estimator)


def _penalized_rewards_backward(dtype: torch.dtype, estimator: str) -> None:
    scores, rows = _meta(PAIRS, dtype=dtype), _meta(PAIRS, LENGTH, dtype=dtype)
    mask = _meta(PAIRS, LENGTH, dtype=torch.bool)
    fastpref_kernels.penalized_rewards_backward(rows, scores, rows, rows, mask, _meta(dtype=dtype), estimator)


class Variant(NamedTuple):
    call: Callable[..., None]
    name: str
    dtypes: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


HALF, BOTH, WIDE = ("bf16",), ("bf16", "fp32"), ("fp32",)
VARIANTS = [
    Variant(_row_logprob, "plain", BOTH),
    Variant(_row_logprob, "target", HALF, {"target": True}),
    Variant(_row_logprob, "U", BOTH, {"write_u": True}),
    Variant(_row_logprob, "U, target", HALF, {"write_u": True, "target": True}),
    Variant(_row_logprob, "U, target, softcap", BOTH, {"write_u": True, "target": True, "transform": SOFTCAP}),
    Variant(_row_logprob, "statistics", HALF, {"statistics": STATISTICS}),
    Variant(_row_logprob, "statistics, softcap", BOTH, {"statistics": STATISTICS, "transform": SOFTCAP}),
    Variant(_row_gradient, "U", HALF, {"first_column": 128}),
    Variant(_row_gradient, "plain", BOTH, {"given": ("grad_logps",)}),
    Variant(_row_gradient, "entropy, softcap", BOTH,
            {"given": ("grad_logps", "entropy", "grad_entropy"), "transform": SOFTCAP}),
    Variant(_target_logits, "bias", BOTH),
    Variant(_token_kl, "reverse", HALF),
    Variant(_token_kl, "forward, K, labels, softcap", BOTH,
            {"direction": "forward", "write_k": True, "given": ("target_logits", "ref_target_logits"),
             "transform": SOFTCAP}),
    Variant(_token_kl_gradient, "reverse, softcap", BOTH, {"direction": "reverse", "transform": SOFTCAP}),
    Variant(_row_scores, "positions", HALF),
    Variant(_row_scores_gradient, "positions", HALF),
    Variant(_bradley_terry, "margin, centre", WIDE),
    Variant(_kl_estimate, "k3", WIDE, {"estimator": "k3"}),
    Variant(_penalized_rewards, "k3", WIDE, {"estimator": "k3"}),
    Variant(_penalized_rewards_backward, "k3", WIDE, {"estimator": "k3"}),
    Variant(_policy_loss, "clipped, KL, entropy", WIDE),
    Variant(_unpaired_loss, "kto, class means", WIDE, {"mean": "class"}),
    Variant(_paired_loss, "sigmoid", WIDE),
    Variant(_paired_loss, "sigmoid, padded", WIDE, {"packed": False}),
    Variant(_paired_loss, "sigmoid + bco_pair + sft, weighted", WIDE,
            {"losses": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0), "weighted": True}),
    Variant(_paired_loss, "aot + aot_unpaired", WIDE, {"losses": ("aot", "aot_unpaired"), "weights": (1.0, 1.0)}),
    Variant(_paired_loss, "sigmoid, mean log-probs", WIDE, {"average": True, "gamma": 0.5}),
]  # fmt: skip
# for sm_90 alone: of these the other targets compile the like
SM90_VARIANTS = [
    Variant(_row_logprob, "plain", ("fp16",)),
    Variant(_row_logprob, "U, target", ("fp16",), {"write_u": True, "target": True}),
    Variant(_row_gradient, "plain", ("fp16",), {"given": ("grad_logps",)}),
    *(Variant(_paired_loss, name, WIDE, {"losses": (name,)}) for name in PAIR_LOSSES if name != "sigmoid"),
    Variant(_paired_loss, "sft", WIDE, {"losses": ("sft",)}),
    *(Variant(_unpaired_loss, name, WIDE, {"loss": name}) for name in UNPAIRED_LOSSES),
    *(Variant(_paired_loss, f"sigmoid, {f}", WIDE, {"f_divergence": f}) for f in F_DIVERGENCES if f != "reverse_kl"),
]


class Case(NamedTuple):
    variant: Variant
    dtype: str
    target: str


CASES = [
    *(Case(v, dtype, target) for target in TARGETS for v in VARIANTS for dtype in v.dtypes),
    *(Case(v, dtype, "sm_90") for v in SM90_VARIANTS for dtype in v.dtypes),
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
    launcher = getattr(fastpref_kernels, case.variant.call.__name__.removeprefix("_"))
    module = sys.modules[launcher.__module__]  # the package's attribute of that name may be the launcher
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    recorders = {name: mock.MagicMock() for name in kernels}
    with mock.patch.multiple(module, **recorders):
        case.variant.call(DTYPES[case.dtype], **case.variant.options)
    ((kernel, launched),) = (
        (kernels[name], call) for name, r in recorders.items() for call in r.__getitem__.return_value.call_args_list
    )
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
    name = case.variant.call.__name__.removeprefix("_")
    return Resources(name, case.variant.name, case.dtype, case.target, shared=binary.metadata.shared, **found)


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
