"""Every kernel as it is really launched, for `resources.py`: calls of its launchers on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import fastpref_kernels
import torch
from triton.backends.compiler import GPUTarget

from fastpref.common.precision import wide
from fastpref.reference import (
    F_DIVERGENCES,
    LIST_LOSSES,
    PAIR_LOSSES,
    STATISTICS,
    UNPAIRED_LOSSES,
    ListObjective,
    LogitTransform,
    PairedObjective,
    PolicyObjective,
    UnpairedObjective,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ROWS, HIDDEN, PAIRS, LENGTH = 4096, 4096, 64, 512
TOKENS = 2 * PAIRS * LENGTH
VOCAB = 50257  # the hard case: an odd vocabulary, in rows that we have padded to a multiple of 16
PLAIN = LogitTransform()
SOFTCAP = LogitTransform(temperature=0.7, logit_scale=0.5, softcap=30.0)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _indices(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int64)


def _logits(dtype: torch.dtype, vocab: int = VOCAB) -> torch.Tensor:
    return _meta(ROWS, (vocab + 15) // 16 * 16, dtype=dtype)[:, :vocab]


# Each calls a launcher of fastpref_kernels: (dtype of logits or hidden states, options of the variant).


def _row_logprob(dtype: torch.dtype, target: bool = False, transform=PLAIN, vocab: int = VOCAB, **options: Any) -> None:
    exact = _meta(ROWS) if target else None
    options |= {"transform": transform, "ignore_index": -100, "target_logits": exact}
    fastpref_kernels.row_logprob(_logits(dtype, vocab), _indices(ROWS), **options)


def _row_gradient(dtype: torch.dtype, given=(), transform=PLAIN, **options: Any) -> None:
    z, rows = _logits(dtype), _meta(ROWS, dtype=wide(dtype))
    options |= {"transform": transform, "ignore_index": -100, **dict.fromkeys(given, rows)}
    fastpref_kernels.row_gradient(z, _indices(ROWS), rows, rows, z, **options)


def _target_logits(dtype: torch.dtype) -> None:
    head = (_meta(VOCAB, HIDDEN, dtype=dtype), _meta(VOCAB, dtype=dtype))
    fastpref_kernels.target_logits(_meta(ROWS, HIDDEN, dtype=dtype), *head, _indices(ROWS))


def _token_kl(
    dtype: torch.dtype, direction: str = "reverse", given=(), transform=PLAIN, vocab: int = VOCAB, **options: Any
) -> None:
    options |= {"direction": direction, "transform": transform, **dict.fromkeys(given, _meta(ROWS))}
    if given:
        options |= {"labels": _indices(ROWS), "mask": _meta(ROWS, dtype=torch.bool)}
    fastpref_kernels.token_kl(_logits(dtype, vocab), _logits(dtype, vocab), **options)


def _token_kl_gradient(dtype: torch.dtype, direction: str, transform=PLAIN) -> None:
    z, rows = _logits(dtype), _meta(ROWS, dtype=wide(dtype))
    fastpref_kernels.token_kl_gradient(
        z, _logits(dtype), rows, rows, rows, z, direction=direction, transform=transform, grad=rows
    )


def _paired_loss(dtype: torch.dtype, packed: bool = True, weighted: bool = False, **objective: Any) -> None:
    edges = _indices(2 * PAIRS + 1) if packed else None
    weights = _meta(PAIRS) if weighted else None
    fastpref_kernels.paired_loss(
        _meta(TOKENS, dtype=dtype), _indices(TOKENS), edges, _meta(2 * PAIRS, dtype=dtype), None, weights, _indices(),
        PairedObjective(**({"label_smoothing": 0.1} | objective)), num_pairs=PAIRS, total_pairs=PAIRS,
        ignore_index=-100, token_weights=_meta(TOKENS) if weighted else None,
    )  # fmt: skip


def _unpaired_loss(dtype: torch.dtype, **objective: Any) -> None:
    fastpref_kernels.unpaired_loss(
        _meta(TOKENS, dtype=dtype), _indices(TOKENS), _indices(2 * PAIRS + 1), _meta(2 * PAIRS, dtype=dtype),
        _meta(2 * PAIRS, dtype=torch.bool), _meta(dtype=dtype), UnpairedObjective(**objective),
        first_sequence=0, num_sequences=2 * PAIRS, ignore_index=-100,
    )  # fmt: skip


def _list_loss(dtype: torch.dtype, **objective: Any) -> None:
    fastpref_kernels.list_loss(
        _meta(TOKENS, dtype=dtype), _indices(TOKENS), _indices(2 * PAIRS + 1), _meta(2 * PAIRS, dtype=dtype),
        _indices(2 * PAIRS), _indices(2 * PAIRS), None, ListObjective(**({"nu": 2.0} | objective)), ignore_index=-100,
    )  # fmt: skip


def _policy_loss(dtype: torch.dtype) -> None:
    objective = PolicyObjective(beta=0.04, entropy_coef=0.01)
    x = _meta(TOKENS, dtype=dtype)
    fastpref_kernels.policy_loss(x, x, x, x, x, x, objective)


def _bradley_terry(dtype: torch.dtype) -> None:
    margin = _meta(PAIRS, dtype=dtype)
    fastpref_kernels.bradley_terry(_meta(2 * PAIRS, dtype=dtype), margin, center_coefficient=0.01)


def _row_scores(dtype: torch.dtype) -> None:
    hidden, head = _meta(2 * PAIRS, LENGTH, HIDDEN, dtype=dtype), (_meta(HIDDEN, dtype=dtype), _meta(1, dtype=dtype))
    fastpref_kernels.row_scores(hidden, *head, _indices(2 * PAIRS), layout="positions")


def _row_scores_gradient(dtype: torch.dtype) -> None:
    hidden, head = _meta(2 * PAIRS, LENGTH, HIDDEN, dtype=dtype), (_meta(HIDDEN, dtype=dtype), _meta(1, dtype=dtype))
    rewards, upstream = _meta(2 * PAIRS, dtype=wide(dtype)), _meta(dtype=wide(dtype))
    fastpref_kernels.row_scores_gradient(
        rewards, upstream, hidden, *head, _indices(2 * PAIRS), layout="positions",
        need_hidden=True, need_weight=True, need_bias=True,
    )  # fmt: skip


def _kl_estimate(dtype: torch.dtype, estimator: str) -> None:
    fastpref_kernels.kl_estimate(_meta(TOKENS, dtype=dtype), _meta(TOKENS, dtype=dtype), estimator)


def _penalized_rewards(dtype: torch.dtype, estimator: str) -> None:
    scores, rows = _meta(PAIRS, dtype=dtype), _meta(PAIRS, LENGTH, dtype=dtype)
    mask = _meta(PAIRS, LENGTH, dtype=torch.bool)
    fastpref_kernels.penalized_rewards(scores, rows, rows, mask, _meta(dtype=dtype), estimator)


def _penalized_rewards_backward(dtype: torch.dtype, estimator: str) -> None:
    scores, rows = _meta(PAIRS, dtype=dtype), _meta(PAIRS, LENGTH, dtype=dtype)
    mask = _meta(PAIRS, LENGTH, dtype=torch.bool)
    fastpref_kernels.penalized_rewards_backward(rows, scores, rows, rows, mask, _meta(dtype=dtype), estimator)


class Variant(NamedTuple):
    call: Callable[..., None]
    name: str
    dtypes: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


LARGE = 151665  # rows too long to stay in the L2 cache between two sweeps; odd, too
HALF, BOTH, WIDE = ("bf16",), ("bf16", "fp32"), ("fp32",)
REST, FP64 = ("fp16", "fp64"), ("fp64",)
VARIANTS = [
    Variant(_row_logprob, "plain", BOTH),
    Variant(_row_logprob, "target", HALF, {"target": True}),
    Variant(_row_logprob, "U", BOTH, {"write_u": True, "vocab": LARGE}),
    Variant(_row_logprob, "U, 64k", HALF, {"write_u": True, "vocab": 65024}),
    Variant(_row_logprob, "U, 48k", HALF, {"write_u": True}),
    Variant(_row_logprob, "U, target", HALF, {"write_u": True, "target": True, "vocab": LARGE}),
    Variant(_row_logprob, "U, target, 48k", HALF, {"write_u": True, "target": True}),
    Variant(_row_logprob, "U, target, softcap", BOTH, {"write_u": True, "target": True, "transform": SOFTCAP}),
    Variant(_row_logprob, "statistics", HALF, {"statistics": STATISTICS}),
    Variant(_row_logprob, "statistics, softcap", BOTH, {"statistics": STATISTICS, "transform": SOFTCAP}),
    Variant(_row_gradient, "U", HALF, {"first_column": 128}),
    Variant(_row_gradient, "plain", BOTH, {"given": ("grad_logps",)}),
    Variant(_row_gradient, "entropy, softcap", BOTH,
            {"given": ("grad_logps", "entropy", "grad_entropy"), "transform": SOFTCAP}),
    Variant(_target_logits, "bias", BOTH),
    Variant(_token_kl, "reverse", HALF),
    Variant(_token_kl, "reverse, K", HALF, {"write_k": True, "vocab": LARGE}),
    Variant(_token_kl, "reverse, K, 32k", HALF, {"write_k": True, "vocab": 32000}),
    Variant(_token_kl, "forward, K, labels, softcap", BOTH,
            {"direction": "forward", "write_k": True, "given": ("target_logits", "ref_target_logits"),
             "transform": SOFTCAP}),
    Variant(_token_kl, "jsd, K", HALF, {"direction": "jsd", "write_k": True, "vocab": LARGE}),
    Variant(_token_kl, "jsd, K, labels, softcap", HALF,
            {"direction": "jsd", "write_k": True, "given": ("target_logits", "ref_target_logits"),
             "transform": SOFTCAP}),
    Variant(_token_kl_gradient, "jsd, softcap", HALF, {"direction": "jsd", "transform": SOFTCAP}),
    Variant(_token_kl_gradient, "reverse, softcap", BOTH, {"direction": "reverse", "transform": SOFTCAP}),
    Variant(_row_scores, "positions", HALF),
    Variant(_row_scores_gradient, "positions", HALF),
    Variant(_bradley_terry, "margin, centre", WIDE),
    Variant(_kl_estimate, "k3", WIDE, {"estimator": "k3"}),
    Variant(_penalized_rewards, "k3", WIDE, {"estimator": "k3"}),
    Variant(_penalized_rewards_backward, "k3", WIDE, {"estimator": "k3"}),
    Variant(_policy_loss, "clipped, KL, entropy", WIDE),
    Variant(_unpaired_loss, "kto, class means", WIDE, {"mean": "class"}),
    Variant(_list_loss, "plackett_luce", WIDE),
    Variant(_paired_loss, "sigmoid", WIDE),
    Variant(_paired_loss, "sigmoid, padded", WIDE, {"packed": False}),
    Variant(_paired_loss, "sigmoid + bco_pair + sft, weighted", WIDE,
            {"losses": ("sigmoid", "bco_pair", "sft"), "weights": (0.8, 0.2, 1.0), "weighted": True}),
    Variant(_paired_loss, "aot + aot_unpaired", WIDE, {"losses": ("aot", "aot_unpaired"), "weights": (1.0, 1.0)}),
    Variant(_paired_loss, "sigmoid, mean log-probs", WIDE, {"average": True, "gamma": 0.5}),
]  # fmt: skip
# for sm_90 alone: of these the other targets compile the like
SM90_VARIANTS = [
    Variant(_row_logprob, "plain", REST),
    Variant(_row_logprob, "U", FP64, {"write_u": True}),
    Variant(_row_logprob, "U, target", ("fp16",), {"write_u": True, "target": True}),
    Variant(_row_gradient, "plain", REST, {"given": ("grad_logps",)}),
    Variant(_target_logits, "bias", ("fp16",)),
    Variant(_token_kl, "reverse", ("fp16", "fp32", "fp64")),
    Variant(_token_kl, "jsd, K", ("fp32", "fp64"), {"direction": "jsd", "write_k": True}),
    Variant(_token_kl_gradient, "reverse", REST, {"direction": "reverse"}),
    Variant(_row_scores, "positions", ("fp16", "fp32", "fp64")),
    Variant(_row_scores_gradient, "positions", ("fp16", "fp32", "fp64")),
    Variant(_bradley_terry, "margin, centre", FP64),
    Variant(_kl_estimate, "k3", FP64, {"estimator": "k3"}),
    Variant(_penalized_rewards, "k3", FP64, {"estimator": "k3"}),
    Variant(_penalized_rewards_backward, "k3", FP64, {"estimator": "k3"}),
    Variant(_policy_loss, "clipped, KL, entropy", FP64),
    Variant(_unpaired_loss, "kto, class means", FP64, {"mean": "class"}),
    Variant(_list_loss, "davidson", FP64, {"loss": "davidson"}),
    Variant(_paired_loss, "sigmoid", FP64),
    *(Variant(_paired_loss, name, WIDE, {"losses": (name,)}) for name in PAIR_LOSSES if name != "sigmoid"),
    Variant(_paired_loss, "sft", WIDE, {"losses": ("sft",)}),
    *(Variant(_list_loss, name, WIDE, {"loss": name}) for name in LIST_LOSSES if name != "plackett_luce"),
    *(Variant(_unpaired_loss, name, WIDE, {"loss": name}) for name in UNPAIRED_LOSSES),
    *(Variant(_paired_loss, f"sigmoid, {f}", WIDE, {"f_divergence": f}) for f in F_DIVERGENCES if f != "reverse_kl"),
]


class Case(NamedTuple):
    variant: Variant
    dtype: str
    target: str

    @property
    def name(self) -> str:
        return f"{self.variant.call.__name__.removeprefix('_')} ({self.variant.name}) {self.dtype} on {self.target}"


CASES = [
    *(Case(v, dtype, target) for target in TARGETS for v in VARIANTS for dtype in v.dtypes),
    *(Case(v, dtype, "sm_90") for v in SM90_VARIANTS for dtype in v.dtypes),
]
