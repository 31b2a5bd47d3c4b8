"""`torch.library.opcheck` of every operator: schema, autograd registration, fakes and AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from support import IGNORE
from torch.utils.flop_counter import FlopCounterMode

from fastpref import DPOLoss
from fastpref.ops.common import encode
from fastpref.reference import ListObjective, PairedObjective

B, T, D, V = 2, 3, 4, 11
N = 2 * B * T
PLAIN = (1.0, 1.0, None)  # temperature, logit_scale, softcap
CAPPED = (0.7, 1.3, 5.0)


@pytest.fixture
def make(device):
    """Inputs on the device: normal values, or labels of which some are ignored."""

    def tensor(*shape: int, grad: bool = False, dtype=torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)

    def labels() -> torch.Tensor:
        y = torch.randint(0, V, (N,), device=device)
        y[::4] = IGNORE
        return y

    tensor.labels = labels
    tensor.edges = lambda: torch.tensor([0, 2, 6, 9, N], device=device)
    return tensor


def check(name: str, *args, **kwargs) -> None:
    operator = getattr(torch.ops.fastpref, name)
    results = torch.library.opcheck(operator, args, kwargs)
    assert set(results.values()) == {"SUCCESS"}, results


def names_of(operator: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.fastpref, operator).default._schema.arguments]


@pytest.mark.parametrize(
    ("shape", "options", "grad"),
    [
        ((N, V), (*PLAIN, ""), False),
        ((N, V), (*PLAIN, ""), True),
        ((2 * B, T, V), (*CAPPED, "entropy,is_top1,mean_logit,log_sum_sq"), True),
    ],
)
def test_token_logprobs(backend, make, shape, options, grad):
    check("token_logprobs", make(*shape, grad=grad), make.labels(), IGNORE, *options)


@pytest.mark.parametrize("entropy", [False, True])
def test_token_logprobs_backward(backend, make, entropy):
    z, y = make(N, V), make.labels()
    logps, lse, h, *_ = torch.ops.fastpref.token_logprobs(z, y, IGNORE, *CAPPED, "entropy")
    grad_entropy = make(N) if entropy else None
    check("token_logprobs_backward", make(N), grad_entropy, z, y, logps, lse, h, IGNORE, *CAPPED)


@pytest.mark.parametrize("statistics", ["", "mean_logit,entropy"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("plan", ["no_grad", "frozen", "store", "recompute"])
def test_linear_token_logprobs(backend, make, plan, with_bias, statistics):
    trainable = plan in ("store", "recompute")
    bias = make(V, grad=trainable) if with_bias else None
    head = (make(N, D, grad=plan != "no_grad"), make(V, D, grad=trainable), make.labels(), bias)
    check("linear_token_logprobs", *head, IGNORE, *CAPPED, plan, 5 * V * 4, statistics)


@pytest.mark.parametrize("entropy", ["", "entropy"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("plan", ["store", "recompute"])
def test_linear_token_logprobs_backward(backend, make, plan, with_bias, entropy):
    inputs = (make(N, D), make(V, D), make.labels(), make(V) if with_bias else None)
    *saved, values = torch.ops.fastpref.linear_token_logprobs(*inputs, IGNORE, *PLAIN, plan, None, entropy)
    needs = (True, True, with_bias)
    mixed = (values[0], make(N)) if entropy else (None, None)
    check("linear_token_logprobs_backward", make(N), *inputs, *saved, *mixed, IGNORE, *PLAIN, plan, None, *needs)


OBJECTIVES = {
    "sigmoid": PairedObjective(),
    "mixture": PairedObjective(("ipo", "aot", "sft"), (0.5, 1.0, 0.2), label_smoothing=0.1),
}


@pytest.mark.parametrize(
    ("objective", "case"),
    [
        ("sigmoid", "summed"),
        ("mixture", "summed"),
        ("sigmoid", "padded"),
        ("mixture", "packed"),
        ("sigmoid", "no reference"),
        ("mixture", "weighted"),
    ],
)
def test_paired_loss(backend, make, objective, case):
    rows = 2 * B if case == "summed" else N
    inputs = {
        "token_logps": make(rows, grad=True),
        "labels": None if case == "summed" else make.labels(),
        "cu_seqlens": make.edges() if case == "packed" else None,
        "ref_logps": None if case == "no reference" else make(2 * B),
        "lengths": make(2 * B).abs() + 1 if case == "summed" else None,
        "pair_weights": make(B).abs() if case == "weighted" else None,
        "objective": encode(OBJECTIVES[objective]),
        "num_pairs": B,
        "ignore_index": IGNORE,
    }
    check("paired_loss", *(inputs[name] for name in names_of("paired_loss") if name in inputs))


@pytest.mark.parametrize(
    ("objective", "packed", "with_bias", "head"),
    [
        ("sigmoid", False, False, "trainable"),
        ("sigmoid", True, True, "trainable"),
        ("mixture", True, False, "trainable"),
        ("mixture", False, True, "frozen"),
        ("sigmoid", True, True, "no gradients"),
    ],
)
def test_linear_paired_loss(backend, make, objective, packed, with_bias, head):
    trainable, hidden_grad = head == "trainable", head != "no gradients"
    inputs = {
        "hidden": make(N, D, grad=hidden_grad),
        "weight": make(V, D, grad=trainable),
        "labels": make.labels(),
        "bias": make(V, grad=trainable) if with_bias else None,
        "ref_logps": make(2 * B),
        "cu_seqlens": make.edges() if packed else None,
        "ignore_index": IGNORE,
        **dict(zip(("temperature", "logit_scale", "softcap"), PLAIN, strict=True)),
        "objective": encode(OBJECTIVES[objective]),
        "num_pairs": B,
        "workspace_bytes": 7 * V * 4,  # two groups, one of which does not fit
        "need_hidden": hidden_grad,
        "need_weight": trainable,
        "need_bias": trainable and with_bias,
    }
    check("linear_paired_loss", *(inputs[name] for name in names_of("linear_paired_loss") if name in inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_list_losses(backend, make, packed):
    ranks, group = (torch.tensor(x, device=make(1).device) for x in ([0, 1, 0, 0], [0, 0, 1, 1]))
    encoded, edges = encode(ListObjective("davidson")), make.edges() if packed else None
    given = (make.labels(), edges, make(2 * B), ranks, group, encoded, IGNORE)
    check("list_loss", make(N, grad=True), *given)
    head = (make(N, D, grad=True), make(V, D, grad=True), make.labels(), make(V, grad=True) if packed else None)
    options = (edges, IGNORE, *PLAIN, encoded, 7 * V * 4, True, True, packed)
    check("linear_list_loss", *head, make(2 * B), ranks, group, [0, 2, 4], *options)


@pytest.mark.parametrize("coefs", [(), (N,)])
def test_scale_gradient(make, coefs):
    check("scale_gradient", make(N, D), make(*coefs), make(N, D))


def test_a_dispatch_mode_around_a_loss_changes_nothing(backend, make):
    """FlopCounterMode, selective checkpointing: PyTorch hides functorch from what runs inside an operator there."""
    logits, labels, refs = make(2 * B, T, V, grad=True), make.labels().view(2 * B, T), make(2 * B)
    plain = DPOLoss().from_logits(logits, labels, refs).loss
    with FlopCounterMode(display=False):
        counted = DPOLoss().from_logits(logits, labels, refs).loss
    assert torch.equal(counted, plain)
