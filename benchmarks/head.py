"""Suite: a language model's head under a preference loss, forward and backward, by fastpref and everyone else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import formulas, measure, peers, record
from benchmarks.objectives import BETA, IGNORE, OBJECTIVES, Batch
from benchmarks.shapes import HEADS
from benchmarks.suite import FP32_LIMIT, HALF_FACTOR, Problem, Results, Suite, relative_error
from fastpref import reference
from fastpref.objectives.head_inputs import HeadOptions, Layout, choose_plan, head_inputs


class Case(NamedTuple):
    """`pairs` pairs of `seq_len` tokens. `scored` of all their rows have a label."""

    name: str
    d: int
    vocab: int
    pairs: int
    seq_len: int
    scored: int
    dtype: torch.dtype
    softcap: float | None = None
    trainable: bool = True
    objective: str = "dpo"
    providers: tuple[str, ...] = ()  # these only; none: all that there are
    axis: str | None = None  # the field that a scaling suite varies

    @property
    def label(self) -> str:
        objective = "" if self.objective == "dpo" else f", {self.objective}"
        return f"{self.name}{objective}, {'trainable' if self.trainable else 'frozen'} head"

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.seq_len

    def flops(self, products: int) -> int:
        return measure.matmul_flops(self.scored, self.d, self.vocab, products)


def case(name: str, head: str, pairs: int, seq_len: int, scored: int, dtype: torch.dtype, **more: Any) -> Case:
    shape = HEADS[head]
    return Case(name, shape.d, shape.vocab, pairs, seq_len, scored, dtype, shape.softcap, **more)


def both(one: Case) -> list[Case]:
    return [one, one._replace(trainable=False)]


BF16 = torch.bfloat16
BOUNDS = ("products", "products_in_place")
COMMON = (
    "fastpref",
    "eager",
    "eager_compacted",
    "trl",
    "liger",
    "liger_cross_entropy",
    "cce",
    "torch_linear_cross_entropy",
)
# Liger compiles anew for every shape, for longer than all the rest of a case takes
GPU = tuple(name for name in COMMON if name not in ("liger", "eager_compacted"))
SMALL = Case("small", 32, 1024, 2, 32, 40, torch.float32)
CPU = case("smollm2-fp32", "smollm2-135m", 4, 512, 1921, torch.float32)
DENSE, MASKED = (case(f"smollm2 {name}", "smollm2-135m", 1, 512, n, torch.float32)
                 for name, n in (("dense", 1024), ("half masked", 512)))  # fmt: skip
LLAMA = case("llama-3-8b", "llama-3-8b", 8, 1024, 8192, BF16)
# 12.25 ms forward + 37.9 ms backward on an H100, per token: the fastest published kernel for Hopper
PUBLISHED = case("liger's published", "liger-1370", 8, 512, 8192, BF16, objective="nll", providers=GPU)
CASES: dict[str, list[Case]] = {
    "small": [SMALL],
    "quick": both(case("smollm2 quick", "smollm2-135m", 1, 128, 128, torch.float32, providers=COMMON)),
    "cpu": [
        *both(CPU),
        *both(DENSE._replace(providers=COMMON)),
        *(MASKED._replace(objective=name, providers=COMMON) for name in OBJECTIVES if name != "dpo"),
    ],
    "cuda": [
        *both(LLAMA),
        PUBLISHED,
        *both(LLAMA._replace(name="llama-3-8b dense", pairs=4, providers=GPU)),
        *(LLAMA._replace(objective=name, providers=COMMON) for name in OBJECTIVES if name != "dpo"),
        case("llama-3-70b", "llama-3-70b", 8, 512, 4096, BF16, providers=GPU),
        *both(case("smollm2-135m", "smollm2-135m", 16, 512, 8192, BF16, providers=GPU)),
        *both(case("qwen2.5-0.5b", "qwen2.5-0.5b", 16, 512, 8192, BF16, providers=GPU)),
        case("qwen2.5-7b", "qwen2.5-7b", 8, 512, 4096, BF16, providers=GPU),
        case("gemma-2-2b", "gemma-2-2b", 8, 512, 4096, BF16, providers=GPU),
        case("gemma-3-4b", "gemma-3-4b", 8, 512, 4096, BF16, providers=GPU),
    ],
}


def completion_lengths(case: Case) -> list[int]:
    """Scored rows of each sequence. They differ from pair to pair, and are `case.scored` in all."""
    base, rest = divmod(case.scored, 2 * case.pairs)
    spread = min(base // 4, case.seq_len - base - bool(rest))
    of_pair = [base + spread * (2 * i - case.pairs + 1) // case.pairs for i in range(case.pairs)]
    lengths = of_pair + [2 * base - length for length in of_pair]
    return [length + (i < rest) for i, length in enumerate(lengths)]


def make_batch(case: Case, device: torch.device, seed: int = 0) -> Batch:
    """A batch with logits of standard deviation 2, a completion in one piece after each prompt, and padding behind.

    The reference model's log-probs are near the policy's, so that no pair's gradient vanishes.
    """
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
def truth(batch: Batch, objective: str = "dpo", *, with_reference: bool = True, rounded: bool = False) -> Truth:
    """Loss and gradients in fp64, sequence by sequence, from the specification's log-probs.

    `rounded` rounds to the compute dtype where every implementation on tensor cores does: the logits, their gradient,
    the results. The error of that is what a perfect implementation would make.
    """

    def round_off(value: Tensor) -> Tensor:
        return value.to(batch.weight.dtype).double() if rounded else value

    weight = batch.weight.double()
    if not with_reference:
        batch = batch._replace(ref_logps=torch.zeros_like(batch.ref_logps))
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
        loss = OBJECTIVES[objective].of_sequences(logps.requires_grad_(), batch)
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


class HeadProblem(Problem):
    unchecked = BOUNDS

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.batch = case, make_batch(case, device)
        self.label, self.dtype = case.label, case.dtype
        self.flops = case.flops(self.batch.products)
        element = case.dtype.itemsize
        self.bytes = formulas.head_bytes(case.rows, case.scored, case.d, case.vocab, element, case.trainable)
        self.axis = None if case.axis is None else (case.axis, getattr(case, case.axis))
        known = peers.names_for(case.objective, case.trainable)
        self.providers = BOUNDS + tuple(name for name in known if name in (case.providers or known))
        self._truths: dict[tuple[bool, bool], Truth] = {}

    def _truth(self, with_reference: bool, rounded: bool = False) -> Truth:
        key = with_reference, rounded
        if key not in self._truths:
            options = {"with_reference": with_reference, "rounded": rounded}
            self._truths[key] = truth(self.batch, self.case.objective, **options)
        return self._truths[key]

    def _provider(self, name: str) -> peers.Provider:
        return peers.provider(name, self.case.objective, self.batch.hidden.device)

    def call(self, provider: str) -> Callable[[], Results]:
        if provider in BOUNDS:
            work = getattr(peers, provider)(self.batch)

            def bound() -> Results:
                work()
                return {}

            return bound
        loss, batch = self._provider(provider).loss, self.batch

        def run() -> Results:
            value = peers.step(loss, batch)
            found = {"loss": value, "d_hidden": batch.hidden.grad, "d_weight": batch.weight.grad}
            return {name: result for name, result in found.items() if result is not None}

        return run

    def truth(self, provider: str) -> Results:
        wanted = self._truth(self._provider(provider).reference)
        found = {"loss": wanted.loss, "d_hidden": wanted.d_hidden}
        return found | ({"d_weight": wanted.d_weight} if self.case.trainable else {})

    def limits(self, provider: str, truth: Results, results: Results) -> dict[str, float]:
        # Two sequence sums of thousands of nats enter a margin, each off by one fp32 rounding. That shifts the
        # margin, and with it a pair's coefficient relative to itself, by no more than this.
        with_reference = self._provider(provider).reference
        wanted = self._truth(with_reference)
        coefficient = BETA * 2 * torch.finfo(torch.float32).eps * float(wanted.logps.abs().max())
        if self.dtype == torch.float32:
            return dict.fromkeys(truth, FP32_LIMIT + coefficient)
        ideal = self._truth(with_reference, rounded=True)
        of_ideal = {
            name: HALF_FACTOR * relative_error(getattr(ideal, name), value)
            for name, value in truth.items() if name != "loss"
        }  # fmt: skip
        limits = {name: error + coefficient for name, error in of_ideal.items()}
        return {"loss": max(limits.values())} | limits  # a lone scalar's error may happen to vanish

    def _plan(self, provider: str) -> str:
        if provider != "fastpref":
            return provider.removeprefix("fastpref_")
        batch, options = self.batch, HeadOptions()
        inputs = head_inputs(batch.hidden, batch.weight, batch.labels, None, options)
        layout = Layout(None, batch.labels.shape[0]) if OBJECTIVES[self.case.objective].paired else None
        return choose_plan(inputs, options, layout).plan

    def details(self, provider: str) -> dict[str, Any]:
        return {"plan": self._plan(provider)} if provider.startswith("fastpref") else {}

    def predicted_peak(self, provider: str) -> int | None:
        case = self.case
        if provider.startswith("fastpref"):
            weight = self.batch.weight
            return formulas.plan_peak(self._plan(provider), weight, case.rows, case.scored, case.trainable)
        if provider in ("eager", "eager_compacted") and case.softcap is None:
            rows = case.rows if provider == "eager" else case.scored
            return formulas.eager_peak(rows, case.d, case.vocab, case.dtype.itemsize, case.trainable)
        return None


class Target(NamedTuple):
    """A bound on fastpref against another provider.

    It is on `seconds` or `peak_bytes`: ours over theirs, or theirs over ours.
    """

    quantity: str
    against: str
    limit: float
    at_most: bool

    @property
    def text(self) -> str:
        name = {"seconds": "time", "peak_bytes": "memory"}[self.quantity]
        return f"{name} / {self.against} {name}" if self.at_most else f"{self.against} {name} / {name}"


def _cpu_targets(memory: float) -> tuple[Target, ...]:
    """Targets on a CPU. There is none against eager's time.

    That depends on page faults: it is 2.5 to 3.5 times ours from run to run.
    """
    return Target("seconds", "products", 1.05, True), Target("peak_bytes", "eager", memory, True)


def _gpu_targets(against_trl: float) -> tuple[Target, ...]:
    return (
        Target("seconds", "products", 1.08, True),
        Target("seconds", "trl", against_trl, False),
        Target("seconds", "eager", 2.0, False),
    )


TARGETS = {  # the numbers to beat, by case
    CPU.label: _cpu_targets(0.15),
    CPU._replace(trainable=False).label: _cpu_targets(0.05),
    LLAMA.label: _gpu_targets(1.3),
    LLAMA._replace(trainable=False).label: _gpu_targets(1.5),
}


def judge(rows: Sequence[record.Row]) -> list[dict[str, Any]]:
    """The targets of the cases among `rows`, with what was measured."""
    verdicts = []
    for label in dict.fromkeys(row["case"] for row in rows):
        for target in TARGETS.get(label, ()):
            ours, theirs = (record.find(rows, label, name) for name in ("fastpref", target.against))
            found = record.ratio(*((ours, theirs) if target.at_most else (theirs, ours)), target.quantity)
            verdict: dict[str, Any] = {"case": label, "quantity": target.text, "limit": target.limit}
            verdict |= {"at_most": target.at_most, "value": None, "best": None, "met": None}
            if found is not None:
                value, best = found
                met = value <= target.limit if target.at_most else value >= target.limit
                verdict |= {"value": value, "best": best, "met": met}
            verdicts.append(verdict)
    return verdicts


SUITE = Suite("head", "Loss at the head, forward + backward, from hidden states", HeadProblem, CASES, judge=judge)
