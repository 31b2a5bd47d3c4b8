"""Reads a compiled kernel's assembly: registers, spills, widths of memory accesses, and what its loops do."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

WIDTHS = {  # bytes of one access, by the suffix of the instruction; LDG and STG without one move 4
    **{"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1},
    **{"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4},
    **{"ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1},
}


class Loop(NamedTuple):
    """One iteration of an innermost loop, for one thread."""

    instructions: int
    barriers: int
    shuffles: int
    special: int  # of the multi-function unit: exp2, log2, reciprocals
    loads: dict[int, int]  # width in bytes -> instructions
    stores: dict[int, int]


class Assembly(NamedTuple):
    """What the assembly says. Accesses are counts of global instructions by their width in bytes."""

    registers: int
    spills: int  # instructions that access spilled registers (sm), or registers spilled (gfx)
    stack: int  # bytes a thread, spills included
    loads: dict[int, int]
    stores: dict[int, int]
    loops: list[Loop]


class Dialect(NamedTuple):
    """Patterns of the instructions that count. The group of an access is what names its width."""

    load: str
    store: str
    barrier: str
    shuffle: str
    special: str


SASS = Dialect(r"\bLDG((?:\.\w+)*)", r"\bSTG((?:\.\w+)*)", r"\bBAR\b", r"\bSHFL\b", r"\bMUFU\b")
GCN = Dialect(
    r"\b(?:global|buffer)_load_(\w+)", r"\b(?:global|buffer)_store_(\w+)", r"\bs_barrier\b",
    r"\bds_(?:bpermute|permute|swizzle)|_dpp\b", r"\bv_(?:exp|log|rcp|rsq|sqrt)_",
)  # fmt: skip


def _accesses(code: list[str], pattern: str) -> dict[int, int]:
    """Counts the instructions that match `pattern`, by width in bytes. The pattern's group is the suffix."""
    found: Counter[int] = Counter()
    for text in code:
        if access := re.search(pattern, text):
            found[next((WIDTHS[x] for x in re.split(r"[._]", access[1]) if x in WIDTHS), 4)] += 1
    return dict(sorted(found.items()))


def _loop(code: list[str], dialect: Dialect) -> Loop:
    def number(pattern: str) -> int:
        return sum(bool(re.search(pattern, text)) for text in code)

    return Loop(
        len(code), number(dialect.barrier), number(dialect.shuffle), number(dialect.special),
        _accesses(code, dialect.load), _accesses(code, dialect.store),
    )  # fmt: skip


def _matched(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in\n{text[:2000]}"
    return list(map(int, found.groups()))


def of_nvidia(cubin: bytes) -> Assembly:
    """Reads SASS. A loop lies between the target of a branch backwards and the branch."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", run.stdout)]
    branches = [(at, int(to[1], 16)) for at, what in lines if (to := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", what))]
    ends: dict[int, int] = {}
    for end, start in branches:
        if start < end:  # equal: the trap behind the last instruction
            ends[start] = max(end, ends.get(start, end))
    inner = [(a, b) for a, b in ends.items() if not any(a <= c and d <= b for c, d in ends.items() if (a, b) != (c, d))]
    loops = [_loop([what for at, what in lines if first <= at <= last], SASS) for first, last in sorted(inner)]
    code = [what for _, what in lines]
    registers, stack, local = _matched(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", run.stdout)
    spills = sum(_accesses(code, r"\b(?:LDL|STL)((?:\.\w+)*)").values())
    return Assembly(
        registers, spills, stack + local, _accesses(code, SASS.load), _accesses(code, SASS.store), loops
    )  # fmt: skip


def of_amd(amdgcn: str) -> Assembly:
    """Reads AMD's assembly, in which every block says which loop contains it."""
    blocks: dict[str, list[str]] = {}
    code, block, header = [], "", ""
    for line in amdgcn.splitlines():
        if label := re.match(r"\.L(BB\w+):|; %bb", line):
            block, header = label[1], ""
        if inside := re.search(r"in Loop: Header=(BB\w+)", line):
            header = inside[1]
        elif "This Inner Loop Header" in line:
            header = block
        elif re.match(r"\s+[a-z]\w+(\s|$)", line):
            code.append(line)
            if header:
                blocks.setdefault(header, []).append(line)
    (vgprs,), (vgpr_spills,), (sgpr_spills,), (stack,) = (
        _matched(rf"\.{field}:\s+(\d+)", amdgcn)
        for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    loops = [_loop(block, GCN) for block in blocks.values()]
    return Assembly(
        vgprs, vgpr_spills + sgpr_spills, stack, _accesses(code, GCN.load), _accesses(code, GCN.store), loops
    )  # fmt: skip
