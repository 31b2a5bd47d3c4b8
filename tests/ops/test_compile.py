"""`torch.compile(fullgraph=True)`: no graph break, at most one recompile over lengths, the gradients of eager mode.

Under compilation `plan="auto"` does not look at sizes: it takes `pair` through `from_hidden` with a trainable head,
`recompute` for bare log-probs of one, and `frozen` for a frozen head.
"""

from __future__ import annotations

import pytest
import torch
from support import IGNORE
from torch import nn

import fastpref
from fastpref import DPOLoss

B, D, V = 2, 8, 37
LENGTHS = (5, 9, 12, 7, 16)


class Model(nn.Module):
    def __init__(self, trainable_head: bool) -> None:
        super().__init__()
        self.backbone = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.head.requires_grad_(trainable_head)


class Counter:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        self.compile = torch._dynamo.lookup_backend(backend)
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        self.graphs.append(graph)
        return self.compile(graph, inputs)

    def operators(self) -> set[str]:
        called = (str(node.target) for graph in self.graphs for node in graph.graph.nodes if node.op == "call_function")
        return {
            name.removesuffix(".default").removeprefix("fastpref.") for name in called if name.startswith("fastpref.")
        }


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(length: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2 * B, length, D, generator=generator)
    labels = torch.randint(0, V, (2 * B, length), generator=generator)
    labels[:, : length // 3] = IGNORE
    return x.to(device), labels.to(device), torch.randn(2 * B, generator=generator).to(device)


def gradients_of(step, model: Model, *inputs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = step(*inputs)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_same(compiled: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]) -> None:
    assert compiled.keys() == eager.keys()
    for name, truth in eager.items():
        torch.testing.assert_close(compiled[name], truth, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("trainable_head", [True, False])
def test_training_step_from_hidden_states(backend, device, trainable_head):
    model = Model(trainable_head).to(device)
    loss_fn = DPOLoss(loss_type=["sigmoid", "sft"])

    def step(x, labels, ref_logps):
        head = model.head
        return loss_fn.from_hidden(model.backbone(x).tanh(), head.weight, labels, head.bias, ref_logps).loss

    counter = Counter("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in LENGTHS:
        inputs = batch(length, device)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
    assert len(counter.graphs) <= 2  # one for the first length, one for any other
    expected = {True: {"linear_paired_loss"}, False: {"linear_token_logprobs", "paired_loss"}}
    assert counter.operators() == expected[trainable_head]
    if not trainable_head:
        assert "frozen" in str(counter.graphs[0].code)


def test_packed_batches(device):
    model = Model(trainable_head=True).to(device)
    loss_fn = DPOLoss()

    def step(x, labels, ref_logps, cu_seqlens):
        return loss_fn.from_hidden(model.backbone(x), model.head.weight, labels, None, ref_logps, cu_seqlens).loss

    counter = Counter("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in LENGTHS:
        x, labels, ref_logps = batch(length, device)
        edges = torch.tensor([0, length - 2, 2 * length, 3 * length - 1, 4 * length], device=device)
        inputs = (x.flatten(0, 1), labels.flatten(), ref_logps, edges)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
    assert len(counter.graphs) <= 2


@pytest.mark.parametrize("trainable_head", [True, False])
def test_log_probs_of_hidden_states(device, trainable_head):
    model = Model(trainable_head).to(device)

    def step(x, labels, weights):
        logps = fastpref.linear_token_logprobs(model.backbone(x), model.head.weight, labels, softcap=20.0)
        return (fastpref.sequence_logprobs(logps, labels, average=True) * weights).sum()

    counter = Counter("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in LENGTHS:
        inputs = batch(length, device)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
    assert len(counter.graphs) <= 2
    plan = {True: "recompute", False: "frozen"}[trainable_head]
    assert plan in str(counter.graphs[0].code)


def test_log_probs_of_logits(device):
    model = Model(trainable_head=True).to(device)

    def step(x, labels, weights):
        found = fastpref.token_statistics(model.head(x), labels, ("entropy",))
        return (found.logps.sum(1) * weights).sum() + found.entropy.mean()

    counter = Counter("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in LENGTHS:
        inputs = batch(length, device)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
    assert len(counter.graphs) <= 2


def test_loss_from_logits_shifted_without_a_copy(device):
    model = Model(trainable_head=True).to(device)
    loss_fn = DPOLoss(loss_type="ipo")

    def step(x, labels, ref_logps):
        return loss_fn.from_logits(model.head(x)[:, :-1], labels[:, 1:], ref_logps).loss

    counter = Counter("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in LENGTHS:
        inputs = batch(length, device)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
    assert len(counter.graphs) <= 2


def test_without_gradients(device):
    model = Model(trainable_head=True).to(device)
    loss_fn = DPOLoss()
    x, labels, ref_logps = batch(5, device)

    def evaluate(x, labels, ref_logps):
        return loss_fn.from_hidden(x, model.head.weight, labels, ref_logps=ref_logps)

    counter = Counter("aot_eager")
    with torch.no_grad():
        compiled = torch.compile(evaluate, fullgraph=True, backend=counter)(x, labels, ref_logps)
        for got, want in zip(compiled, evaluate(x, labels, ref_logps), strict=True):
            torch.testing.assert_close(got, want)
    assert "no_grad" in str(counter.graphs[0].code)


@pytest.mark.parametrize("trainable_head", [True, False])
def test_inductor(device, trainable_head):
    """Real code generation, with the default backend of this device."""
    model = Model(trainable_head).to(device)
    loss_fn = DPOLoss()

    def step(x, labels, ref_logps):
        return loss_fn.from_hidden(model.backbone(x).relu(), model.head.weight, labels, ref_logps=ref_logps).loss

    compiled = torch.compile(step, fullgraph=True)
    for length in LENGTHS[:2]:
        inputs = batch(length, device)
        assert_same(gradients_of(compiled, model, *inputs), gradients_of(step, model, *inputs))
