"""What the compilers make of every kernel: registers, spills, shared memory and the widths of memory accesses.

    python -m benchmarks.resources [--json] [--kernel PATTERN]

With another Triton than the installed one:

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER:. python -m benchmarks.resources

Compiles ahead of time for GPUs that need not be here. Each case of `launches.py` calls a launcher on meta tensors, and
what it would have launched is compiled, so block sizes, warps and constants are those of a real call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import fastpref_kernels
import torch
import triton
from fastpref_kernels import _launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import linear_lse
from benchmarks.assembly import Assembly, of_amd, of_nvidia
from benchmarks.launches import CASES, DTYPES, TARGETS, Case

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


ELEMENT_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
ROWS_AT_ONCE = {"row_logprob": 1, "token_kl": 2}  # of the kernels that sweep over whole rows


class Sweep(NamedTuple):
    """A sweep over a row, or over a pair of rows."""

    elements: int  # of each row in one iteration of a thread
    instructions: float  # an element, or a pair
    special: float  # of those, of the multi-function unit


class Resources(NamedTuple):
    """What one compiled kernel uses."""

    kernel: str
    variant: str
    dtype: str
    target: str
    shared: int  # bytes a program
    block: int  # columns, or whatever else BLOCK counts, of one iteration; 0 where there is none
    num_warps: int
    assembly: Assembly

    def sweeps(self) -> list[Sweep]:
        """The sweeps over full blocks of a row. Each is followed by a loop over the row's end.

        Empty for other kernels, and for GPUs whose loops cannot be told apart.
        """
        rows = ROWS_AT_ONCE.get(self.kernel)
        if rows is None or not self.target.startswith("sm_"):
            return []
        found = []
        for loop in self.assembly.loops[::2]:
            elements = loop.loads[16] * 16 // ELEMENT_BYTES[self.dtype] // rows
            found.append(Sweep(elements, loop.instructions / elements, loop.special / elements))
        return found

    def record(self) -> dict[str, Any]:
        """A flat mapping, as JSON takes it."""
        flat = self._asdict()
        assembly = flat.pop("assembly")
        lists = {"loops": assembly.loops, "sweeps": self.sweeps()}
        return flat | assembly._asdict() | {name: [x._asdict() for x in found] for name, found in lists.items()}


class Launch(NamedTuple):
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int


def recorded_launch(case: Case) -> Launch:
    """What the launcher would have launched on such a GPU: its kernel, with every argument by name."""
    launcher = getattr(fastpref_kernels, case.variant.call.__name__.removeprefix("_"))
    module = sys.modules[launcher.__module__]  # the package's attribute of that name may be the launcher
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    recorders = {name: mock.MagicMock() for name in kernels}
    warp_size = mock.patch.object(_launch, "warp_size", lambda device: TARGETS[case.target].warp_size)
    with warp_size, mock.patch.multiple(module, **recorders):
        case.variant.call(DTYPES[case.dtype], **case.variant.options)
    ((kernel, launched),) = (
        (kernels[name], call) for name, r in recorders.items() for call in r.__getitem__.return_value.call_args_list
    )
    named = dict(launched.kwargs)
    num_warps = named.pop("num_warps")
    return Launch(kernel, dict(zip(kernel.arg_names, launched.args, strict=False)) | named, num_warps)


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel, specialised as Triton does at run time.

    None and 1 are constants, and multiples of 16 are known to be such, unless the kernel says otherwise of an argument.
    """
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_tensor = isinstance(value, torch.Tensor)
        plain = parameter.do_not_specialize or (is_tensor and parameter.do_not_specialize_on_alignment)
        if parameter.is_constexpr or value is None or (not plain and not is_tensor and value == 1):
            signature[name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[name] = POINTERS[value.dtype] if is_tensor else "i32"
        if not plain and (is_tensor or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps})


def measure(case: Case) -> Resources:
    launch = recorded_launch(case)
    binary = compiled(launch, TARGETS[case.target])
    assembly = of_nvidia(binary.asm["cubin"]) if "cubin" in binary.asm else of_amd(binary.asm["amdgcn"])
    name = case.variant.call.__name__.removeprefix("_")
    return Resources(
        name, case.variant.name, case.dtype, case.target, binary.metadata.shared, launch.arguments.get("BLOCK", 0),
        launch.num_warps, assembly,
    )  # fmt: skip


def measure_candidate(tiles: linear_lse.Tiles) -> dict[str, Any]:
    """The product with a log-sum-exp in its epilogue (`linear_lse.py`), in bf16 for Hopper."""
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
    assembly = of_nvidia(binary.asm["cubin"])
    found = {name: getattr(assembly, name) for name in ("registers", "spills", "stack")}
    instructions = {"wgmma": "wgmma.mma_async", "tma": "cp.async.bulk.tensor"}
    used = {name: text in binary.asm["ptx"] for name, text in instructions.items()}
    return {"tiles": tiles, **found, "shared": binary.metadata.shared, **used}


def measure_all(cases: list[Case], workers: int = 2) -> list[Resources]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, cases, chunksize=4))


def table(results: list[Resources]) -> str:
    def accesses(counts: dict[int, int]) -> str:
        return " ".join(f"{count}x{width}B" for width, count in sorted(counts.items(), reverse=True))

    def loops(r: Resources) -> str:
        return ", ".join(f"{x.instructions}i {x.barriers}b {x.shuffles}s" for x in r.assembly.loops)

    header = ("target", "kernel", "variant", "dtype", "warps", "regs", "spills", "stack", "shared", "loads", "stores",
              "loops: instructions, barriers, shuffles")  # fmt: skip
    lines = [
        (r.target, r.kernel, r.variant, r.dtype, str(r.num_warps),
         *map(str, (r.assembly.registers, r.assembly.spills, r.assembly.stack, r.shared)),
         accesses(r.assembly.loads), accesses(r.assembly.stores), loops(r))
        for r in results
    ]  # fmt: skip
    sizes = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, sizes)).rstrip() for line in (header, *lines))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the records as JSON")
    parser.add_argument(
        "--kernel", default="", help="a pattern: only kernels whose name, variant, type and target match"
    )
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it to compile them")
    results = measure_all([case for case in CASES if re.search(args.kernel, case.name)])
    if args.json:
        candidates = [measure_candidate(tiles) for tiles in linear_lse.CANDIDATES]
        kernels = [r.record() for r in results]
        print(json.dumps({"triton": triton.__version__, "kernels": kernels, "candidates": candidates}, indent=1))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
