"""What the compilers make of every kernel: registers, spills, shared memory and the widths of memory accesses.

    python -m benchmarks.resources [--json]

Compiles ahead of time for GPUs that need not be here. Each case of `launches.py` calls a launcher on meta tensors, and
what it would have launched is compiled, so block sizes, warps and constants are those of a real call.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fastpref_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import linear_lse
from benchmarks.launches import CASES, DTYPES, TARGETS, Case

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


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


def measure_candidate(tiles: linear_lse.Tiles) -> dict[str, Any]:
    """The product with a log-sum-exp in its epilogue, in bf16 for Hopper."""
    kernel = linear_lse.tile_lse_kernel
    signature = {
        "hidden": f"tensordesc<bf16[{tiles.rows},{tiles.d}]>", "weight": f"tensordesc<bf16[{tiles.vocab},{tiles.d}]>",
        "max_ptr": "*fp32", "sum_ptr": "*fp32", **dict.fromkeys(("ROWS", "VOCAB", "D"), "constexpr"),
    }  # fmt: skip
    signature = {name: signature.get(name, "i32") for name in kernel.arg_names}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    constants = {at["ROWS"]: tiles.rows, at["VOCAB"]: tiles.vocab, at["D"]: tiles.d}
    attributes = {at[name]: [["tt.divisibility", 16]] for name in ("max_ptr", "sum_ptr", "d")}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGETS["sm_90"], options=options)
    found = {name: _nvidia(binary.asm["cubin"])[name] for name in ("registers", "spills", "stack")}
    instructions = {"wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor"}
    used = {name: text in binary.asm["ptx"] for name, text in instructions.items()}
    return {"tiles": tiles, **found, "shared": binary.metadata.shared, **used}


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
        candidates = [measure_candidate(tiles) for tiles in linear_lse.CANDIDATES]
        kernels = [r._asdict() for r in results]
        print(json.dumps({"triton": triton.__version__, "kernels": kernels, "candidates": candidates}, indent=1))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
