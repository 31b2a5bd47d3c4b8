"""What every benchmark suite is made of, and how one is run: first a check of the results, then timings, then memory.

A suite has cases. A case becomes a `Problem`: inputs on a device, who can compute the thing, and what is right.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import limits, measure, record

NAMES = ("head", "logits", "kl", "reward", "losses", "train", "scale")

# fp32 against fp64: what is left is the order of summation.
FP32_LIMIT = 1e-5
# Half precision: so many times the error of a perfect implementation with the same rounding points. The others get
# ten times our limit: their gate asks whether they compute the same thing, and their error is in the record.
HALF_FACTOR, OTHERS_FACTOR = 2.0, 10.0
# KTO's gradient without a reference, of log-probs in the hundreds of nats, is 1e-27 where others have 1e-2
VANISHED = 1e-12

# imported once, and not in every process that measures memory: each takes seconds; what is missing is left out
PRELOADED = [*(f"benchmarks.{name}" for name in NAMES), "transformers.models.llama", "trl.trainer.utils", "trl.kernels"]

Results = Mapping[str, Tensor]


class Absent(Exception):
    """A provider that cannot run here, and why."""


class RedGate(Exception):
    """fastpref or the baseline computes something other than the specification. Then no time means anything."""


class Problem(ABC):
    """One case on one device. `flops` and `bytes` are the least that any way of computing it takes."""

    label: str
    dtype: torch.dtype
    providers: tuple[str, ...]
    unchecked: tuple[str, ...] = ()  # they return nothing to compare: bounds, not ways
    flops: int = 0
    bytes: int = 0
    axis: tuple[str, int] | None = None  # what a scaling case varies, and its value

    @abstractmethod
    def call(self, provider: str) -> Callable[[], Results]:
        """What is timed. Its results are compared with `truth`.

        Raises:
            Absent: the provider cannot run here.
        """

    @abstractmethod
    def truth(self, provider: str) -> Results:
        """The results in fp64. By provider, because another library may be unable to compute quite the same thing."""

    def limits(self, provider: str, truth: Results, results: Results) -> dict[str, float]:
        """The largest relative L2 errors that fastpref may have."""
        return {name: FP32_LIMIT + rounding_limit(truth[name], value.dtype) for name, value in results.items()}

    def predicted_peak(self, provider: str) -> int | None:
        """Bytes beyond the inputs by formula, where there is one."""
        return None

    def details(self, provider: str) -> dict[str, Any]:
        return {}


class Task(Problem):
    """A problem with one right answer for all, and a table of who computes it."""

    def __init__(
        self, label: str, dtype: torch.dtype, makers: Mapping[str, Callable[[], Callable[[], Results]]],
        truth: Callable[[], Results], *, bytes: int = 0, flops: int = 0, peaks: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        self.label, self.dtype, self.bytes, self.flops = label, dtype, bytes, flops
        self.providers = tuple(makers)
        self._makers, self._peaks = makers, peaks or {}
        self._truth = functools.cache(truth)

    def call(self, provider: str) -> Callable[[], Results]:
        return self._makers[provider]()

    def truth(self, provider: str) -> Results:
        return self._truth()

    def predicted_peak(self, provider: str) -> int | None:
        return self._peaks.get(provider)


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Relative L2 error. NaN anywhere makes it NaN, which passes no limit."""
    return float((value.double() - wanted).norm() / wanted.norm())


def rounding_limit(truth: Tensor, dtype: torch.dtype) -> float:
    """What rounding the truth to a half precision costs, times `HALF_FACTOR`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    return HALF_FACTOR * relative_error(truth.to(dtype), truth)


class Suite(NamedTuple):
    name: str
    title: str
    build: Callable[[Any, torch.device], Problem]
    cases: Mapping[str, Sequence[Any]]  # by device; "quick" for seconds on a CPU. NamedTuples with a `label`
    memory: bool = True  # is the peak worth a fresh process
    judge: Callable[[Sequence[record.Row]], list[dict[str, Any]]] | None = None


def take_interrupts() -> None:
    """SIGINT is a KeyboardInterrupt, also in the background, where a shell starts processes that ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def load(name: str) -> Suite:
    return importlib.import_module(f"benchmarks.{name}").SUITE


class Options(NamedTuple):
    device: torch.device
    repeats: int
    quick: bool = False
    providers: tuple[str, ...] | None = None
    memory: bool = True
    deadline: float | None = None  # of time.monotonic(): no case is started after it
    save: Callable[[record.Record], object] | None = None  # after every case: what is killed keeps what it had


INTERRUPTED = "interrupted"
COMPILES = "compiles for longer than it runs; name it with --providers to have it"
LEFT_OUT = {"eager_compiled": COMPILES}  # 10 to 40 s a case on a GPU, more on a CPU
LEFT_OUT_OF_QUICK = LEFT_OUT | {
    "liger": "compiles for longer than all of --quick",
    "torch_linear_cross_entropy": "takes ten times as long as eager on a CPU (torch 2.13)",
}


def _wanted(problem: Problem, options: Options) -> tuple[list[str], dict[str, str]]:
    if options.providers is not None:
        return [n for n in problem.providers if n in options.providers or n in problem.unchecked], {}
    left_out = LEFT_OUT_OF_QUICK if options.quick else LEFT_OUT
    left_out = {name: why for name, why in left_out.items() if name in problem.providers}
    return [n for n in problem.providers if n not in left_out], left_out


def check(problem: Problem, provider: str, call: Callable[[], Results]) -> dict[str, Any]:
    """One provider's entry in the gate.

    Raises:
        Absent: there is nothing to compare.
    """
    results, truth = call(), problem.truth(provider)
    if any(wanted.abs().max() < VANISHED for wanted in truth.values()):
        raise Absent("the right gradient of what it computes vanishes here (its sigmoids saturate): nothing to compare")
    factor = 1.0 if is_ours(provider) else OTHERS_FACTOR
    limits = {name: factor * limit for name, limit in problem.limits(provider, truth, results).items()}
    errors = {
        name: relative_error(results[name], wanted) if name in results else float("nan")
        for name, wanted in truth.items()
    }
    passed = all(errors[name] <= limits.get(name, 0.0) for name in errors)
    return {"provider": provider, "passed": passed, "errors": errors, "limits": limits}


def is_ours(provider: str) -> bool:
    return provider.startswith("fastpref")


class Gate(NamedTuple):
    calls: dict[str, Callable[[], Results]]  # of who is right
    checks: list[dict[str, Any]]
    absent: dict[str, str]


def gate(problem: Problem, names: Sequence[str]) -> Gate:
    """Checks all providers' results.

    Raises:
        RedGate: fastpref or eager is wrong.
    """
    found = Gate({}, [], {})
    for name in names:
        must_run = is_ours(name) or name.startswith("eager")
        try:
            call = problem.call(name)
            if name not in problem.unchecked:
                found.checks.append(check(problem, name, call))
        except Absent as error:
            found.absent[name] = str(error)
            continue
        except Exception as error:
            # a peer may refuse a case in any way it likes; of ours only memory may run out
            if must_run and not isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            found.checks.append({"provider": name, "passed": False, "errors": {}, "why": why})
            found.absent[name] = why
            continue
        if name in problem.unchecked or found.checks[-1]["passed"]:
            found.calls[name] = call
            continue
        errors = found.checks[-1]["errors"]
        if must_run:
            raise RedGate(f"{problem.label}, {name}: errors {errors}, limits {found.checks[-1]['limits']}")
        found.absent[name] = f"wrong results: {errors}"
    return found


def _peak(suite: str, case: Any, small: Any, provider: str, device: torch.device) -> int:
    """One provider's peak in this process.

    A small call comes first: loading code takes memory that no batch causes.
    """
    if device.type == "cpu":
        measure.return_freed_memory()
    build = load(suite).build
    build(small, device).call(provider)()
    return measure.peak_bytes(build(case, device).call(provider), device)


def _peak_in_fresh_process(suite: str, case: Any, small: Any, provider: str) -> int:
    """The same in a new process, forked from one that has imported what every suite needs and done nothing else."""
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    multiprocessing.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, suite, case, small, provider, torch.device("cpu")).result()


def run_case(suite: Suite, case: Any, options: Options):
    """(rows, gate, absent) of one case."""
    torch.compiler.reset()  # after some recompilations of one function torch.compile gives up, and runs it as it is
    problem = suite.build(case, options.device)
    names, absent = _wanted(problem, options)
    calls, checks, missing = gate(problem, names)
    seconds = measure.interleave(calls, options.repeats, options.device, warm_up=0 if options.quick else 1)
    rows = []
    for name in calls:
        row: record.Row = {"case": problem.label, "provider": name, "seconds": seconds[name],
                           "flops": problem.flops, "bytes": problem.bytes,
                           "dtype": str(problem.dtype).removeprefix("torch.")}  # fmt: skip
        if problem.axis is not None:
            row["axis"], row["x"] = problem.axis
        if (predicted := problem.predicted_peak(name)) is not None:
            row["predicted_bytes"] = predicted
        rows.append(row | problem.details(name))
    del calls, problem
    if suite.memory and options.memory:
        small = suite.cases["small"][0]
        for row in rows:
            arguments = (suite.name, case, _like(small, case), row["provider"])
            on_gpu = options.device.type == "cuda"
            row["peak_bytes"] = _peak(*arguments, options.device) if on_gpu else _peak_in_fresh_process(*arguments)
    absent |= missing
    return rows, [{"case": case.label, **c} for c in checks], {f"{case.label}, {k}": why for k, why in absent.items()}


def _like(small: Any, case: Any) -> Any:
    """The small case with everything of the large one except its sizes."""
    return small._replace(**{k: v for k, v in case._asdict().items() if not isinstance(v, int) or isinstance(v, bool)})


def run(suite: Suite, cases: Sequence[Any], options: Options, name: str | None = None) -> record.Record:
    """The record of all cases that there was time for.

    An interrupt (SIGINT) ends it early; `absent` says where.
    """
    rows: list[record.Row] = []
    checks: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    load_before = record.machine()["load_average"]
    dtypes = {getattr(case, "dtype", torch.float32) for case in cases}
    found = limits.find(options.device, dtypes, options.quick)

    def so_far() -> record.Record:
        return record.new(
            name or f"{suite.name}-{options.device.type}",
            settings=_settings(suite, cases, options) | {"load_average_before": load_before},
            rows=rows, gate=checks, targets=suite.judge(rows) if suite.judge else [], absent=absent,
            limits=found._asdict(),
        )  # fmt: skip

    for i, case in enumerate(cases):
        if options.deadline is not None and time.monotonic() > options.deadline:
            absent[case.label] = "out of time (--seconds)"
            continue
        try:
            case_rows, case_checks, case_absent = run_case(suite, case, options)
        except Absent as error:  # what every provider of the case needs
            absent[case.label] = str(error)
            continue
        except KeyboardInterrupt:
            absent |= dict.fromkeys((late.label for late in cases[i:]), INTERRUPTED)
            return so_far()
        rows += case_rows
        checks += case_checks
        absent |= case_absent
        if options.save is not None:
            options.save(so_far())
    found = limits.best(found, limits.find(options.device, dtypes, options.quick))
    return so_far()


def _settings(suite: Suite, cases: Sequence[Any], options: Options) -> dict[str, Any]:
    return {
        "device": options.device.type,
        "repeats": options.repeats,
        "quick": options.quick,
        "title": suite.title,
        "cases": [{k: str(v) if isinstance(v, torch.dtype) else v for k, v in c._asdict().items()} for c in cases],
        "timing": "interleaved rounds, cold cache; ratios are medians over the rounds, best of each in brackets",
    }
