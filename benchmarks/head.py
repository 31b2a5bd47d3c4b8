"""The head of a language model under a DPO loss, forward and backward: fastpref, its own products, eager, peers.

    python -m benchmarks.head                       the CPU case, trainable and frozen
    python -m benchmarks.head --device cuda         the heads of four models
    python -m benchmarks.head --quick               a tiny case, to see that everything runs

Gradients are compared with fp64 before anything is timed; a wrong one refuses the report.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastpref
from benchmarks import measure, peers, record
from benchmarks.peers import IGNORE, Batch, Provider
from fastpref import reference


class Case(NamedTuple):
    """DPO on `pairs` pairs of `seq_len` tokens, `scored` of all their rows valid."""

    name: str
    d: int
    vocab: int
    pairs: int
    seq_len: int
    scored: int
    dtype: torch.dtype
    softcap: float | None = None
    trainable: bool = True

    @property
    def label(self) -> str:
        return f"{self.name}, {'trainable' if self.trainable else 'frozen'} head"

    def flops(self, products: int) -> int:
        return measure.matmul_flops(self.scored, self.d, self.vocab, products)


BF16 = torch.bfloat16
CASES = {
    "quick": Case("quick", 32, 1024, 2, 32, 40, torch.float32),
    "smollm2-fp32": Case("smollm2-fp32", 576, 49152, 4, 512, 1921, torch.float32),
    "smollm2": Case("smollm2", 576, 49152, 16, 512, 8192, BF16),
    "qwen-0.5b": Case("qwen-0.5b", 896, 151936, 16, 512, 8192, BF16),
    "gemma-2b": Case("gemma-2b", 2304, 256000, 8, 512, 4096, BF16, softcap=30.0),
    "llama-8b": Case("llama-8b", 4096, 128256, 8, 512, 8192, BF16),
}
DEFAULT_CASES = {"cpu": ("smollm2-fp32",), "cuda": ("llama-8b", "smollm2", "qwen-0.5b", "gemma-2b")}


class Target(NamedTuple):
    """A bound on fastpref against another provider: `seconds` or `peak_bytes`, ours over theirs or theirs over ours."""

    quantity: str
    against: str
    limit: float
    at_most: bool

    @property
    def text(self) -> str:
        name = {"seconds": "time", "peak_bytes": "memory"}[self.quantity]
        return f"{name} / {self.against} {name}" if self.at_most else f"{self.against} {name} / {name}"


# (case, trainable) -> the numbers to beat
TARGETS = {
    ("smollm2-fp32", True): (
        Target("seconds", "products", 1.2, True),
        Target("seconds", "eager", 3.0, False),
        Target("peak_bytes", "eager", 0.15, True),
    ),
    ("smollm2-fp32", False): (
        Target("seconds", "products", 1.2, True),
        Target("seconds", "eager", 2.5, False),
        Target("peak_bytes", "eager", 0.05, True),
    ),
    ("llama-8b", True): (
        Target("seconds", "products", 1.10, True),
        Target("seconds", "trl", 1.3, False),
        Target("seconds", "eager", 2.0, False),
    ),
    ("llama-8b", False): (
        Target("seconds", "products", 1.10, True),
        Target("seconds", "trl", 1.5, False),
        Target("seconds", "eager", 2.0, False),
    ),
}


def completion_lengths(case: Case) -> list[int]:
    """Scored rows of each sequence: different from pair to pair, `case.scored` in all."""
    base, rest = divmod(case.scored, 2 * case.pairs)
    spread = min(base // 4, case.seq_len - base - bool(rest))
    of_pair = [base + spread * (2 * i - case.pairs + 1) // case.pairs for i in range(case.pairs)]
    lengths = of_pair + [2 * base - length for length in of_pair]
    return [length + (i < rest) for i, length in enumerate(lengths)]


def make_batch(case: Case, device: torch.device, seed: int = 0) -> Batch:
    """Logits of standard deviation 2, completions in one piece after a prompt, padding behind; the reference
    model's log-probs near the policy's, so that no pair's gradient vanishes."""
    torch.manual_seed(seed)
    sequences = 2 * case.pairs
    hidden = torch.randn(sequences, case.seq_len, case.d, device=device).to(case.dtype)
    weight = (torch.randn(case.vocab, case.d, device=device) * (2 / case.d**0.5)).to(case.dtype)
    labels = torch.full((sequences, case.seq_len), IGNORE, device=device)
    for row, length in zip(labels, completion_lengths(case), strict=True):
        prompt = (case.seq_len - length) // 2
        row[prompt : prompt + length] = torch.randint(case.vocab, (length,), device=device)
    batch = Batch(hidden, weight, labels, torch.zeros(sequences, device=device), case.softcap)
    with torch.no_grad():
        logps = torch.stack([_token_logps(batch, s, torch.float32).sum() for s in range(sequences)])
    batch = batch._replace(ref_logps=logps + torch.randn(sequences, device=device))
    hidden.requires_grad_()
    weight.requires_grad_(case.trainable)
    return batch


def _token_logps(batch: Batch, sequence: int, dtype: torch.dtype) -> Tensor:
    rows = batch.labels[sequence] != IGNORE
    logits = F.linear(batch.hidden[sequence][rows], batch.weight).to(dtype)
    return reference.token_logprobs(logits, batch.labels[sequence][rows], softcap=batch.softcap)


class Truth(NamedTuple):
    logps: Tensor  # of each sequence
    loss: Tensor
    d_hidden: Tensor
    d_weight: Tensor


@torch.no_grad()
def truth(batch: Batch, *, with_reference: bool = True, rounded: bool = False) -> Truth:
    """Loss and gradients in fp64, sequence by sequence, from the specification's log-probs.

    `rounded` rounds to the compute dtype where every implementation on tensor cores does (logits, their gradient,
    the results): the error of that is what a perfect one would make.
    """

    def round_off(value: Tensor) -> Tensor:
        return value.to(batch.weight.dtype).double() if rounded else value

    weight = batch.weight.double()
    refs = batch.ref_logps.double() if with_reference else torch.zeros_like(batch.ref_logps, dtype=torch.float64)
    sequences = []
    for hidden, labels in zip(batch.hidden.double(), batch.labels, strict=True):
        rows = labels != IGNORE
        sequences.append((rows, hidden[rows], labels[rows]))

    def raw_logits(hidden: Tensor) -> Tensor:
        return round_off(hidden @ weight.T)

    logps = torch.stack(
        [reference.token_logprobs(raw_logits(h), y, softcap=batch.softcap).sum() for _, h, y in sequences]
    )
    with torch.enable_grad():
        loss = peers.dpo(logps.requires_grad_(), refs)
        coefs = torch.autograd.grad(loss, logps)[0]
    d_hidden, d_weight = torch.zeros_like(batch.hidden, dtype=torch.float64), torch.zeros_like(weight)
    for s, (rows, hidden, labels) in enumerate(sequences):
        with torch.enable_grad():
            raw = raw_logits(hidden).requires_grad_()
            total = reference.token_logprobs(raw, labels, softcap=batch.softcap).sum()
            gradient = round_off(coefs[s] * torch.autograd.grad(total, raw)[0])
        d_hidden[s, rows] = gradient @ weight
        d_weight += gradient.T @ hidden
    return Truth(logps.detach(), loss.detach(), round_off(d_hidden), round_off(d_weight))


def _error(value: Tensor, wanted: Tensor) -> float:
    """Relative L2; NaN anywhere makes it NaN, which passes no limit."""
    return float((value.double() - wanted).norm() / wanted.norm())


def check(provider: Provider, batch: Batch, wanted: Truth, limits: dict[str, float]) -> dict[str, Any]:
    """One provider's entry in the gate."""
    loss = peers.step(provider, batch)
    found = {"loss": (loss, wanted.loss), "d_hidden": (batch.hidden.grad, wanted.d_hidden)}
    if batch.weight.requires_grad:
        found["d_weight"] = (batch.weight.grad, wanted.d_weight)
    errors = {name: float("nan") if a is None else _error(a, b) for name, (a, b) in found.items()}
    batch.clear_gradients()
    passed = all(errors[name] <= limits[name] for name in errors)
    return {"provider": provider.name, "passed": passed, "errors": errors, "limits": limits}


# fp32 against fp64: what is left of a product is the order of summation.
FP32_LIMIT = 1e-5
# Half precision: so many times the error of a perfect implementation with the same rounding points. The others get
# ten times our limit: their gate asks whether they compute the same thing, and their error is in the record.
HALF_FACTOR, OTHERS_FACTOR = 2.0, 10.0


def _limits(batch: Batch, wanted: Truth, with_reference: bool) -> dict[str, float]:
    # Two sequence sums of thousands of nats enter a margin, each off by one fp32 rounding: that shifts the margin,
    # and with it a pair's coefficient relative to itself, by no more than this.
    coefficient = peers.BETA * 2 * torch.finfo(torch.float32).eps * float(wanted.logps.abs().max())
    names = ("loss", "d_hidden", "d_weight")
    if batch.weight.dtype == torch.float32:
        return dict.fromkeys(names, FP32_LIMIT + coefficient)
    ideal = truth(batch, with_reference=with_reference, rounded=True)
    of_ideal = {name: HALF_FACTOR * _error(getattr(ideal, name), getattr(wanted, name)) for name in names[1:]}
    limits = {name: error + coefficient for name, error in of_ideal.items()}
    return {"loss": max(limits.values())} | limits  # a lone scalar's error may happen to vanish


class RedGate(Exception):
    """fastpref or the baseline computes something else than the specification: no time means anything."""


def gate(providers: Sequence[Provider], batch: Batch) -> list[dict[str, Any]]:
    """Every provider's check; raises RedGate if one that is not a peer fails."""
    checks: list[dict[str, Any]] = []
    for with_reference in sorted({p.reference for p in providers}, reverse=True):
        wanted = truth(batch, with_reference=with_reference)
        limits = _limits(batch, wanted, with_reference)
        for provider in (p for p in providers if p.reference == with_reference):
            factor = 1.0 if provider.name == "fastpref" else OTHERS_FACTOR
            own = {name: limit * factor for name, limit in limits.items()}
            try:
                checks.append(check(provider, batch, wanted, own))
            except Exception as error:
                # a peer may refuse a case in any way it likes; of ours only memory may run out
                if not provider.peer and not isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                why = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                checks.append({"provider": provider.name, "passed": False, "errors": {}, "why": why})
    for failed in (c for c in checks if not c["passed"] and c["errors"]):
        if not next(p for p in providers if p.name == failed["provider"]).peer:
            raise RedGate(f"{failed['provider']}: gradient errors {failed['errors']}, limits {failed['limits']}")
    return checks


def _make_run(name: str, batch: Batch) -> Callable[[], object]:
    if name == "products":
        return peers.products(batch)
    if name == "products_in_place":
        return peers.products_in_place(batch)
    (provider,), _ = peers.load([name], batch.hidden.device)
    return lambda: peers.step(provider, batch)


def peak_of(name: str, case: Case, device: torch.device) -> int:
    """One provider's peak in this process. A small call first: loading code takes memory that no batch causes."""
    small = CASES["quick"]._replace(dtype=case.dtype, softcap=case.softcap, trainable=case.trainable)
    _make_run(name, make_batch(small, device))()
    return measure.peak_bytes(_make_run(name, make_batch(case, device)), device)


def _peak_in_fresh_process(name: str, case: Case) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_of, name, case, torch.device("cpu")).result()


def run_case(
    case: Case, names: Sequence[str], device: torch.device, repeats: int
) -> tuple[list[record.Row], list[dict[str, Any]], dict[str, str]]:
    """(rows, gate, absent) of one case."""
    batch = make_batch(case, device)
    providers, absent = peers.load(names, device)
    checks = gate(providers, batch)
    absent |= {c["provider"]: c.get("why", f"wrong gradients: {c['errors']}") for c in checks if not c["passed"]}
    measured = ["products", "products_in_place", *(c["provider"] for c in checks if c["passed"])]
    seconds = measure.interleave({name: _make_run(name, batch) for name in measured}, repeats, device)
    plan = fastpref.explain(batch.hidden, batch.weight, batch.labels, paired=True)
    rows, products = [], batch.products
    del batch
    for name in measured:
        peak = peak_of(name, case, device) if device.type == "cuda" else _peak_in_fresh_process(name, case)
        row: record.Row = {"case": case.label, "provider": name, "seconds": seconds[name], "peak_bytes": peak}
        if name.startswith("products"):
            row["flops"] = case.flops(products)
        if name == "fastpref":
            row["plan"] = plan
        rows.append(row)
    return rows, [{"case": case.label, **c} for c in checks], {f"{case.label}, {k}": v for k, v in absent.items()}


def judge(case: Case, rows: Sequence[record.Row]) -> list[dict[str, Any]]:
    """The case's targets with what was measured."""
    verdicts = []
    for target in TARGETS.get((case.name, case.trainable), ()):
        ours, theirs = (record.find(rows, case.label, name) for name in ("fastpref", target.against))
        found = record.ratio(*((ours, theirs) if target.at_most else (theirs, ours)), target.quantity)
        verdict: dict[str, Any] = {"case": case.label, "quantity": target.text, "limit": target.limit}
        verdict |= {"at_most": target.at_most, "value": None, "best": None, "met": None}
        if found is not None:
            value, best = found
            met = value <= target.limit if target.at_most else value >= target.limit
            verdict |= {"value": value, "best": best, "met": met}
        verdicts.append(verdict)
    return verdicts


def run(
    cases: Sequence[Case], device: torch.device, repeats: int, names: Sequence[str], suite: str,
    heads: Sequence[bool] = (True, False),
) -> record.Record:  # fmt: skip
    rows: list[record.Row] = []
    checks: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    load_before = record.machine()["load_average"]
    for case in cases:
        for trainable in heads:
            this = case._replace(trainable=trainable)
            case_rows, case_checks, case_absent = run_case(this, names, device, repeats)
            rows += case_rows
            checks += case_checks
            absent |= case_absent
            targets += judge(this, case_rows)
    settings = {
        "device": device.type,
        "repeats": repeats,
        "cases": [case._asdict() | {"dtype": str(case.dtype)} for case in cases],
        "timing": "interleaved rounds; ratios are medians over the rounds, best of each in brackets",
        "products": peers.products.__doc__,
        "load_average_before": load_before,
    }
    return record.new(suite, settings=settings, rows=rows, gate=checks, targets=targets, absent=absent)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny case: shows that it runs, measures nothing")
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--providers", help=f"comma-separated, of {', '.join(peers.NAMES)}")
    parser.add_argument("--heads", choices=("trainable", "frozen", "both"), default="both")
    parser.add_argument("--repeats", type=int, help="rounds (default: 5 on a CPU, 20 on CUDA)")
    parser.add_argument("--json", type=Path, help="write the record to this file, or into this folder")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.head: PyTorch finds no CUDA device here", file=sys.stderr)
        return 2
    cases = ("quick",) if args.quick else args.cases.split(",") if args.cases else DEFAULT_CASES[args.device]
    # compiling eager takes longer than running it on a CPU
    default = [n for n in peers.NAMES if device.type == "cuda" or n != "eager_compiled"]
    names = args.providers.split(",") if args.providers else default
    if unknown := (set(cases) - set(CASES)) | (set(names) - set(peers.NAMES)):
        parser.error(f"got {', '.join(sorted(unknown))}, want cases and providers named in --help")
    heads = {"trainable": (True,), "frozen": (False,), "both": (True, False)}[args.heads]
    suite = "-".join(["head", args.device, *(() if cases == DEFAULT_CASES[args.device] else cases)])
    repeats = args.repeats or (2 if args.quick else 20 if device.type == "cuda" else 5)
    try:
        found = run([CASES[name] for name in cases], device, repeats, names, suite, heads)
    except RedGate as error:
        print(f"benchmarks.head: the gate is red, nothing is reported: {error}", file=sys.stderr)
        return 1
    print(record.table(found))
    if args.json:
        print(f"\nwritten to {record.write(found, args.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
