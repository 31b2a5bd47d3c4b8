"""Every tensor argument of every backend function, as a strided, sliced, transposed or expanded view: the results of
contiguous tensors, but for the order of the sums (where rows begin decides what one load brings). What is written in
place says which views it cannot take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import DEVICE
from torch import Tensor
from views import KINDS, view_of

from fastpref import reference
from fastpref.backends import backend_for

ROWS, VOCAB, WIDTH, SEQUENCES, TOKENS = 5, 19, 7, 4, 3
TRANSFORM = reference.LogitTransform(temperature=0.7, softcap=5.0)
OPTIONS = {"transform": TRANSFORM, "ignore_index": -100}


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def _rows(*names: str) -> dict[str, Tensor]:
    return {name: _floats(ROWS) for name in names}


def _labels() -> Tensor:
    return torch.tensor([3, 0, -100, 18, 7], device=DEVICE)


def _tokens(*names: str) -> dict[str, Tensor]:
    return {name: _floats(SEQUENCES * TOKENS) for name in names}


def _packed() -> dict[str, Tensor]:
    labels = torch.randint(VOCAB, (SEQUENCES * TOKENS,)).to(DEVICE)
    labels[[2, 5]] = -100
    edges = torch.tensor([0, 3, 7, 8, SEQUENCES * TOKENS], device=DEVICE)
    return _tokens("token_logps") | {"labels": labels, "cu_seqlens": edges, "ref_logps": _floats(SEQUENCES)}


def _mask(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=DEVICE).view(shape) % 3 != 1


def _heads(index: list[int]) -> dict[str, Tensor]:
    return {"hidden": _floats(SEQUENCES, TOKENS, WIDTH), "weight": _floats(WIDTH), "bias": _floats(1),
            "index": torch.tensor(index, device=DEVICE)}  # fmt: skip


def _logits(*names: str) -> dict[str, Tensor]:
    return {name: _floats(ROWS, VOCAB) for name in names}


LENGTHS = (SEQUENCES, TOKENS)
CALLS: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Any]]] = {
    "row_logprob": (lambda: _logits("logits") | {"labels": _labels()} | _rows("target_logits"),
                    OPTIONS | {"statistics": reference.STATISTICS}),
    "row_gradient": (lambda: _logits("logits", "out") | {"labels": _labels()}
                     | _rows("logps", "lse", "grad_logps", "entropy", "grad_entropy"), OPTIONS),
    "target_logits": (lambda: {"hidden": _floats(ROWS, WIDTH).half(), "weight": _floats(VOCAB, WIDTH).half(),
                               "bias": _floats(VOCAB).half(), "labels": _labels()}, {}),
    "token_kl": (lambda: _logits("policy", "ref") | {"mask": _mask(ROWS), "labels": _labels()}
                 | _rows("target_logits", "ref_target_logits"),
                 {"direction": "jsd", "beta": 0.3, "transform": TRANSFORM}),
    "token_kl_gradient": (lambda: _logits("policy", "ref", "out") | {"mask": _mask(ROWS)}
                          | _rows("kl", "lse", "ref_lse", "grad"),
                          {"direction": "reverse", "beta": 0.3, "transform": TRANSFORM}),
    "paired_loss": (lambda: _packed() | _tokens("token_weights")
                    | {"lengths": _floats(SEQUENCES).abs() + 1, "pair_weights": _floats(2).abs(),
                       "chosen_tokens": torch.tensor(5, device=DEVICE)},
                    {"objective": reference.PairedObjective(("ipo", "sft"), (1.0, 0.3)), "num_pairs": 2,
                     "total_pairs": 2, "ignore_index": -100}),
    "unpaired_loss": (lambda: _packed() | {"desirable": _mask(SEQUENCES), "shift": _floats()},
                      {"objective": reference.UnpairedObjective(mean="class"), "first_sequence": 0,
                       "num_sequences": SEQUENCES, "ignore_index": -100}),
    "list_loss": (lambda: _packed() | {"ranks": torch.tensor([2, 0, 1, 1], device=DEVICE),
                                       "group": torch.tensor([3, 3, 3, 5], device=DEVICE),
                                       "total_groups": torch.tensor(2, device=DEVICE)},
                  {"objective": reference.ListObjective("davidson"), "ignore_index": -100}),
    "policy_loss": (lambda: _tokens("logps", "old_logps", "ref_logps", "advantages", "entropy", "weights"),
                    {"objective": reference.PolicyObjective(beta=0.1, entropy_coef=0.1)}),
    "bradley_terry": (lambda: {"rewards": _floats(SEQUENCES), "margin": _floats(2)}, {"center_coefficient": 0.01}),
    "row_scores": (lambda: _heads([2, 0, 1, 2]), {"layout": "positions"}),
    "row_scores_gradient": (lambda: _heads([2, 0, 1, 2]) | {"grad": _floats(SEQUENCES), "scale": _floats()},
                            {"layout": "positions", "need_hidden": True, "need_weight": True, "need_bias": True}),
    "kl_estimate": (lambda: _rows("logps", "ref_logps"), {"estimator": "k3"}),
    "penalized_rewards": (lambda: {"scores": _floats(SEQUENCES), "logps": _floats(*LENGTHS),
                                   "ref_logps": _floats(*LENGTHS), "mask": _mask(*LENGTHS), "beta": _floats()},
                          {"estimator": "k3"}),
    "penalized_rewards_backward": (lambda: {
        "grad_rewards": _floats(*LENGTHS), "grad_sums": _floats(SEQUENCES), "logps": _floats(*LENGTHS),
        "ref_logps": _floats(*LENGTHS), "mask": _mask(*LENGTHS), "beta": _floats()}, {"estimator": "k3"}),
}  # fmt: skip
FIXED = {"cu_seqlens", "out"}  # offsets increase, and a row of the output cannot hold two


def _results(call: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    result = call(**tensors, **options)
    result = [tensors["out"]] if result is None else list(result.values()) if isinstance(result, dict) else result
    return [t.clone() for t in (result if isinstance(result, list | tuple) else [result]) if t is not None]


@pytest.mark.parametrize("name", CALLS)
def test_a_view_of_any_argument_gives_what_a_contiguous_tensor_does(backend, name):
    make, options = CALLS[name]
    tensors = make()
    call = getattr(backend_for(next(iter(tensors.values()))), name)
    wrong = []
    for argument, value in tensors.items():
        for kind in KINDS:
            if argument in FIXED and (kind == "expanded" or (argument == "out" and kind != "sliced rows")):
                continue
            if (view := view_of(value, kind)) is None:
                continue
            got = _results(call, tensors | {argument: view}, options)
            want = _results(call, tensors | {argument: view.contiguous()}, options)
            if not all(
                torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(got, want, strict=True)
            ):
                wrong.append((argument, kind))
    assert wrong == []


def test_every_argument_of_every_launcher_is_here():
    launchers = pytest.importorskip("fastpref_kernels")
    for name in launchers.__all__:
        make, options = CALLS[name]
        assert set(inspect.signature(getattr(launchers, name)).parameters) - {"write_u", "write_k", "first_column"} \
            == set(make()) | set(options), name  # fmt: skip


@pytest.mark.parametrize("kind", ["gaps", "transposed", "expanded"])
def test_what_is_written_in_place_says_which_views_it_cannot_take(kind):
    launchers = pytest.importorskip("fastpref_kernels")
    z, y, rows = view_of(_floats(ROWS, VOCAB), kind), _floats(ROWS, VOCAB), _floats(ROWS)
    labels = _labels()
    with pytest.raises(ValueError, match=r"logits: got strides .* in place"):
        launchers.row_logprob(z, labels, write_u=True, **OPTIONS)
    with pytest.raises(ValueError, match=r"out: got strides .* in place"):
        launchers.row_gradient(y, labels, rows, rows, z, **OPTIONS)
    with pytest.raises(ValueError, match=r"policy: got strides .* in place"):
        launchers.token_kl(z, y, direction="reverse", transform=TRANSFORM, write_k=True)
    with pytest.raises(ValueError, match=r"out: got strides .* in place"):
        launchers.token_kl_gradient(y, y, rows, rows, rows, z, direction="reverse", transform=TRANSFORM)
