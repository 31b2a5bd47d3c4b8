"""Bad arguments: the exact exception and the exact message, which names the argument, what it got and what it wants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support import IGNORE

import fastpref
from fastpref import DPOLoss
from fastpref.objectives.paired import DPO_LOSS_TYPES

Cases = dict[str, tuple[Callable, type[Exception], str]]  # what is wrong: (the call, the exception, its message)
B, T, D, V = 2, 3, 4, 11


def logits(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*(shape or (2 * B, T, V)), **options)


def hidden(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*(shape or (2 * B, T, D)), **options)


def weight(**options) -> torch.Tensor:
    return torch.zeros(V, D, **options)


def labels(*shape: int, fill: int = 1, **options) -> torch.Tensor:
    return torch.full(shape or (2 * B, T), fill, **options)


def logps(size: int = B, **options) -> torch.Tensor:
    return torch.full((size,), -1.0, **options)


def edges(*values: int, **options) -> torch.Tensor:
    return torch.tensor(values or (0, 3, 6, 9, 12), **options)


token, linear, sequence = fastpref.token_logprobs, fastpref.linear_token_logprobs, fastpref.sequence_logprobs


def from_hidden(*args, **options):
    return DPOLoss().from_hidden(*args, **{"ref_logps": logps(2 * B), **options})


def from_logits(*args, **options):
    return DPOLoss().from_logits(*args, **{"ref_logps": logps(2 * B), **options})


ODD = "want an even number, at least 2 ([B chosen; B rejected])"
CAST = "cast one of them or run under torch.autocast"

TOKENS: Cases = {
    "not a tensor": (lambda: token([[0.0]], labels(1)), TypeError, "logits: got list, want a torch.Tensor"),
    "integer logits": (lambda: token(logits().long(), labels()), TypeError,
        "logits: got dtype int64, want float16 or bfloat16 or float32 or float64"),
    "float labels": (lambda: token(logits(), labels().float()), TypeError,
        "labels: got dtype float32, want int32 or int64"),
    "no vocabulary": (lambda: token(logits(3, 0), labels(3)), ValueError,
        "logits: got shape (3, 0), want [..., V] with V >= 1"),
    "labels of another shape": (lambda: token(logits(), labels(2 * B, T + 1)), ValueError,
        "labels: got shape (4, 4), want (4, 3) (one label per row of logits)"),
    "labels elsewhere": (lambda: token(logits(), labels(device="meta")), ValueError,
        "labels: got device meta, want cpu (the device of logits)"),
    "label beyond the vocabulary": (lambda: token(logits(5, V), torch.tensor([0, IGNORE, 10, 11, 12])), ValueError,
        "labels: got 11 at row 3, want a token in [0, 11) or ignore_index=-100"),
    "negative label": (lambda: token(logits(2, V), torch.tensor([-1, 0]), ignore_index=7), ValueError,
        "labels: got -1 at row 0, want a token in [0, 11) or ignore_index=7"),
    "temperature 0": (lambda: token(logits(), labels(), temperature=0.0), ValueError,
        "temperature: got 0.0, want a finite number greater than 0"),
    "temperature is text": (lambda: token(logits(), labels(), temperature="1"), TypeError,
        "temperature: got str, want a number greater than 0"),
    "negative logit_scale": (lambda: token(logits(), labels(), logit_scale=-0.5), ValueError,
        "logit_scale: got -0.5, want a finite number greater than 0"),
    "softcap 0": (lambda: token(logits(), labels(), softcap=0), ValueError,
        "softcap: got 0, want a finite number greater than 0"),
    "unknown statistic": (lambda: fastpref.token_statistics(logits(), labels(), ("entropy", "variance")), ValueError,
        "statistics: got 'variance', want one of entropy, mean_logit, is_top1, log_sum_sq"),
    "labels of statistics out of range": (
        lambda: fastpref.token_statistics(logits(1, V), labels(1, fill=V)), ValueError,
        "labels: got 11 at row 0, want a token in [0, 11) or ignore_index=-100"),
}  # fmt: skip

HEADS: Cases = {
    "hidden of another width": (lambda: linear(hidden(6, D + 1), weight(), labels(6)), ValueError,
        "hidden: got shape (6, 5), want [..., 4] to match weight (11, 4)"),
    "hidden without rows": (lambda: linear(hidden(D), weight(), labels(1)), ValueError,
        "hidden: got shape (4,), want [..., 4] to match weight (11, 4)"),
    "weight with three dimensions": (lambda: linear(hidden(), logits(1, V, D), labels()), ValueError,
        "weight: got shape (1, 11, 4), want a 2-d tensor"),
    "labels flattened": (lambda: linear(hidden(), weight(), labels(12)), ValueError,
        "labels: got shape (12,), want (4, 3) (one label per row of hidden)"),
    "weight elsewhere": (lambda: linear(hidden(), weight(device="meta"), labels()), ValueError,
        "weight: got device meta, want cpu (the device of hidden)"),
    "weight of another dtype": (lambda: linear(hidden(dtype=torch.bfloat16), weight(), labels()), TypeError,
        f"weight: got dtype float32, want bfloat16 (the dtype of hidden); {CAST}"),
    "bias of another dtype": (
        lambda: linear(hidden(), weight(), labels(), torch.zeros(V, dtype=torch.float64)), TypeError,
        f"bias: got dtype float64, want float32 (the dtype of hidden); {CAST}"),
    "bias of another shape": (lambda: linear(hidden(), weight(), labels(), torch.zeros(D)), ValueError,
        "bias: got shape (4,), want (11,) ([V])"),
    "label beyond the head": (lambda: linear(hidden(), weight(), labels(fill=V)), ValueError,
        "labels: got 11 at row 0, want a token in [0, 11) or ignore_index=-100"),
    "unknown plan": (lambda: linear(hidden(), weight(), labels(), plan="fast"), ValueError,
        "plan: got 'fast', want one of auto, no_grad, frozen, store, pair, recompute"),
    "pair without an objective": (
        lambda: linear(hidden(), weight(requires_grad=True), labels(), plan="pair"), ValueError,
        "plan: got 'pair', want another one here, or call an objective's from_hidden"),
    "no_grad with gradients": (
        lambda: linear(hidden(requires_grad=True), weight(), labels(), plan="no_grad"), ValueError,
        "plan: got 'no_grad' while a gradient is needed, want 'auto' or call under torch.no_grad()"),
    "frozen with a trainable weight": (
        lambda: linear(hidden(requires_grad=True), weight(requires_grad=True), labels(), plan="frozen"), ValueError,
        "plan: got 'frozen' while weight or bias requires a gradient, want 'store' or 'recompute'"),
    "no workspace": (lambda: linear(hidden(), weight(), labels(), workspace_bytes=0), ValueError,
        "workspace_bytes: got 0, want a finite number greater than 0"),
}  # fmt: skip

SEQUENCES: Cases = {
    "log-probs of another shape": (lambda: sequence(torch.zeros(2, 3), labels(2, 4)), ValueError,
        "labels: got shape (2, 4), want (2, 3) (the shape of token_logps)"),
    "packed without cu_seqlens": (lambda: sequence(torch.zeros(6), labels(6)), ValueError,
        "token_logps: got shape (6,) without cu_seqlens, want [S, T]"),
    "padded with cu_seqlens": (lambda: sequence(torch.zeros(2, 3), labels(2, 3), cu_seqlens=edges(0, 3, 6)), ValueError,
        "token_logps: got shape (2, 3) with cu_seqlens, want [N]"),
    "edges that descend": (lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(0, 4, 3, 6)), ValueError,
        "cu_seqlens: got [0, 4, 3, 6], want ascending offsets from 0 to the number of rows, 6"),
    "edges that end too early": (lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(0, 3, 5)), ValueError,
        "cu_seqlens: got [0, 3, 5], want ascending offsets from 0 to the number of rows, 6"),
    "edges that begin late": (lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(1, 3, 6)), ValueError,
        "cu_seqlens: got [1, 3, 6], want ascending offsets from 0 to the number of rows, 6"),
    "no edges": (lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=torch.zeros(0, dtype=torch.long)), ValueError,
        "cu_seqlens: got [], want ascending offsets from 0 to the number of rows, 6"),
    "float edges": (lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(0, 3, 6).float()), TypeError,
        "cu_seqlens: got dtype float32, want int32 or int64"),
    "edges in two dimensions": (
        lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(0, 3, 6)[None]), ValueError,
        "cu_seqlens: got shape (1, 3), want a 1-d tensor"),
    "edges elsewhere": (
        lambda: sequence(torch.zeros(6), labels(6), cu_seqlens=edges(0, 3, 6, device="meta")), ValueError,
        "cu_seqlens: got device meta, want cpu (the device of labels)"),
}  # fmt: skip

OBJECTIVES: Cases = {
    "unknown loss type": (lambda: DPOLoss(loss_type="dpo"), ValueError,
        f"loss_type: got 'dpo', want one of {', '.join(DPO_LOSS_TYPES)}"),
    "duplicated loss types": (lambda: DPOLoss(loss_type=["sft", "sft"]), ValueError,
        "loss_type: got ['sft', 'sft'], want at least one and none twice"),
    "no loss type": (lambda: DPOLoss(loss_type=[]), ValueError, "loss_type: got [], want at least one and none twice"),
    "weights for other losses": (lambda: DPOLoss(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), ValueError,
        "loss_weights: got 1, want one for each of 2 loss types"),
    "beta 0": (lambda: DPOLoss(beta=0), ValueError, "beta: got 0, want a finite number greater than 0"),
    "negative beta": (lambda: DPOLoss(beta=-0.1), ValueError, "beta: got -0.1, want a finite number greater than 0"),
    "beta NaN": (lambda: DPOLoss(beta=math.nan), ValueError, "beta: got nan, want a finite number greater than 0"),
    "beta infinite": (lambda: DPOLoss(beta=math.inf), ValueError, "beta: got inf, want a finite number greater than 0"),
    "beta is a bool": (lambda: DPOLoss(beta=True), TypeError, "beta: got bool, want a number greater than 0"),
    "discopop_tau 0": (lambda: DPOLoss(discopop_tau=0.0), ValueError,
        "discopop_tau: got 0.0, want a finite number greater than 0"),
    "label_smoothing of a half": (lambda: DPOLoss(label_smoothing=0.5), ValueError,
        "label_smoothing: got 0.5, want a number in [0.0, 0.5)"),
    "negative label_smoothing": (lambda: DPOLoss(label_smoothing=-0.1), ValueError,
        "label_smoothing: got -0.1, want a number in [0.0, 0.5)"),
    "exo_pair without label_smoothing": (lambda: DPOLoss(loss_type="exo_pair"), ValueError,
        "label_smoothing: got 0.0, want a value in (0, 0.5) for loss_type 'exo_pair'"),
    "unknown f_divergence": (lambda: DPOLoss(f_divergence="kl"), ValueError,
        "f_divergence: got 'kl', want one of reverse_kl, forward_kl, js_divergence, alpha_divergence"),
    "f_divergence of a loss without": (
        lambda: DPOLoss(loss_type=["sigmoid", "apo_zero"], f_divergence="forward_kl"), ValueError,
        "f_divergence: got 'forward_kl' with loss_type ['sigmoid', 'apo_zero'], want 'reverse_kl' or only loss "
        "types among discopop, exo_pair, hinge, ipo, robust, sft, sigmoid, sigmoid_norm"),
}  # fmt: skip

PAIRS: Cases = {
    "chosen in two dimensions": (lambda: DPOLoss()(torch.zeros(B, T), logps(), logps(), logps()), ValueError,
        "chosen_logps: got shape (2, 3), want a 1-d tensor"),
    "no pairs": (lambda: DPOLoss()(logps(0), logps(0), logps(0), logps(0)), ValueError,
        "chosen_logps: got no pairs, want at least 1"),
    "more chosen than rejected": (lambda: DPOLoss()(logps(), logps(B + 1), logps(), logps()), ValueError,
        "rejected_logps: got shape (3,), want (2,) (as many as chosen_logps)"),
    "no reference": (lambda: DPOLoss()(logps(), logps()), ValueError,
        "ref_chosen_logps: got None, want the reference model's log-probs [2]"),
    "no rejected reference": (lambda: DPOLoss()(logps(), logps(), logps()), ValueError,
        "ref_rejected_logps: got None, want the reference model's log-probs [2]"),
    "integer reference": (lambda: DPOLoss()(logps(), logps(), logps().long(), logps()), TypeError,
        "ref_chosen_logps: got dtype int64, want float16 or bfloat16 or float32 or float64"),
    "lengths missing for ipo": (lambda: DPOLoss(loss_type="ipo")(logps(), logps(), logps(), logps()), ValueError,
        "chosen_lengths: got None, want the number of scored tokens [B] (for ipo)"),
    "lengths of another shape": (
        lambda: DPOLoss(loss_type="sft")(logps(), logps(), logps(), logps(), labels(B), labels(B + 1)), ValueError,
        "rejected_lengths: got shape (3,), want (2,) (one per pair)"),
    "from_logits: no reference": (lambda: from_logits(logits(), labels(), ref_logps=None), ValueError,
        "ref_logps: got None, want the reference model's log-probs [4]"),
    "from_logits: reference of another shape": (lambda: from_logits(logits(), labels(), ref_logps=logps(3)), ValueError,
        "ref_logps: got shape (3,), want (4,) (one per sequence)"),
    "from_logits: odd batch": (lambda: from_logits(logits(3, T, V), labels(3, T)), ValueError,
        f"labels: got 3 sequences, {ODD}"),
    "from_logits: packed without cu_seqlens": (lambda: from_logits(logits(12, V), labels(12)), ValueError,
        "labels: got shape (12,) without cu_seqlens, want [2B, T] (padded, chosen rows first), or pass "
        "cu_seqlens for packed rows [N]"),
    "from_logits: cu_seqlens past the end": (
        lambda: from_logits(logits(12, V), labels(12), cu_seqlens=edges(0, 3, 6, 9, 13)), ValueError,
        "cu_seqlens: got [0, 3, 6, 9, 13], want ascending offsets from 0 to the number of rows, 12"),
    "from_hidden: one sequence": (lambda: from_hidden(hidden(1, T, D), weight(), labels(1, T)), ValueError,
        f"labels: got 1 sequences, {ODD}"),
    "from_hidden: no reference": (lambda: from_hidden(hidden(), weight(), labels(), ref_logps=None), ValueError,
        "ref_logps: got None, want the reference model's log-probs [4]"),
    "from_hidden: reference elsewhere": (
        lambda: from_hidden(hidden(), weight(), labels(), ref_logps=logps(4, device="meta")), ValueError,
        "ref_logps: got device meta, want cpu (the device of the policy's log-probs)"),
    "from_hidden: cu_seqlens of three sequences": (
        lambda: from_hidden(hidden(12, D), weight(), labels(12), cu_seqlens=edges(0, 3, 6, 12)), ValueError,
        f"cu_seqlens: got 3 sequences, {ODD}"),
    "from_hidden: padded with cu_seqlens": (
        lambda: from_hidden(hidden(), weight(), labels(), cu_seqlens=edges()), ValueError,
        "labels: got shape (4, 3) with cu_seqlens, want packed rows [N]"),
    "from_hidden: float cu_seqlens": (
        lambda: from_hidden(hidden(12, D), weight(), labels(12), cu_seqlens=edges(dtype=torch.float32)), TypeError,
        "cu_seqlens: got dtype float32, want int32 or int64"),
    "from_hidden: cu_seqlens that descend, in plan pair": (
        lambda: from_hidden(
            hidden(12, D), weight(requires_grad=True), labels(12), cu_seqlens=edges(0, 6, 3, 9, 12), plan="pair"),
        ValueError, "cu_seqlens: got [0, 6, 3, 9, 12], want ascending offsets from 0 to the number of rows, 12"),
    "from_hidden: label out of range, in plan pair": (
        lambda: from_hidden(hidden(), weight(requires_grad=True), labels(fill=-1), plan="pair"), ValueError,
        "labels: got -1 at row 0, want a token in [0, 11) or ignore_index=-100"),
    "from_hidden: frozen with a trainable weight": (
        lambda: from_hidden(hidden(), weight(requires_grad=True), labels(), plan="frozen"), ValueError,
        "plan: got 'frozen' while weight or bias requires a gradient, want 'store' or 'recompute'"),
    "from_hidden: negative workspace": (
        lambda: from_hidden(hidden(), weight(), labels(), workspace_bytes=-1), ValueError,
        "workspace_bytes: got -1, want a finite number greater than 0"),
    "backend": (lambda: fastpref.set_backend("cuda"), ValueError,
        "set_backend(name): got 'cuda', want one of auto, triton, portable"),
}  # fmt: skip

CASES = TOKENS | HEADS | SEQUENCES | OBJECTIVES | PAIRS


def assert_still_works() -> None:
    h = torch.randn(2 * B, T, D, requires_grad=True)
    out = from_hidden(h, torch.randn(V, D), labels())
    out.loss.backward()
    assert out.loss.isfinite() and h.grad.isfinite().all()


def assert_raises(call: Callable, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert (caught.type, str(caught.value)) == (kind, message)


def test_cases_have_different_names():
    assert len(CASES) == sum(map(len, (TOKENS, HEADS, SEQUENCES, OBJECTIVES, PAIRS)))


@pytest.mark.parametrize("name", CASES)
def test_bad_argument(name):
    assert_raises(*CASES[name])
    assert_still_works()


def test_bad_backend_in_the_environment(monkeypatch):
    monkeypatch.setenv("FASTPREF_BACKEND", "gpu")
    assert_raises(
        lambda: token(logits(), labels()),
        ValueError,
        "FASTPREF_BACKEND: got 'gpu', want one of auto, triton, portable",
    )
    monkeypatch.delenv("FASTPREF_BACKEND")
    assert_still_works()


def test_triton_without_a_device(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("FASTPREF_BACKEND", "triton")
    assert_raises(
        lambda: token(logits(), labels()),
        ValueError,
        "FASTPREF_BACKEND: got 'triton' for tensors on 'cpu', want a CUDA, ROCm or XPU device (or TRITON_INTERPRET=1, "
        "set before Python starts, to run the kernels slowly on the CPU)",
    )
    monkeypatch.delenv("FASTPREF_BACKEND")
    assert_still_works()
