"""Every tensor argument of every public function: the result of a strided, transposed, sliced or expanded view is
that of contiguous tensors, in fp64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import DEVICE, IGNORE, relative_error
from torch import Tensor
from views import KINDS, view_of

import fastpref

SEQUENCES, TOKENS, WIDTH, VOCAB = 4, 3, 7, 19
ROWS = SEQUENCES * TOKENS
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3}  # a strided argument read as if contiguous is off by 0.1 and more


def _floats(*shape: int, leaf: bool = False, shift: float = 0.0) -> Tensor:
    return (torch.randn(shape) + shift).to(DEVICE).requires_grad_(leaf)


def _labels(*shape: int) -> Tensor:
    labels = torch.randint(VOCAB, shape)
    labels.view(-1)[[2, -2]] = IGNORE
    return labels.to(DEVICE)


def _edges() -> Tensor:
    return torch.tensor([0, 3, 7, 8, ROWS], device=DEVICE)


def _head(bias: bool = True) -> dict[str, Tensor]:
    head = {"weight": _floats(VOCAB, WIDTH, leaf=True)}
    return head | ({"bias": _floats(VOCAB, leaf=True)} if bias else {})


def _hidden(*shape: int, **more: Tensor) -> dict[str, Tensor]:
    return {"hidden": _floats(*shape, WIDTH, leaf=True), **_head(), "labels": _labels(*shape), **more}


def _logits(*shape: int, **more: Tensor) -> dict[str, Tensor]:
    return {"logits": _floats(*shape, VOCAB, leaf=True), "labels": _labels(*shape), **more}


def _refs() -> Tensor:
    return _floats(SEQUENCES, shift=-9)


def _desirable() -> Tensor:
    return torch.tensor([True, False, False, True], device=DEVICE)


def _per_token() -> dict[str, Tensor]:
    shape = (SEQUENCES, TOKENS)
    return {
        "advantages": _floats(*shape),
        "old_logps": _floats(*shape, shift=-3),
        "ref_logps": _floats(*shape, shift=-3),
    }


class Case(NamedTuple):
    name: str
    call: Callable[..., Any]  # of keyword arguments
    arguments: Callable[[], dict[str, Tensor]]
    options: dict[str, Any] = {}  # noqa: RUF012
    fixed: tuple[str, ...] = ()  # increasing offsets, or indices: never the same twice


def _linear_kl() -> dict[str, Tensor]:
    return _hidden(SEQUENCES, TOKENS) | {
        "ref_hidden": _floats(SEQUENCES, TOKENS, 3), "ref_weight": _floats(VOCAB, 3), "ref_bias": _floats(VOCAB),
    }  # fmt: skip


def _normalized(rewards: Tensor) -> Tensor:
    return fastpref.RewardNormalizer(method="batch")(rewards)


def _weighted_loss(**tensors: Tensor) -> Any:
    return fastpref.DPOLoss(use_weighting=True, ld_alpha=0.5).from_logits(**tensors)


def _rewards(**more: Tensor) -> dict[str, Tensor]:
    return {
        "head_weight": _floats(1, WIDTH, leaf=True),
        "head_bias": _floats(1, leaf=True),
        "margin": _floats(2),
        **more,
    }


PADDED, PACKED = (SEQUENCES, TOKENS), (ROWS,)
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def _ranked() -> dict[str, Tensor]:
    return {"ranks": torch.tensor([1, 0, 1, 2], device=DEVICE), "group": torch.tensor([4, 4, 4, 6], device=DEVICE)}


CASES = [
    Case("token_logprobs", fastpref.token_logprobs, lambda: _logits(*PADDED)),
    Case("token_statistics", fastpref.token_statistics, lambda: _logits(*PADDED), {"softcap": 5.0}),
    *(
        Case(f"linear_token_logprobs {plan}", fastpref.linear_token_logprobs, lambda: _hidden(*PADDED), {"plan": plan})
        for plan in ("store", "recompute")
    ),
    Case("linear_token_statistics", fastpref.linear_token_statistics, lambda: _hidden(*PADDED)),
    Case("sequence_logprobs", fastpref.sequence_logprobs,
         lambda: {"token_logps": _floats(*PADDED, leaf=True), "labels": _labels(*PADDED)}),
    Case("sequence_logprobs packed", fastpref.sequence_logprobs,
         lambda: {"token_logps": _floats(ROWS, leaf=True), "labels": _labels(ROWS), "cu_seqlens": _edges()},
         fixed=("cu_seqlens",)),
    Case("DPOLoss", lambda **t: fastpref.DPOLoss()(**t),
         lambda: {name: _floats(3, leaf="ref" not in name)
                  for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")}),
    Case("IPOLoss, lengths", lambda **t: fastpref.IPOLoss(length_normalize=True)(**t),
         lambda: {name: _floats(3, leaf="ref" not in name).add(5 * ("len" in name)).detach()
                  for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps",
                               "chosen_lengths", "rejected_lengths")}),
    Case("DPOLoss.from_logits, weighted", _weighted_loss,
         lambda: _logits(*PADDED, ref_logps=_refs())),
    Case("DPOLoss.from_logits, mixture", lambda **t: fastpref.DPOLoss(**MIXTURE).from_logits(**t),
         lambda: _logits(*PACKED, ref_logps=_refs(), cu_seqlens=_edges()), fixed=("cu_seqlens",)),
    *(
        Case(f"DPOLoss.from_hidden {plan}", lambda **t: fastpref.DPOLoss().from_hidden(**t),
             lambda: _hidden(*PADDED, ref_logps=_refs()), {"plan": plan})
        for plan in ("pair", "store")
    ),
    Case("SimPOLoss.from_hidden", lambda **t: fastpref.SimPOLoss().from_hidden(**t),
         lambda: _hidden(*PACKED, cu_seqlens=_edges()), fixed=("cu_seqlens",)),
    Case("CPOLoss.from_hidden", lambda **t: fastpref.CPOLoss().from_hidden(**t), lambda: _hidden(*PADDED)),
    Case("ORPOLoss.from_hidden, prompts", lambda **t: fastpref.ORPOLoss().from_hidden(**t),
         lambda: _hidden(*PADDED, prompt_labels=torch.randint(VOCAB, PADDED).to(DEVICE))),
    Case("KTOLoss", lambda **t: fastpref.KTOLoss()(**t),
         lambda: {"logps": _floats(SEQUENCES, leaf=True), "desirable": _desirable(), "ref_logps": _floats(SEQUENCES),
                  "kl": torch.tensor(0.3, device=DEVICE)}),
    Case("KTOLoss.from_logits", lambda **t: fastpref.KTOLoss().from_logits(**t),
         lambda: _logits(*PADDED, desirable=_desirable(), ref_logps=_refs(), kl=torch.tensor(0.3, device=DEVICE))),
    Case("KTOLoss.from_hidden", lambda **t: fastpref.KTOLoss().from_hidden(**t),
         lambda: _hidden(*PACKED, desirable=_desirable(), ref_logps=_refs(), cu_seqlens=_edges(),
                         kl=torch.tensor(0.3, device=DEVICE)),
         {"plan": "pair"}, fixed=("cu_seqlens",)),
    Case("BCOLoss.from_hidden", lambda **t: fastpref.BCOLoss().from_hidden(**t),
         lambda: _hidden(*PADDED, desirable=_desirable(), ref_logps=_refs())),
    Case("ListDPOLoss", lambda **t: fastpref.ListDPOLoss()(**t),
         lambda: {"logps": _floats(SEQUENCES, leaf=True), "ref_logps": _floats(SEQUENCES), **_ranked()}),
    Case("ListDPOLoss.from_hidden", lambda **t: fastpref.ListDPOLoss(loss_type="davidson").from_hidden(**t),
         lambda: _hidden(*PACKED, ref_logps=_refs(), cu_seqlens=_edges(), **_ranked()),
         {"plan": "pair"}, fixed=("cu_seqlens",)),
    Case("kto_kl", fastpref.kto_kl, lambda: {"logps": _floats(SEQUENCES, shift=3), "ref_logps": _floats(SEQUENCES)}),
    Case("mismatched_kl_from_hidden", fastpref.mismatched_kl_from_hidden,
         lambda: _hidden(*PADDED, ref_logps=_floats(SEQUENCES, shift=-40))),
    Case("PolicyGradientLoss", lambda **t: fastpref.PolicyGradientLoss(beta=0.1, entropy_coef=0.1)(**t),
         lambda: {"logps": _floats(*PADDED, leaf=True, shift=-3), "entropy": _floats(*PADDED, leaf=True),
                  "labels": _labels(*PADDED), **_per_token()}),
    Case("PolicyGradientLoss.from_logits", lambda **t: fastpref.PolicyGradientLoss(beta=0.1).from_logits(**t),
         lambda: _logits(*PADDED, **_per_token())),
    Case("PolicyGradientLoss.from_hidden",
         lambda **t: fastpref.PolicyGradientLoss(beta=0.1, entropy_coef=0.1).from_hidden(**t),
         lambda: _hidden(*PADDED, **_per_token() | {"advantages": _floats(SEQUENCES)})),
    Case("BradleyTerryLoss", lambda **t: fastpref.BradleyTerryLoss(0.01)(**t),
         lambda: {"chosen_rewards": _floats(3, leaf=True), "rejected_rewards": _floats(3, leaf=True),
                  "margin": _floats(3)}),
    Case("BradleyTerryLoss.from_hidden", lambda **t: fastpref.BradleyTerryLoss().from_hidden(**t),
         lambda: _rewards(hidden=_floats(*PADDED, WIDTH, leaf=True),
                          last_index=torch.tensor([2, 1, 0, 2], device=DEVICE))),
    Case("BradleyTerryLoss.from_hidden, rows", lambda **t: fastpref.BradleyTerryLoss().from_hidden(**t),
         lambda: _rewards(hidden=_floats(ROWS, WIDTH, leaf=True),
                          last_index=torch.tensor([4, 2, 9, 4], device=DEVICE))),
    Case("BradleyTerryLoss.from_hidden, packed", lambda **t: fastpref.BradleyTerryLoss().from_hidden(**t),
         lambda: _rewards(hidden=_floats(ROWS, WIDTH, leaf=True), cu_seqlens=_edges()), fixed=("cu_seqlens",)),
    Case("BradleyTerryLoss.from_rankings", lambda **t: fastpref.BradleyTerryLoss().from_rankings(**t),
         lambda: {"rewards": _floats(5, leaf=True), "ranks": torch.tensor([1, 0, 2, 1, 0], device=DEVICE),
                  "group": torch.tensor([0, 0, 0, 1, 1], device=DEVICE)}, fixed=("ranks", "group")),
    *(
        Case(f"ProcessRewardLoss.from_hidden, {classes} classes",
             lambda **t: fastpref.ProcessRewardLoss().from_hidden(**t),
             lambda classes=classes: {
                 "hidden": _floats(*PADDED, WIDTH, leaf=True), "head_weight": _floats(classes, WIDTH, leaf=True),
                 "head_bias": _floats(classes, leaf=True), "step_labels": torch.randint(2, (SEQUENCES, 2)).to(DEVICE),
                 "step_index": torch.tensor([[0, 2], [1, 2], [0, 1], [0, 1]], device=DEVICE),
                 "mask": torch.tensor([[True, True], [True, False], [False, True], [True, True]], device=DEVICE)})
        for classes in (1, 3)
    ),
    Case("aggregate_steps", fastpref.aggregate_steps,
         lambda: {"step_scores": torch.rand(SEQUENCES, 3).to(DEVICE).requires_grad_(),
                  "mask": torch.tensor([[True, True, False]] * SEQUENCES, device=DEVICE)}, {"method": "product"}),
    Case("RewardNormalizer", _normalized, lambda: {"rewards": _floats(6)}),
    *(
        Case(f"kl_estimate {k}", fastpref.kl_estimate,
             lambda: {"logps": _floats(*PADDED, leaf=True), "ref_logps": _floats(*PADDED)}, {"estimator": k})
        for k in ("k1", "k3")
    ),
    Case("kl_penalized_rewards", fastpref.kl_penalized_rewards,
         lambda: {"scores": _floats(SEQUENCES, leaf=True), "logps": _floats(*PADDED, leaf=True),
                  "ref_logps": _floats(*PADDED), "mask": (_labels(*PADDED) != IGNORE)},
         {"beta": 0.3, "estimator": "k3", "return_sums": True}),
    *(
        Case(f"token_kl {direction}", fastpref.token_kl,
             lambda: {"policy_logits": _floats(*PADDED, VOCAB, leaf=True), "ref_logits": _floats(*PADDED, VOCAB),
                      "mask": (_labels(*PADDED) != IGNORE)}, {"direction": direction})
        for direction in ("reverse", "forward")
    ),
    *(
        Case(f"linear_token_kl {plan}", fastpref.linear_token_kl, _linear_kl, {"plan": plan})
        for plan in ("store", "recompute")
    ),
]  # fmt: skip
HEADS = [case for case in CASES if case.name.startswith(("linear_", "DPOLoss.from_hidden pair", "KTOLoss.from_hidden"))]
WITHOUT_TENSORS = {  # results, controllers, the model classes, and what speaks of inputs without computing from them
    "AdaptiveKLController", "FixedKLController", "ListOutput", "PairedLoss", "PenalizedRewards", "PolicyOutput",
    "PreferenceOutput", "ProcessRewardOutput", "RewardHead", "RewardOutput", "TokenKL", "TokenStatistics",
    "UnpairedOutput", "explain", "mismatched_indices", "set_backend",
}  # fmt: skip
UPSTREAM = ("plain", "expanded", "gaps")


def _outputs(result: Any) -> list[Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [t for t in found if isinstance(t, Tensor)]


def _weights(shape: torch.Size, dtype: torch.dtype, upstream: str) -> Tensor:
    """An upstream gradient: the same for both dtypes and, in numbers, whether plain or with gaps."""
    if upstream == "expanded":
        return torch.full((), 0.7, dtype=dtype, device=DEVICE).expand(shape)
    size = shape.numel()
    weights = (1.0 + torch.arange(size, dtype=torch.float64) % 5 / 3).view(shape).to(DEVICE, dtype)
    return weights if upstream == "plain" or not shape else view_of(weights, "gaps")


def _run(case: Case, tensors: dict[str, Tensor], upstream: str) -> list[Tensor]:
    """The outputs, and the gradients of every leaf for a known upstream gradient of each differentiable output."""
    outputs = _outputs(case.call(**tensors, **case.options))
    leaves = [t for t in tensors.values() if t.requires_grad]
    ends = [t for t in outputs if t.requires_grad]
    gradients: list[Tensor] = []
    if ends:
        ups = [_weights(t.shape, t.dtype, upstream) for t in ends]
        gradients = list(torch.autograd.grad(ends, leaves, ups, materialize_grads=True))
    return [*outputs, *gradients]


def _truth(case: Case, tensors: dict[str, Tensor], upstream: str) -> list[Tensor]:
    """The same numbers, contiguous, in fp64 (which other tests compare with the specification)."""
    double = {
        name: t.detach().to(torch.float64 if t.is_floating_point() else t.dtype, copy=True).contiguous()
        .requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }  # fmt: skip
    fastpref.set_backend("portable")
    return _run(case, double, upstream)


def _wrong(got: list[Tensor], truth: list[Tensor], limit: float) -> list[str]:
    assert len(got) == len(truth)
    bad = []
    for i, (a, b) in enumerate(zip(got, truth, strict=True)):
        error = relative_error(a, b) if b.is_floating_point() else float((a != b).sum())
        near_zero = b.is_floating_point() and b.norm() < 1e-6  # k1's log-ratio of equal rows, a gradient that vanishes
        if not (error <= limit or (near_zero and (a.double() - b).norm() <= 2 * limit)):  # NaN is wrong too
            bad.append(f"output {i} by {error:.1e}")
    return bad


def _check(case: Case, backend: str, dtype: torch.dtype, names: tuple[str, ...] = ()) -> None:
    base = {n: t.detach().to(dtype if t.is_floating_point() else t.dtype).requires_grad_(t.requires_grad)
            for n, t in case.arguments().items()}  # fmt: skip
    names = names or tuple(base)

    def wrong(which: tuple[str, ...], kind: str, upstream: str = "plain") -> list[str]:
        views = {name: view for name in which if (view := view_of(base[name], kind)) is not None}
        tensors = base | views
        truth = _truth(case, tensors, upstream)
        fastpref.set_backend(backend)
        return _wrong(_run(case, tensors, upstream), truth, LIMITS[dtype])

    for kind in KINDS:  # together, but for the expanded: equal rows of everything would hide one that is misread
        together = wrong(names, kind) if kind != "expanded" else []
        if kind == "expanded" or together:
            one_by_one = [n for n in names if not (n in case.fixed and kind == "expanded")]
            assert {n: bad for n in one_by_one if (bad := wrong((n,), kind))} == {}, kind
        assert together == [], kind
    for upstream in UPSTREAM:
        assert wrong((), "gaps", upstream) == [], f"{upstream} upstream gradient"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_view_of_any_argument_gives_what_a_contiguous_tensor_does(backend, case):
    _check(case, backend, torch.float32)


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
def test_so_it_does_in_half_precision_where_the_labels_logit_is_recomputed(backend, case):
    _check(case, backend, torch.float16, names=("hidden", "weight", "bias", "labels"))


def test_every_public_function_is_here():
    found = {case.name.replace(",", " ").replace(".", " ").split()[0] for case in CASES}
    assert found | WITHOUT_TENSORS | {"__version__"} == set(fastpref.__all__)
    assert not found & WITHOUT_TENSORS


def test_every_tensor_argument_is_here():
    """Of the functions; the objectives' methods share theirs."""
    for case in CASES:
        if inspect.isfunction(case.call) and case.call.__module__.startswith("fastpref"):
            annotated = {n for n, a in inspect.get_annotations(case.call).items() if "Tensor" in str(a)} - {"return"}
            optional = {"cu_seqlens", "cu_steps"}  # instead of padding: in a case of their own, or copied by torch
            assert annotated - optional <= set(case.arguments()), case.name
