"""The specification against values that none of our code computed: closed forms, and plain `math` on floats."""

from __future__ import annotations

import math
from math import exp, log

import pytest
import torch

from fastpref import reference
from fastpref.objectives.paired import DPO_LOSS_TYPES, WITH_DIVERGENCE
from fastpref.reference import F_DIVERGENCES, PairedObjective

NAN = float("nan")


def tensor(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def paired_loss(objective, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths):
    columns = (chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    return float(reference.paired_loss(*map(tensor, columns), objective))


# A second implementation, pair by pair on Python floats, from the formulas as TRL 1.16 documents them.


def log_sigmoid(x: float) -> float:
    return -log(1 + exp(-x))


def divergence(name: str, x: float, alpha: float) -> float:
    match name:
        case "reverse_kl":
            return x
        case "forward_kl":
            return 1 - exp(-x)
        case "js_divergence":
            return log(2) + log_sigmoid(x)
        case "alpha_divergence":
            return (exp((alpha - 1) * x) - 1) / (alpha - 1)


def one_pair(name: str, o: PairedObjective, a: float, b: float, len_a: float, len_b: float, u: float) -> float:
    """a, b: log-ratios of chosen and rejected; u: the difference of sorted samples that the two AOT losses see."""
    beta, eps, tau, s = o.beta, o.label_smoothing, o.tau, log_sigmoid
    fa, fb = divergence(o.f_divergence, a, o.alpha), divergence(o.f_divergence, b, o.alpha)
    x = beta * (fa - fb)
    q = 1 / (1 + exp(-x))
    m = 1 / (1 + exp(-x / tau))
    match name:
        case "sigmoid":
            return -(1 - eps) * s(x) - eps * s(-x)
        case "hinge":
            return max(0.0, 1 - x)
        case "ipo":
            return (fa / len_a - fb / len_b - 1 / (2 * beta)) ** 2
        case "exo_pair":
            return q * (log(q) - log(1 - eps)) + (1 - q) * (log(1 - q) - log(eps))
        case "nca_pair":
            return -s(beta * a) - 0.5 * s(-beta * a) - 0.5 * s(-beta * b)
        case "robust":
            return (-(1 - eps) * s(x) + eps * s(-x)) / (1 - 2 * eps)
        case "bco_pair":
            return -s(beta * a) - s(-beta * b)
        case "sppo_hard":
            return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
        case "aot" | "aot_unpaired":
            return -(1 - eps) * s(beta * u) - eps * s(-beta * u)
        case "apo_zero":
            return 1 - 1 / (1 + exp(-beta * a)) + 1 / (1 + exp(-beta * b))
        case "apo_down":
            return 1 / (1 + exp(-beta * a)) + 1 - 1 / (1 + exp(-beta * (a - b)))
        case "discopop":
            return -s(x) * (1 - m) + exp(-x) * m
        case "sigmoid_norm":
            return -s(beta * (fa / len_a - fb / len_b))


def expected_loss(o: PairedObjective, chosen, rejected, ref_chosen, ref_rejected, lengths_a, lengths_b) -> float:
    a = [p - r for p, r in zip(chosen, ref_chosen, strict=True)]
    b = [p - r for p, r in zip(rejected, ref_rejected, strict=True)]
    policy = sorted(c - r for c, r in zip(chosen, rejected, strict=True))
    ref = sorted(c - r for c, r in zip(ref_chosen, ref_rejected, strict=True))
    matched = {"aot": zip(policy, ref, strict=True), "aot_unpaired": zip(sorted(a), sorted(b), strict=True)}
    total = 0.0
    for name, weight in zip(o.losses, o.weights, strict=True):
        if name == "sft":
            total += weight * -sum(chosen) / sum(lengths_a)
            continue
        us = [x - y for x, y in matched.get(name, zip(a, a, strict=True))]
        rows = zip(a, b, lengths_a, lengths_b, us, strict=True)
        total += weight * sum(one_pair(name, o, *row) for row in rows) / len(a)
    return total


BATCH = (
    [-12.5, -30.25, -7.0, -18.5],  # chosen
    [-14.0, -28.0, -9.5, -25.75],  # rejected
    [-13.0, -29.5, -9.0, -19.25],  # their references
    [-13.5, -27.25, -8.75, -22.0],
    [5.0, 11.0, 3.0, 8.0],  # lengths
    [6.0, 9.0, 4.0, 13.0],
)


def objective(name, **options) -> PairedObjective:
    options.setdefault("label_smoothing", 0.1 if name == "exo_pair" else 0.0)
    return PairedObjective(losses=(name,), **options)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_every_loss_matches_floats(name, smoothing, beta):
    if name == "exo_pair" and smoothing == 0:
        smoothing = 1e-3  # the equation divides by it
    o = objective(name, beta=beta, label_smoothing=smoothing)
    assert paired_loss(o, *BATCH) == pytest.approx(expected_loss(o, *BATCH), rel=1e-12)


@pytest.mark.parametrize("divergence_name", F_DIVERGENCES)
@pytest.mark.parametrize("name", sorted(WITH_DIVERGENCE))
def test_every_divergence_matches_floats(name, divergence_name):
    o = objective(name, beta=0.3, f_divergence=divergence_name, alpha=0.7, label_smoothing=0.1)
    assert paired_loss(o, *BATCH) == pytest.approx(expected_loss(o, *BATCH), rel=1e-12)


# beta a = log 3, beta b = -log 3, so every sigmoid is a fraction: sigma(log 3) = 3/4, sigma(2 log 3) = 9/10.
CLOSED_FORMS = {
    "sigmoid": log(10 / 9),
    "hinge": 0.0,
    "ipo": (1.5 * log(3) - 1) ** 2,  # lengths 2 and 4
    "exo_pair": 0.0,  # the model's preference, 9/10, is the smoothed label's
    "nca_pair": log(4 / 3) + 0.5 * log(4) + 0.5 * log(4 / 3),
    "robust": log(10 / 9),
    "bco_pair": 2 * log(4 / 3),
    "sppo_hard": 2 * (2 * log(3) - 1) ** 2,
    "aot": log(10 / 9),
    "aot_unpaired": log(10 / 9),
    "apo_zero": 0.5,
    "apo_down": 0.75 + 1 - 0.9,
    "discopop": 0.1 * log(10 / 9) + 0.9 / 9,  # tau = 1
    "sft": 1.5,  # 3 nats over 2 tokens
    "sigmoid_norm": log(1 + 3**-0.75),
}


def test_all_losses_have_a_closed_form():
    assert set(CLOSED_FORMS) == set(DPO_LOSS_TYPES)


@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_closed_forms(name):
    o = objective(name, beta=0.5, tau=1.0)
    a, b = 2 * log(3), -2 * log(3)
    got = paired_loss(o, [-3.0], [-7.0], [-3.0 - a], [-7.0 - b], [2.0], [4.0])
    assert got == pytest.approx(CLOSED_FORMS[name], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("sigmoid", 0.9 * log(10 / 9) + 0.1 * log(10)),
        ("robust", (0.9 * log(10 / 9) - 0.1 * log(10)) / 0.8),
        ("aot", 0.9 * log(10 / 9) + 0.1 * log(10)),
        ("aot_unpaired", 0.9 * log(10 / 9) + 0.1 * log(10)),
        ("hinge", 0.0),  # unmoved by smoothing
    ],
)
def test_label_smoothing(name, want):
    a, b = 2 * log(3), -2 * log(3)
    o = objective(name, beta=0.5, label_smoothing=0.1)
    assert paired_loss(o, [a], [b], [0.0], [0.0], [1.0], [1.0]) == pytest.approx(want, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"])
def test_equal_pairs_give_log_2(name):
    same = ([-4.0, -9.0], [-4.0, -9.0], [-5.0, -1.0], [-5.0, -1.0], [3.0, 2.0], [3.0, 2.0])
    assert paired_loss(objective(name), *same) == pytest.approx(0.6931471805599453, rel=1e-14)
    assert paired_loss(objective(name, beta=1e-12), *BATCH) == pytest.approx(0.6931471805599453, rel=1e-10)


def test_sft_is_the_mean_over_tokens_not_over_sequences():
    got = paired_loss(objective("sft"), [-2.0, -12.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 3.0], [1.0, 1.0])
    assert got == 14 / 4  # and not (2 + 4) / 2


def test_average_scores_are_per_token():
    o = objective("sigmoid", beta=1.0, average=True)
    got = paired_loss(o, [-2.0], [-6.0], [0.0], [0.0], [2.0], [3.0])
    assert got == pytest.approx(log(1 + exp(-(-1.0 + 2.0))))


def test_mixtures_add_weighted_means():
    o = PairedObjective(losses=("sigmoid", "bco_pair", "sft"), weights=(0.8, 0.2, 1.5), beta=0.1)
    parts = [expected_loss(objective(name, beta=0.1), *BATCH) for name in o.losses]
    assert paired_loss(o, *BATCH) == pytest.approx(0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2], rel=1e-12)


def test_alpha_to_1_is_reverse_kl():
    x = tensor([-3.0, -0.1, 0.0, 2.5])
    f = F_DIVERGENCES["alpha_divergence"]
    assert torch.equal(f(x, 1.0), x)
    torch.testing.assert_close(f(x, 1 + 2e-6), x, rtol=1e-5, atol=1e-12)  # (e^{hx} - 1) / h = x + O(h)


def test_groups_of_pairs_add_up():
    o = PairedObjective(losses=("sigmoid", "sft"), weights=(1.0, 0.5))
    columns = [tensor(c) for c in BATCH]
    parts = [
        reference.paired_loss(*(c[part] for c in columns), o, total_pairs=4, chosen_tokens=tensor(27.0))
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(parts)) == pytest.approx(paired_loss(o, *BATCH), rel=1e-14)


def test_metrics():
    rows = reference.paired_metrics(*map(tensor, BATCH), PairedObjective(beta=0.5)).tolist()
    a, b = [0.5, -0.75, 2.0, 0.75], [-0.5, -0.75, -0.75, -3.75]
    assert rows[:2] == [BATCH[0], BATCH[1]]
    assert rows[2] == [x / 2 for x in a] and rows[3] == [x / 2 for x in b]
    assert rows[4] == [0.5, 0.0, 1.375, 2.25] and rows[5] == [1, 0, 1, 1]  # a tie is not accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e3, -1e3])
@pytest.mark.parametrize("name", DPO_LOSS_TYPES)
def test_gradients_stay_finite_at_large_margins(name, margin, dtype):
    """1e3 is beyond exp's range in either dtype."""
    leaf = torch.tensor([[margin / 2, 1.0], [-margin / 2, 2.0]], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    loss = reference.paired_loss(leaf[0], leaf[1], zero, zero, one, one, objective(name, beta=1.0))
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all()


# Log-probs and statistics. Softmax of (log 1, log 2, log 3) is (1, 2, 3) / 6.

THIRDS = [0.0, log(2), log(3)]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [log(1 / 6), log(2 / 6), log(3 / 6)]),
        ({"temperature": 0.5}, [log(1 / 14), log(4 / 14), log(9 / 14)]),  # squares
        ({"logit_scale": 2.0}, [log(1 / 14), log(4 / 14), log(9 / 14)]),
        ({"logit_scale": 2.0, "temperature": 2.0}, [log(1 / 6), log(2 / 6), log(3 / 6)]),
    ],
)
def test_token_logprobs(options, want):
    got = reference.token_logprobs(tensor([THIRDS] * 4), torch.tensor([0, 1, 2, -100]), **options)
    assert got.tolist() == pytest.approx([*want, 0.0], rel=1e-13)


def test_softcap_comes_after_the_scale_and_before_the_temperature():
    raw = [-3.0, 0.5, 8.0]
    z = [5 * math.tanh(0.7 * x / 5) / 1.3 for x in raw]
    want = z[1] - log(sum(map(exp, z)))
    got = reference.token_logprobs(
        tensor([raw]), torch.tensor([1]), softcap=5.0, logit_scale=0.7, temperature=1.3
    ).item()
    assert got == pytest.approx(want, rel=1e-13)


def test_ignored_rows_are_zero_with_zero_gradient():
    logits = tensor([THIRDS, THIRDS], requires_grad=True)
    reference.token_logprobs(logits, torch.tensor([-1, 2]), ignore_index=-1).sum().backward()
    assert logits.grad[0].tolist() == [0, 0, 0]
    assert logits.grad[1].tolist() == pytest.approx([-1 / 6, -2 / 6, 3 / 6])


def test_linear_token_logprobs_has_a_bias():
    hidden, weight, bias = tensor([[1.0, 2.0]]), tensor([[0.0, 0.0], [1.0, -0.5], [0.0, 1.0]]), tensor(THIRDS)
    z = [0.0, log(2), log(3) + 2]
    got = reference.linear_token_logprobs(hidden, weight, torch.tensor([2]), bias).item()
    assert got == pytest.approx(z[2] - log(sum(map(exp, z))), rel=1e-13)


def test_statistics():
    got = reference.token_statistics(tensor([THIRDS] * 3), torch.tensor([2, 1, -100]))
    entropy = log(6) - (2 * log(2) + 3 * log(3)) / 6
    assert got.entropy.tolist() == pytest.approx([entropy, entropy, 0])
    assert got.mean_logit.tolist() == pytest.approx([log(6) / 3, log(6) / 3, 0])
    assert got.is_top1.tolist() == [True, False, False]
    assert got.log_sum_sq.tolist() == pytest.approx([log(14 / 36), log(14 / 36), 0])


def test_the_entropy_of_a_masked_vocabulary_counts_what_is_left():
    got = reference.token_statistics(tensor([[0.0, -math.inf, 0.0, 0.0]]), torch.tensor([0]))
    assert got.entropy.item() == pytest.approx(log(3))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sequence_logprobs_skip_ignored_rows(packed, average):
    logps, labels = tensor([[-1.0, -2.0, NAN], [NAN, NAN, NAN]]), torch.tensor([[4, 0, -100], [-100, -100, -100]])
    cu_seqlens = None
    if packed:
        logps, labels, cu_seqlens = logps.view(-1), labels.view(-1), torch.tensor([0, 3, 6])
    got = reference.sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens, average=average)
    assert got.tolist() == [-1.5 if average else -3.0, 0.0]
