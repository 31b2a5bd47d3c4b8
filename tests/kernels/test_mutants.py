"""Seeded bugs: each mutant of the kernels, the portable backend or the plans fails the check that is meant for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"fastpref": ROOT / "fastpref", "fastpref_kernels": ROOT / "kernels" / "fastpref_kernels"}
ROW, PAIRED = "fastpref_kernels/row_logprob.py", "fastpref_kernels/paired_loss.py"
LISTS = "fastpref_kernels/list_loss.py"
KL = "fastpref_kernels/token_kl.py"
MATH, SEQUENCES = "fastpref_kernels/_math.py", "fastpref_kernels/_sequences.py"
PORTABLE, PLANS = "fastpref/backends/portable.py", "fastpref/plans/plans.py"
PORTABLE_KL, PORTABLE_SEQUENCES = "fastpref/backends/portable_kl.py", "fastpref/backends/sequences.py"
PRODUCTS = "fastpref/plans/products.py"


class Mutant(NamedTuple):
    bug: str
    file: str
    text: str  # occurs once in the file
    replacement: str
    check: str  # of tests/mutant_detector.py, that must fail

    @property
    def backend(self) -> str:
        return "triton" if self.file.startswith("fastpref_kernels") else "portable"


MUTANTS = [
    Mutant("last column dropped", ROW, "inside = cols < V\n", "inside = cols < V - 1\n", "log_probs"),
    Mutant("tail counted as zeros", ROW, 'tl.where(inside, z, float("-inf")), cols,', "z, cols,", "log_probs"),
    Mutant("label shifted by one", ROW, "label - first_column, -1)", "label - first_column + 1, -1)", "log_probs"),
    Mutant("sign of U", ROW, "is_label, 1.0 - exp(logp), minus", "is_label, exp(logp) - 1.0, -minus", "log_probs"),
    Mutant("gradient times 1.003", ROW, "gradient = g * tl.where", "gradient = 1.003 * g * tl.where", "log_probs"),
    Mutant("running sum not rescaled", ROW, "    s = s * rescale\n", "", "log_probs"),
    Mutant("lanes added up whatever their maxima", ROW,
           "_, s, zp, pp = _rebase(m_row, m, s, zp, pp, ENTROPY, SUM_SQ)", "pass", "log_probs"),
    Mutant("one lane's sum for the row's", ROW, "m_row, tl.sum(s, axis=0)", "m_row, tl.max(s, axis=0)", "log_probs"),
    Mutant("one lane's maximum for the row's", ROW, "m_row = tl.max(m, axis=0)", "m_row = tl.min(m, axis=0)",
           "logits_far_apart"),
    Mutant("entropy relative to an old maximum", ROW,
           "(zp + tl.where(s > 0, s * (m - m_ref), 0.0)) * rescale", "zp * rescale", "statistics"),
    Mutant("label's element of U forgotten", ROW,
           "tl.store(logits_ptr + column, u_label, mask=in_range)", "pass", "heads"),
    Mutant("divergence relative to old maxima", KL, "rescale * (t + sa * moved)", "rescale * t", "divergences"),
    Mutant("divergences of lanes added up whatever their maxima", KL,
           "_, sa, _, sb, t = _rebase(ma_row, mb_row, ma, sa, mb, sb, t)", "pass", "divergences"),
    Mutant("divergence left out of its gradient", KL, " - (zq - lse_q) - kl)", " - (zq - lse_q))", "divergences"),
    Mutant("rows of the forward divergence swapped", KL, "(mb, sb, ma, sa) if FORWARD", "(ma, sa, mb, sb) if FORWARD",
           "divergences"),
    Mutant("weights of the mixture swapped", KL, "tl.where(d >= 0, BETA * away, (1.0 - BETA) * away)",
           "tl.where(d >= 0, (1.0 - BETA) * away, BETA * away)", "divergences"),
    Mutant("the jsd from the other one of p and q", KL, "tl.where(d >= 0, larger, larger + d)",
           "tl.where(d >= 0, larger + d, larger)", "divergences"),
    Mutant("the jsd's gradient not weighted", KL, "(1.0 - BETA) * p * (of_p - kl)", "p * (of_p - kl)", "divergences"),
    Mutant("the divergence in the place of the policy's", KL, "tl.store(policy_kl_ptr + row, mean_ratio)",
           "tl.store(policy_kl_ptr + row, kl)", "divergences"),
    Mutant("softcap's slope forgotten", MATH, "slope = slope * (1.0 - t * t)", "slope = slope * 1.0", "log_probs"),
    Mutant("sign of the entropy's gradient", ROW, "gradient += g_entropy", "gradient -= g_entropy", "statistics"),
    Mutant("entropy from large logits", ROW,
           "tl.log(s) - zp / s)", "m + tl.log(s) - (m + zp / s))", "entropy_of_large_logits"),
    Mutant("argmax looks at the tail alone", ROW, "above += lane_sum(", "above = lane_sum(", "statistics"),
    Mutant("log-sum-exp of the rounded label", ROW,
           "s = rest + exp(z_exact - m_ref)", "s = s * exp(m - m_ref)", "half_precision_head"),
    Mutant("store truncates to half precision", ROW,
           "        tl.store(out_ptr + cols, out, mask=cols < V)",
           "        out = (out.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)\n"
           "        tl.store(out_ptr + cols, out, mask=cols < V)", "half_precision_gradient"),
    Mutant("slice of the vocabulary misplaced", ROW,
           "vocab, first_column, ignore_index,", "vocab, 0, ignore_index,", "heads"),
    Mutant("row offset of 32 bits", ROW,
           "row = tl.program_id(0).to(tl.int64)\n    label = tl.load(labels_ptr + row).to(tl.int64)\n"
           "    if label == ignore_index:\n        tl.store(logp_ptr",
           "row = tl.program_id(0)\n    label = tl.load(labels_ptr + row).to(tl.int64)\n"
           "    if label == ignore_index:\n        tl.store(logp_ptr", "rows_far_apart"),
    Mutant("ignored tokens counted", SEQUENCES, "scored = scored & (labels != ignore_index)", "pass", "objectives"),
    Mutant("ignored tokens get a coefficient", SEQUENCES,
           "spread = tl.where(labels != ignore_index, spread, 0.0)", "pass", "objectives"),
    Mutant("wrong denominator", PAIRED, "1.0, ACC) / total_pairs", "1.0, ACC) / (2 * total_pairs)", "objectives"),
    Mutant("beta applied twice", PAIRED, "x = BETA * (sa - sb) - GAMMA", "x = BETA * BETA * (sa - sb)", "objectives"),
    Mutant("pair swapped", PAIRED,
           "a = chosen - ref_a\n        b = rejected - ref_b", "b = chosen - ref_a\n        a = rejected - ref_b",
           "objectives"),
    Mutant("length of the other response", PAIRED, "2.0 * y * da / len_a, -2.0 * y * db / len_b",
           "2.0 * y * da / len_b, -2.0 * y * db / len_a", "objectives"),
    Mutant("last pair not sorted", PAIRED,
           "(before & (j < B)[None, :])", "(before & (j < B - 1)[None, :])", "objectives"),
    Mutant("loss of the padding", PAIRED,
           "tl.where(real, loss * scale + sft_loss, 0.0)", "loss * scale + sft_loss", "objectives"),
    Mutant("tied responses in each other's denominator", LISTS, "return same & (rank < other)",
           "return same & (rank <= other)", "lists"),
    Mutant("a better mate's score left out of its denominator", LISTS,
           "score[:, None] - other + log_sigmoid(-behind)", "score[:, None] - other", "lists"),
    Mutant("pairs weighed by k^2", LISTS, "size * (size - 1.0)", "size * size", "lists"),
    Mutant("half a tie", LISTS, "tl.where(tied, 0.5 * slope, 0.0)", "tl.where(tied, 0.25 * slope, 0.0)", "lists"),
    Mutant("lone responses counted", LISTS, "real & (compared > 0) & (before == 0)", "real & (before == 0)", "lists"),
    Mutant("weights of the mixture swapped in PyTorch", PORTABLE_KL, "above, away * beta, away * (1 - beta)",
           "above, away * (1 - beta), away * beta", "divergences"),
    Mutant("label's column not corrected", PORTABLE,
           "gradient.scatter_(1, columns, d_label)", "pass", "log_probs"),
    Mutant("gradient times 1.003 in place", PORTABLE, "gradient.mul_(grad_logps[where, None])",
           "gradient.mul_(grad_logps[where, None]).mul_(1.003)", "log_probs"),
    Mutant("softcap's slope forgotten in U", PORTABLE, ") * transform_slope(z_label, transform)", ")", "heads"),
    Mutant("U truncated to half precision", PORTABLE,
           "gradient.masked_fill_((labels[where] == ignore_index)[:, None], 0)",
           "(gradient.view(torch.int32) & -8192).view(torch.float32)"
           ".masked_fill_((labels[where] == ignore_index)[:, None], 0)", "half_precision_gradient"),
    Mutant("entropy without its log-sum-exp", PORTABLE,
           '(("entropy", 1), ("log_sum_sq", -2))', '(("log_sum_sq", -2),)', "statistics"),
    Mutant("rounded label kept in the sum", PORTABLE,
           "log_sum = torch.logaddexp(log_sum + torch.log1p(-(rounded - log_sum).exp()), shifted)",
           "pass", "half_precision_head"),
    Mutant("sft's coefficient on both responses", PORTABLE, "torch.cat([d_nll, torch.zeros_like(d_nll)])",
           "torch.cat([d_nll, d_nll])", "objectives"),
    Mutant("ignored tokens summed", PORTABLE_SEQUENCES,
           "values.masked_fill(~self.scored, 0)", "values", "objectives"),
    Mutant("slices begin at column 0", PLANS, "first_column=first_column + part.start", "first_column=0", "heads"),
    Mutant("last group's gradient alone", PRODUCTS,
           "u.t(), scaled, add=self._started)", "u.t(), scaled, add=False)", "pairs_from_hidden_states"),
]  # fmt: skip


def mutate(folder: Path, mutant: Mutant | None) -> Path:
    """Copies of both packages, one text in them replaced."""
    for name, source in PACKAGES.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    if mutant is not None:
        path = folder / mutant.file
        path.write_text(path.read_text().replace(mutant.text, mutant.replacement))
    return folder


@pytest.fixture(scope="module")
def failing(tmp_path_factory) -> dict[tuple[str, str], list[str]]:
    """(bug, backend) -> the checks that fail, of all for the bug "none", which is the code as it is, and of the one
    that is meant for it for a mutant."""
    jobs = [(None, "triton", "all"), (None, "portable", "all"), *((m, m.backend, m.check) for m in MUTANTS)]
    arguments = [str(x) for m, *how in jobs for x in (mutate(tmp_path_factory.mktemp("mutant"), m), *how)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # conftest.py has set TRITON_INTERPRET where there is no GPU
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "mutant_detector.py", *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    names = [(mutant.bug if mutant else "none", backend) for mutant, backend, _ in jobs]
    return dict(zip(names, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_the_code_as_it_is_passes(failing, backend):
    assert failing["none", backend] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_the_text_to_replace_is_there_once(mutant):
    package, _, path = mutant.file.partition("/")
    assert (PACKAGES[package] / path).read_text().count(mutant.text) == 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.bug)
def test_mutant_is_caught(failing, mutant):
    assert mutant.check in failing[mutant.bug, mutant.backend]
