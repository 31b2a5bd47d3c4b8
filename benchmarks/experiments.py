"""What a GPU must answer before the kernels are tuned: six small experiments, each a set of rows in one record.

    python -m benchmarks.experiments --device cuda --json FOLDER
    python -m benchmarks.experiments --quick            tiny sizes on the CPU, to see that everything runs

bandwidth   copying memory and one large product: the roofs that everything else is a share of
rows        row kernels over BLOCK x warps: forward, forward with U in place, gradient, and the same of exact KL
rounding    a product stored as the compute dtype against one stored in fp32
accumulate  a product added to an fp32 gradient against one that overwrites it
operand     dW = U^T H with U contiguous against U with a padded row stride
epilogue    log-probs without gradients: cuBLAS and the row kernel against a product that takes the log-sum-exp itself
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure, record, suite
from fastpref import backends, linear_token_logprobs
from fastpref.plans.products import matmul_into
from fastpref.reference import LogitTransform


class Sizes(NamedTuple):
    rows: int
    d: int
    vocab: int
    tiles: tuple[int, ...]  # rows of one product
    narrow: int  # d of a small model: Qwen2.5-0.5B
    copy_bytes: int


FULL = Sizes(8192, 4096, 128256, (2048, 4096, 8192), 896, 4 << 30)
QUICK = Sizes(16, 32, 512, (8, 16), 16, 1 << 20)
BLOCKS = (1024, 2048, 4096, 8192, 16384)
WARPS = (4, 8, 16)
AS_LAUNCHED = "as launched"
MAX_ERROR = 1e-4  # of log-probs from fp32 sums
PADDING = 64  # elements between rows of the strided operand


class Run(NamedTuple):
    name: str
    call: Callable[[], Any]
    flops: int = 0
    bytes: int = 0
    check: Callable[[Tensor], None] | None = None  # of what a first call returns; raises ValueError


Experiment = Callable[[Sizes, torch.device, torch.dtype], Iterator[Run]]


def bandwidth(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    source = torch.ones(sizes.copy_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield Run("copy", lambda: target.copy_(source), bytes=sizes.copy_bytes)
    hidden, weight = _operands(sizes, sizes.rows, device, dtype)
    out = weight.new_empty(sizes.rows, sizes.vocab)
    flops = measure.matmul_flops(sizes.rows, sizes.d, sizes.vocab, 1)
    yield Run("product", lambda: torch.mm(hidden, weight.t(), out=out), flops=flops)


def _operands(sizes: Sizes, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(rows, sizes.d, device=device).to(dtype)
    return hidden, (torch.randn(sizes.vocab, sizes.d, device=device) * (2 / sizes.d**0.5)).to(dtype)


def rows(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    """The row kernels. Bytes count every pass.

    U in place reads the logits twice, though the L2 cache may still have the row.
    """
    n, vocab = sizes.rows, sizes.vocab
    logits = torch.randn(n, vocab, device=device, dtype=dtype)
    u = logits.clone()  # overwritten again and again: the time does not depend on the values
    labels = torch.randint(vocab, (n,), device=device)
    options: dict[str, Any] = {"transform": LogitTransform(), "ignore_index": -100}
    kl_options: dict[str, Any] = {"transform": LogitTransform(), "direction": "reverse"}
    backend = backends.backend_for(logits)
    done = backend.row_logprob(logits, labels, **options)
    logps, lse = done["logps"], done["lse"]

    def bytes_of(passes: int) -> int:
        return measure.row_bytes(n, vocab, logits.element_size(), passes)

    def with_u() -> None:
        backend.row_logprob(u, labels, write_u=True, **options)

    def configured(call: Callable[[], object], block: int, warps: int) -> Callable[[], object]:
        # the launchers' own choice, replaced for the call
        launch: Any = importlib.import_module("fastpref_kernels._launch")

        def run() -> object:
            own, launch.row_block = launch.row_block, lambda *_: (block, warps)
            try:
                return call()
            finally:
                launch.row_block = own

        return run

    kinds: list[tuple[str, Callable[[], object], int]] = [
        ("forward", lambda: backend.row_logprob(logits, labels, **options), 1),
        ("forward + U", with_u, 3),
        ("gradient", lambda: backend.row_gradient(logits, labels, logps, lse, u, **options), 2),
        ("exact KL", lambda: backend.token_kl(logits, u, **kl_options), 2),
        ("exact KL + K", lambda: backend.token_kl(u, logits, write_k=True, **kl_options), 5),
        ("exact KL gradient", lambda: backend.token_kl_gradient(logits, logits, lse, lse, lse, u, **kl_options), 3),
    ]
    triton = backends.choose(device).name == "triton"
    for name, call, passes in kinds:
        yield Run(f"{name}, {AS_LAUNCHED}", call, bytes=bytes_of(passes))
        for block in BLOCKS if triton else ():
            for warps in WARPS:
                configuration = configured(call, block, warps)
                yield Run(f"{name}, BLOCK {block} warps {warps}", configuration, bytes=bytes_of(passes))


def rounding(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    product = functools.partial(matmul_into, add=False)
    for n in sizes.tiles:
        hidden, weight = _operands(sizes, n, device, dtype)
        u = torch.mm(hidden, weight.t())
        flops = measure.matmul_flops(n, sizes.d, sizes.vocab, 1)
        for out_dtype in dict.fromkeys((dtype, torch.float32)):
            kept = f"{n} rows, out {str(out_dtype).removeprefix('torch.')}"
            d_hidden, d_weight = (torch.empty_like(t, dtype=out_dtype) for t in (hidden, weight))
            yield Run(f"dH, {kept}", functools.partial(product, d_hidden, u, weight), flops=flops)
            yield Run(f"dW, {kept}", functools.partial(product, d_weight, u.t(), hidden), flops=flops)


def accumulate(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    d_weight = torch.zeros(sizes.vocab, sizes.d, device=device)
    for n in sizes.tiles:
        hidden, weight = _operands(sizes, n, device, dtype)
        u = torch.mm(hidden, weight.t())
        flops = measure.matmul_flops(n, sizes.d, sizes.vocab, 1)
        for add in (False, True):
            call = functools.partial(matmul_into, d_weight, u.t(), hidden, add=add)
            yield Run(f"dW {'+=' if add else '='}, {n} rows", call, flops=flops)


def operand(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    hidden, weight = _operands(sizes, sizes.rows, device, dtype)
    d_weight = torch.empty_like(weight)
    flops = measure.matmul_flops(sizes.rows, sizes.d, sizes.vocab, 1)
    for padding in (0, PADDING, 1):
        u = torch.randn(sizes.rows, sizes.vocab + padding, device=device).to(dtype)[:, : sizes.vocab]
        call = functools.partial(matmul_into, d_weight, u.t(), hidden, add=False)
        yield Run(f"dW, row stride V + {padding}", call, flops=flops)


def epilogue(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    """At a large head and at a narrow one, where the elementwise pass weighs most. The results are first checked
    against fp64."""
    from benchmarks import linear_lse

    triton = backends.choose(device).name == "triton"
    for n, d in ((sizes.rows, sizes.d), (sizes.rows, sizes.narrow), (max(1, sizes.tiles[0] // 8), sizes.d)):
        hidden, weight = _operands(sizes._replace(d=d), n, device, dtype)
        labels = torch.randint(sizes.vocab, (n,), device=device)
        name, flops = f"{n} rows, d = {d}", measure.matmul_flops(n, d, sizes.vocab, 1)
        plan = functools.partial(linear_token_logprobs, hidden, weight, labels)
        few = slice(0, 64)
        wanted = (hidden[few].double() @ weight.double().T).log_softmax(-1).gather(1, labels[few, None])[:, 0]
        check = functools.partial(_check, wanted)
        yield Run(f"plan no_grad, {name}", plan, flops=flops)
        for tiles in linear_lse.CANDIDATES if triton else ():
            candidate = functools.partial(linear_lse.linear_logprobs, hidden, weight, labels, tiles)
            called = f"tiles {tiles.rows} x {tiles.vocab}, stages {tiles.num_stages}, {name}"
            yield Run(called, candidate, flops=flops, check=check)


def _check(wanted: Tensor, found: Tensor) -> None:
    error = float((found[: len(wanted)] - wanted).norm() / wanted.norm())
    if not error <= MAX_ERROR:
        raise ValueError(f"got a relative error of {error:.1e} from fp64, want at most {MAX_ERROR}")


EXPERIMENTS: dict[str, Experiment] = {
    "bandwidth": bandwidth,
    "rows": rows,
    "rounding": rounding,
    "accumulate": accumulate,
    "operand": operand,
    "epilogue": epilogue,
}
ROW_KERNEL_SHARE = 0.93  # of the measured copy bandwidth


def judge(rows: Sequence[record.Row]) -> list[dict[str, Any]]:
    """The row kernels, launched as they are, against a copy of memory."""

    def rate(row: record.Row, of: Callable[[Sequence[float]], float]) -> float:
        return row["bytes"] / of(row["seconds"])

    copy = record.find(rows, "bandwidth", "copy")
    verdicts = []
    for row in rows:
        if row["case"] == "rows" and row["provider"].endswith(AS_LAUNCHED) and copy is not None:
            value, best = (rate(row, of) / rate(copy, of) for of in (statistics.median, min))
            verdict = {"case": row["provider"], "quantity": "bandwidth / copy bandwidth", "limit": ROW_KERNEL_SHARE}
            verdicts.append(
                verdict | {"at_most": False, "value": value, "best": best, "met": value >= ROW_KERNEL_SHARE}
            )
    return verdicts


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _works(experiment: str, one: Run, absent: dict[str, str]) -> bool:
    """Whether the device takes this run, and its result is right.

    Triton's errors (a tile too large for an SM, say) have no common kind. They cost this run alone.
    """
    try:
        found = one.call()
        if one.check is not None:
            one.check(found)
    except Exception as error:
        absent[f"{experiment}, {one.name}"] = _first_line(error)
        return False
    return True


def run(
    names: Sequence[str], sizes: Sizes, device: torch.device, dtype: torch.dtype, repeats: int,
    save: Callable[[record.Record], object] | None = None,
) -> record.Record:  # fmt: skip
    """Runs one experiment after the other, with the runs of each interleaved.

    `save` gets the record after each. An interrupt (SIGINT) ends it early.
    """
    found: list[record.Row] = []
    absent: dict[str, str] = {}
    settings = {"device": device.type, "repeats": repeats, "sizes": sizes._asdict(), "dtype": str(dtype)}

    def so_far() -> record.Record:
        targets = judge(found) if device.type == "cuda" else None
        return record.new(f"experiments-{device.type}", settings=settings, rows=found, targets=targets, absent=absent)

    for i, name in enumerate(names):
        try:
            runs = [one for one in EXPERIMENTS[name](sizes, device, dtype) if _works(name, one, absent)]
            seconds = measure.interleave({one.name: one.call for one in runs}, repeats, device, warm_up=2)
        except KeyboardInterrupt:
            absent |= dict.fromkeys(names[i:], suite.INTERRUPTED)
            break
        except Exception as error:  # memory, say; the other experiments are still worth their record
            absent[name] = _first_line(error)
            continue
        for one in runs:
            row: record.Row = {"case": name, "provider": one.name, "seconds": seconds[one.name]}
            found.append(row | {k: v for k, v in (("flops", one.flops), ("bytes", one.bytes)) if v})
        if save is not None:
            save(so_far())
    return so_far()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the record to this file, or into this folder")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.experiments: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    names = args.only.split(",") if args.only else list(EXPERIMENTS)
    if unknown := set(names) - set(EXPERIMENTS):
        parser.error(f"got {', '.join(sorted(unknown))}, want of {', '.join(EXPERIMENTS)}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    save = functools.partial(record.write, path=args.json) if args.json else None
    suite.take_interrupts()
    found = run(names, QUICK if args.quick else FULL, device, dtype, args.repeats, save)
    print(record.table(found))
    if args.json:
        print(f"\nwritten to {record.write(found, args.json)}")
    return 1 if found["absent"] else 0


if __name__ == "__main__":
    sys.exit(main())
