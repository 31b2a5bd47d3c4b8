"""Vocabulary-parallel heads on two processes (gloo) against the same head in one."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import TRANSFORMS, relative_error

import fastpref
from fastpref.objectives import vocab_parallel as parallel

RANKS, VOCAB, WIDTH, IGNORE = 2, 250, 8, -100


def inputs(dtype: torch.dtype, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / 2

    labels = torch.randint(vocab, (3, 5), generator=generator)
    labels[0, 1], labels[2, :3], labels[1, 0], labels[1, 1] = IGNORE, IGNORE, 0, vocab - 1
    return {
        "hidden": leaf(3, 5, WIDTH), "weight": leaf(vocab, WIDTH), "bias": leaf(vocab), "labels": labels,
        "ref_hidden": leaf(3, 5, 6), "ref_weight": leaf(vocab, 6), "ref_bias": leaf(vocab), "upstream": leaf(3, 5),
    }  # fmt: skip


def check(got: dict, want: dict, limit: float, what: str) -> None:
    """Of gradients by their size, of values by theirs or one nat: the last bit of a log-sum-exp of 5 is 5e-7."""
    for name, value in want.items():
        size = max(float(value.norm()), value.numel() ** 0.5 if name == "value" else 0.0)
        error = float((got[name] - value).norm()) / size
        assert error <= limit, f"{what}: {name} off by {error:.1e}"


def with_gradients(function, leaves: dict[str, torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    out = function(**leaves)
    out.backward(upstream.to(out.dtype))
    return {"value": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def shard(values: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    rows = slice(rank * VOCAB // RANKS, (rank + 1) * VOCAB // RANKS)
    return {name: value[rows] if "weight" in name or "bias" in name else value for name, value in values.items()}


LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


def compare(ours, whole, head: dict, leaves: dict, upstream, rank: int, limit: float, what: str) -> dict:
    """One process with all rows against this rank with its own, of what is trained (`leaves`) and what is not."""
    wanted = with_gradients(lambda **values: whole(**values, **head), leaves, upstream)
    found = with_gradients(lambda **values: ours(**values, **shard(head, rank)), shard(leaves, rank), upstream)
    check(found, shard(wanted, rank), limit, what)
    return found


def log_probs(rank: int) -> None:
    for dtype, transform, plan, trainable in itertools.product(
        LIMITS, ("plain", "capped"), ("store", "recompute"), (True, False)
    ):
        x, room = inputs(dtype), {"plan": plan, "workspace_bytes": 3 * VOCAB * dtype.itemsize}
        trained = ("hidden", "weight", "bias") if trainable else ("hidden",)
        options = TRANSFORMS[transform] | {"labels": x["labels"]}
        found = compare(
            functools.partial(parallel.linear_token_logprobs, **options, **room),
            functools.partial(fastpref.linear_token_logprobs, **options),
            {name: x[name] for name in ("weight", "bias") if name not in trained},
            {name: x[name] for name in trained}, x["upstream"], rank, LIMITS[dtype],
            f"log-probs {dtype} {transform} {plan} trainable={trainable}",
        )  # fmt: skip
        assert (found["value"][x["labels"] == IGNORE] == 0).all()


def divergences(rank: int) -> None:
    for dtype, transform, direction in itertools.product(LIMITS, TRANSFORMS, ("reverse", "forward")):
        x = inputs(dtype)
        options = TRANSFORMS[transform] | {"direction": direction, "labels": x["labels"]}
        compare(
            functools.partial(parallel.linear_token_kl, **options, workspace_bytes=3 * VOCAB * dtype.itemsize),
            lambda options=options, **values: fastpref.linear_token_kl(**values, **options).kl,
            {name: x[name] for name in ("ref_hidden", "ref_weight", "ref_bias")},
            {name: x[name] for name in ("hidden", "weight", "bias")}, x["upstream"], rank, LIMITS[dtype],
            f"KL {dtype} {transform} {direction}",
        )  # fmt: skip


def no_gradients_and_no_labels(rank: int) -> None:
    x = inputs(torch.float32)
    local = shard(x, rank)
    with torch.no_grad():
        got = parallel.linear_token_logprobs(local["hidden"], local["weight"], x["labels"])
        want = fastpref.linear_token_logprobs(x["hidden"], x["weight"], x["labels"])
        assert relative_error(got, want) < 1e-6
        heads = [[v[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight")] for v in (local, x)]
        assert relative_error(parallel.linear_token_kl(*heads[0]), fastpref.linear_token_kl(*heads[1]).kl) < 1e-6
        nothing = torch.full_like(x["labels"], IGNORE)
        assert (parallel.linear_token_logprobs(local["hidden"], local["weight"], nothing) == 0).all()


def dtensors(rank: int) -> None:
    """251 rows: 126 and 125. The hidden states are a replicated DTensor, or a plain one."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, x = init_device_mesh("cpu", (RANKS,)), inputs(torch.float32, 251)
    whole = with_gradients(
        lambda hidden, weight, bias: fastpref.linear_token_logprobs(hidden, weight, x["labels"], bias),
        {name: x[name] for name in ("hidden", "weight", "bias")}, x["upstream"],
    )  # fmt: skip
    for replicated in (True, False):
        weight, bias = (torch.nn.Parameter(distribute_tensor(x[name], mesh, [Shard(0)])) for name in ("weight", "bias"))
        hidden = distribute_tensor(x["hidden"], mesh, [Replicate()]) if replicated else x["hidden"].clone()
        hidden = hidden.detach().requires_grad_()
        out = parallel.linear_token_logprobs(hidden, weight, x["labels"], bias)
        out.backward(x["upstream"])
        found = {"value": out, "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Shard(0),)
        check({n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in found.items()}, whole, 1e-6, "DTensor")
    with pytest.raises(ValueError, match=r"weight: got a DTensor placed as .*, want \(Shard\(dim=0\),\)"):
        parallel.linear_token_logprobs(hidden, distribute_tensor(x["weight"], mesh, [Shard(1)]), x["labels"])
    with pytest.raises(ValueError, match="weight: got 1 rows over 2 ranks, want at least one on each"):
        parallel.linear_token_logprobs(hidden, distribute_tensor(x["weight"][:1], mesh, [Shard(0)]), x["labels"])


def interpreted(rank: int) -> None:
    x = inputs(torch.float32)
    whole = fastpref.linear_token_logprobs(x["hidden"], x["weight"], x["labels"])
    fastpref.set_backend("triton")
    leaves = shard({name: x[name] for name in ("hidden", "weight")}, rank)
    out = with_gradients(lambda **v: parallel.linear_token_logprobs(**v, labels=x["labels"]), leaves, x["upstream"])
    assert relative_error(out["value"], whole) < 1e-6
    fastpref.set_backend("auto")


CASES = (log_probs, divergences, no_gradients_and_no_labels, dtensors, interpreted)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        for case in CASES:
            case(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All cases in one pair of processes: starting them takes longer than running them."""
    mp.spawn(run, (str(tmp_path),), nprocs=RANKS)


def test_without_a_process_group():
    x = inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"group: got no process group, want torch.distributed.init_process_group"):
        parallel.linear_token_logprobs(x["hidden"], x["weight"], x["labels"])
