"""`fastpref validate` passes on what is right and fails on what is wrong: the policy, the table, the command."""

from __future__ import annotations

import contextlib
import json
from importlib import import_module

import pytest
import torch
from support import BACKENDS, DEVICE

from fastpref import backends
from fastpref.commands import cli
from fastpref.validate import accuracy, beyond_int32, inputs, policy, scorecard
from fastpref.validate.cases import OBJECTIVES, OPERATORS
from fastpref.validate.ideal import Exact, Ideal, Partition
from fastpref.validate.inputs import FAMILIES, Draw
from fastpref.validate.rounding import Rounding
from fastpref.validate.run import run_case

# bf16 on the device where it rounds; Triton's interpreter truncates it
HALF = {"portable": torch.bfloat16, "triton": torch.bfloat16 if DEVICE == "cuda" else torch.float16}


def truncated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded towards zero: one representation down wherever nearest went up."""
    nearest = x.to(dtype)
    up = nearest.double().abs() > x.double().abs()
    return torch.where(up, nearest.view(torch.int16) - 1, nearest.view(torch.int16)).view(dtype)


def without_last_column(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[..., -1] = 0
    return x


def without_a_row(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[-3] = 0
    return x


# The bugs of the survey that the policy comes from, as maps of the right fp32 gradient: do the fp32 rule and the
# half-precision rule see them? A factor of 1.001 is below bf16's noise: the fp32 leg is there for it.
BUGS = {
    "none": (lambda x: x, False, False),
    "x 1.001": (lambda x: x * 1.001, True, False),
    "x 1.003": (lambda x: x * 1.003, True, True),
    "x 1.01": (lambda x: x * 1.01, True, True),
    "x 1.05": (lambda x: x * 1.05, True, True),
    "last column dropped": (without_last_column, True, True),
    "one row dropped": (without_a_row, True, True),
}


@pytest.fixture(scope="module")
def gradient() -> torch.Tensor:
    """Of token log-probs, in fp64, 256 x 4096; the last token is one of the labels."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(256, 4096, generator=g, dtype=torch.float64) * 2
    labels = torch.randint(4096, (256,), generator=g)
    labels[5] = 4095
    onehot = torch.nn.functional.one_hot(labels, 4096)
    return (onehot - logits.softmax(1)) * torch.randn(256, 1, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("bug", BUGS)
def test_each_rule_sees_the_bugs_it_is_there_for(gradient, bug):
    change, fp32_sees, bf16_sees = BUGS[bug]
    single = gradient.float()
    ideal = gradient.float().double()
    assert policy.judge(change(single), gradient, ideal, torch.float32).passed is not fp32_sees
    half = change(single).bfloat16()
    verdict = policy.judge(half, gradient, gradient.bfloat16().double(), torch.bfloat16)
    assert verdict.rule == "b" and verdict.passed is not bf16_sees, verdict


def test_a_truncating_store_is_seen(gradient):
    for dtype in (torch.bfloat16, torch.float16):
        verdict = policy.judge(truncated(gradient, dtype), gradient, gradient.to(dtype).double(), dtype)
        assert not verdict.passed and verdict.ratio > 1.5, verdict


def test_one_large_error_is_seen_where_the_norm_is_not():
    truth = torch.randn(256, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = truth.bfloat16()
    ideal = half.double()
    half[3, 5] += 3 * (ideal - truth).abs().max()
    verdict = policy.judge(half, truth, ideal, torch.bfloat16)
    assert verdict.ratio < 1.1 and not verdict.passed and "max error" in verdict.detail


def test_a_factor_is_seen_below_the_norm_of_the_noise(gradient):
    verdict = policy.judge((gradient * (1 + 3e-6)).float(), gradient, gradient.float().double(), torch.float32)
    assert verdict.error < 1e-5 and not verdict.passed and "projection" in verdict.detail


def test_fp64_has_its_own_bounds(gradient):
    assert policy.judge(gradient * (1 + 1e-11), gradient, gradient, torch.float64).passed
    assert not policy.judge(gradient * (1 + 1e-9), gradient, gradient, torch.float64).passed


def test_zero_must_be_zero_and_infinity_infinite():
    zero = torch.zeros(4, dtype=torch.float64)
    assert policy.judge(zero.float(), zero, zero, torch.float32).passed
    assert not policy.judge(zero.float() + 1e-30, zero, zero, torch.float32).passed
    masked = torch.tensor([-1.0, -torch.inf, -2.0], dtype=torch.float64)
    assert policy.judge(masked.float(), masked, masked, torch.float32).passed
    for wrong in (torch.nan, torch.inf, -1e30):
        got = masked.float().masked_fill(masked.isinf(), wrong)
        assert not policy.judge(got, masked, masked, torch.float32).passed


def test_integers_are_bitwise():
    want = torch.tensor([3.0, -0.0, 96.0], dtype=torch.float64)
    assert policy.judge_exact(want.bfloat16(), want).passed
    off_by_an_ulp = torch.tensor([3.0, 0.0, 96.5])
    assert not policy.judge_exact(off_by_an_ulp, want).passed
    assert not policy.judge_exact(torch.tensor([3.0, 0.0, torch.nan]), want).passed


def test_a_loss_is_judged_in_its_own_conditioning():
    truth = torch.tensor(0.7, dtype=torch.float64)
    well = policy.Conditioning(tokens=16, sensitivity=0.1, noise=0.0)
    ill = policy.Conditioning(tokens=16, sensitivity=50.0, noise=0.0)  # differences of large sums
    off = (truth + 5e-5).float()
    assert not policy.judge_loss(off, truth, truth, well).passed
    assert policy.judge_loss(off, truth, truth, ill).passed
    assert not policy.judge_loss(truth.float() * 1.003, truth, truth, ill).passed
    assert not policy.judge_loss(torch.tensor(torch.nan), truth, truth, ill).passed


def test_an_ideal_in_fp64_is_the_truth():
    draw = Draw("transform", torch.float64, torch.device(DEVICE))
    x = inputs.head(draw)
    given = (x.hidden, x.weight, x.labels, x.bias, Partition())
    ideal = Ideal(Rounding.of(torch.float64, x.hidden.device))
    want = Exact().linear_token_logprobs(*given, **x.transform)
    torch.testing.assert_close(ideal.linear_token_logprobs(*given, **x.transform), want, rtol=1e-12, atol=0)


def test_the_table_covers_every_paired_loss_and_family():
    used = {name for o in OBJECTIVES for name in o.loss.objective.losses}
    assert used >= set(import_module("fastpref.objectives.paired").DPO_LOSS_TYPES)
    assert {o.loss.objective.f_divergence for o in OBJECTIVES} == set(import_module("fastpref.reference").F_DIVERGENCES)
    assert {f for op in OPERATORS for f in op.families} == set(FAMILIES)
    names = [op.name for op in OPERATORS]
    assert len(names) == len(set(names))


SOME = ("token_logprobs", "linear_token_logprobs store", "DPO hinge from hidden", "DPO ipo from log-probs")


@pytest.fixture
def some_operators(monkeypatch):
    monkeypatch.setattr(scorecard, "OPERATORS", tuple(op for op in OPERATORS if op.name in SOME))


def validate(*options: str) -> int:
    return cli.main(["validate", "--device", DEVICE, *options])


def test_a_quick_run_passes_and_records_what_it_did(some_operators, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "VOCAB", 2048)
    monkeypatch.setattr(accuracy, "HIDDEN", 64)
    path = tmp_path / "card.json"
    assert validate("--quick", "--json", str(path)) == 0
    text = capsys.readouterr().out
    assert "FAIL" not in text and " 0 failed" in text and "log_softmax in fp32" in text
    card = json.loads(path.read_text())
    names = {"schema", "machine", "notes", "seconds", "interrupted", "passed", "failed", "rows", "accuracy"}
    assert card.keys() == names and not card["interrupted"]
    assert card["machine"].keys() >= {"fastpref", "torch", "triton", "device", "cpu", "commit", "date", "threads"}
    assert card["passed"] and card["failed"] == 0
    case = {"op", "backend", "device", "dtype", "family", "output"}
    assert all(
        row.keys() == case | {"error", "ideal_error", "ratio", "limit", "rule", "passed", "detail"}
        for row in card["rows"]
    )
    assert {row["op"] for row in card["rows"]} == set(SOME)
    assert {row["backend"] for row in card["rows"]} == set(BACKENDS)
    assert {row["rule"] for row in card["rows"]} == set("abcd")
    half = {(row["backend"], row["dtype"]) for row in card["rows"] if row["dtype"].endswith("16")}
    interpreted = {("triton", "float16")}
    assert half == {("portable", "bfloat16"), ("portable", "float16")} | interpreted | (
        {("triton", "bfloat16")} if DEVICE == "cuda" else set()
    )
    usual_bf16, usual_fp32, ours = (r["token_rms"] for r in card["accuracy"])
    assert ours < usual_fp32 < usual_bf16


def test_json_on_stdout_is_only_json(some_operators, capsys):
    assert validate("--quick", "--backend", "portable", "--op", "token_logprobs", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["passed"]


BROKEN = {
    "x 1.003": lambda out, dtype: (out * 1.003).to(dtype),
    "last column dropped": lambda out, dtype: without_last_column(out).to(dtype),
    "truncation": truncated,
}


@pytest.mark.parametrize("bug", BROKEN)
def test_a_broken_gradient_fails_the_run(backend, bug, monkeypatch, capsys):
    """In half precision, where a bug has the most noise to hide in."""
    module = import_module(f"fastpref.backends.{backend}")
    right = module.row_gradient

    def broken(logits, labels, logps, lse, out, **options):
        if out.dtype not in policy.HALF:
            return right(logits, labels, logps, lse, out, **options)
        wide = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        right(logits, labels, logps, lse, wide, **options)
        out.copy_(BROKEN[bug](wide, out.dtype))

    monkeypatch.setattr(module, "row_gradient", broken)
    monkeypatch.setattr(scorecard, "DTYPES", (HALF[backend],))
    monkeypatch.setattr(scorecard, "OPERATORS", tuple(op for op in OPERATORS if op.name == "token_logprobs"))
    assert validate("--quick", "--backend", backend, "--op", "token_logprobs") == 1
    text = capsys.readouterr().out
    assert f"FAIL token_logprobs, {backend}, {str(HALF[backend])[6:]}, random, d_logits" in text


def test_a_broken_coefficient_fails_the_run(backend, monkeypatch):
    module = import_module(f"fastpref.backends.{backend}")
    right = module.paired_loss

    def broken(*args, **options):
        loss, metrics, coefs = right(*args, **options)
        return loss, metrics, coefs * (1 + 1e-5)

    monkeypatch.setattr(module, "paired_loss", broken)
    monkeypatch.setattr(scorecard, "DTYPES", (torch.float32,))
    assert validate("--quick", "--backend", backend, "--op", "DPO bco_pair from log-probs") == 1


def test_a_crash_is_a_failed_result(monkeypatch, capsys):
    def crash(*args, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(import_module("fastpref.backends.portable"), "paired_loss", crash)
    assert validate("--quick", "--backend", "portable", "--op", "DPO hinge from log-probs") == 1
    assert "RuntimeError: no such kernel" in capsys.readouterr().out


def test_a_coefficient_of_integers_stays_exact_in_fp16():
    """The gradient products in fp16 divide by the largest operand: by a power of two, or sums of integers round."""
    (store,) = (op for op in OPERATORS if op.name == "linear_token_logprobs store")
    rows = list(run_case(store, "integers", torch.float16, torch.device(DEVICE), ["portable"]))
    assert {row.output for row in rows} == {"logps", "d_hidden", "d_weight"}
    assert all(row.verdict.rule == "c" and row.verdict.passed for row in rows), rows


def test_an_entropy_with_masked_tokens_has_a_finite_gradient_in_the_specification():
    """0 log 0 = 0 in the gradient too: where(p > 0, p log p, 0) gave NaN."""
    logits = torch.tensor([[0.5, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    found = Exact().token_statistics(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(found.entropy.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0


def test_nothing_to_run_is_not_a_pass(capsys):
    assert validate("--op", "no such operator") == 2
    assert "no operator matches" in capsys.readouterr().err


def test_the_backend_is_what_it_was_afterwards():
    backends.set_backend("portable")
    try:
        validate("--quick", "--op", "DPO hinge from log-probs")
        assert backends.choose(torch.device(DEVICE)).name == "portable"
    finally:
        backends.set_backend("auto")


def test_a_machine_without_gpu_and_interpreter_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    plan = scorecard.plan("cpu", None)
    assert plan.backends == ["portable"]
    assert plan.notes == ["triton: not run here (no GPU; set TRITON_INTERPRET=1 to interpret the kernels)"]


def test_sampled_rows_of_huge_logits():
    """The machinery of the check beyond 2^31 elements, on a few thousand."""
    rows = list(beyond_int32.check(torch.device(DEVICE), ["portable"], rows=70, vocab=300))
    assert len(rows) == 4 and all(row.verdict.passed for row in rows), rows


def test_jobs_give_the_results_of_one_process(tmp_path):
    """In the same order; seconds aside, the same file."""
    found = []
    for jobs in ("1", "2"):
        file = tmp_path / f"{jobs}.json"
        assert validate("--quick", "--op", "kl_estimate", "--jobs", jobs, "--json", str(file)) == 0
        found.append(json.loads(file.read_text())["rows"])
    assert found[0] == found[1] != []


def test_a_case_that_fails_as_a_whole_is_a_result_and_loses_no_other(monkeypatch, tmp_path):
    """The memory of its truth, say, or its process."""
    run_case, begun = scorecard.run_case, []

    def failing(operator, *arguments):
        begun.append(operator.name)
        if len(begun) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_case(operator, *arguments)

    monkeypatch.setattr(scorecard, "run_case", failing)
    assert validate("--quick", "--op", "kl_estimate", "--json", str(tmp_path / "found.json")) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    failed = [row for row in found["rows"] if not row["passed"]]
    assert {row["detail"] for row in failed} == {"OutOfMemoryError: CUDA out of memory"}
    assert len(found["rows"]) > len(failed) == found["failed"] > 0 and not found["interrupted"]


def test_a_worker_gives_a_gpus_memory_back_and_large_cases_take_turns(monkeypatch):
    """What a process keeps for itself, fifteen others lack."""
    events = []
    turns = contextlib.nullcontext()
    monkeypatch.setattr(type(turns), "__enter__", lambda self: events.append("turn") if self is turns else None)
    monkeypatch.setattr(scorecard, "_large_turns", turns)
    monkeypatch.setattr(scorecard, "_results", lambda *_: events.append("case") or [])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("given back"))
    for family in ("random", "V=262144"):
        scorecard._in_worker(0, family, torch.float32, [], torch.device("cuda"))
    assert events == ["case", "given back", "turn", "case", "given back"]


def test_an_interrupt_keeps_the_results_until_then(monkeypatch, tmp_path, capsys):
    run_case, begun = scorecard.run_case, []

    def interrupted(operator, *arguments):
        begun.append(operator.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return run_case(operator, *arguments)

    monkeypatch.setattr(scorecard, "run_case", interrupted)
    assert validate("--quick", "--op", "kl_estimate", "--json", str(tmp_path / "found.json")) == 130
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["interrupted"] and not found["passed"]
    assert "interrupted" in capsys.readouterr().out
