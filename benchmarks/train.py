"""Suite: whole training steps of small models (forward, DPO, backward, AdamW). Only who computes the loss differs.

The models have random weights, since the time of a step does not depend on what was learnt. The learning rate is 0: the
arithmetic is the same, but every step starts from the weights whose gradients were checked.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.head import Case as HeadCase
from benchmarks.head import make_batch
from benchmarks.objectives import IGNORE, Batch
from benchmarks.shapes import HEADS, HeadShape
from benchmarks.suite import FP32_LIMIT, Problem, Results, Suite, relative_error
from fastpref import linear_token_logprobs
from fastpref.models import hidden_states

ALLOWED = 2.0  # times the error of eager in the same dtype


class Config(NamedTuple):
    """A Llama with tied embeddings; `source` says whose sizes these are."""

    head: HeadShape
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    source: str


CONFIGS = {
    "smollm2-135m": Config(HEADS["smollm2-135m"], 30, 1536, 9, 3, HEADS["smollm2-135m"].source),
    "smollm2-135m, 4 layers": Config(HEADS["smollm2-135m"], 4, 1536, 9, 3, "the same with 4 of its 30 layers"),
    "llama-3.2-1b": Config(HEADS["llama-3.2-1b"], 16, 8192, 32, 8, HEADS["llama-3.2-1b"].source),
    "tiny": Config(HeadShape(32, 1024, "made up"), 2, 64, 2, 1, "made up, to see that everything runs"),
}


class Case(NamedTuple):
    model: str  # of CONFIGS
    pairs: int
    seq_len: int
    dtype: torch.dtype
    trainable: bool = True  # else the embeddings, and with them the tied head, stay as they are

    @property
    def label(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        return f"{self.model}, {self.pairs} pairs x {self.seq_len}, {head} head"


def make_model(case: Case, device: torch.device) -> Any:
    """The model of a case.

    Raises:
        Absent: transformers is not installed.
    """
    transformers, config = peers.imported("transformers"), CONFIGS[case.model]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.head.vocab, hidden_size=config.head.d, intermediate_size=config.intermediate,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
            tie_word_embeddings=True,
        )
    ).to(device=device, dtype=case.dtype)  # fmt: skip
    model.get_output_embeddings().weight.requires_grad_(case.trainable)
    return model


class TrainProblem(Problem):
    providers = ("fastpref", "eager", "eager_compacted", "eager_compiled", "trl")

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.case, self.label, self.dtype, self.device = case, case.label, case.dtype, device
        self.model = make_model(case, device)
        head = self.model.get_output_embeddings().weight
        (vocab, d), rows = head.shape, 2 * case.pairs * case.seq_len
        shape = HeadCase("", 1, vocab, case.pairs, case.seq_len, rows // 2, torch.float32)
        self.labels = make_batch(shape, device).labels
        self.ids = torch.randint(vocab, self.labels.shape, device=device)
        following = self.labels[:, :-1]  # the label of a row is the next row's input
        self.ids[:, 1:] = torch.where(following == IGNORE, self.ids[:, 1:], following)
        with torch.no_grad():
            batch = self._batch(self.model, torch.zeros(2 * case.pairs, device=device))
            sums = linear_token_logprobs(batch.hidden, batch.weight, batch.labels).sum(1)
        self.ref_logps = sums + torch.randn(len(sums), device=device)
        body = sum(p.numel() for p in self.model.parameters()) - head.numel()
        # of the body 2 FLOPs a parameter and token forward, 4 backward; of the head its products on the scored rows
        self.flops = 6 * body * rows + measure.matmul_flops(rows // 2, d, vocab, 3 if case.trainable else 2)

    def _batch(self, model: Any, ref_logps: Tensor) -> Batch:
        return Batch(hidden_states(model, self.ids), model.get_output_embeddings().weight, self.labels, ref_logps, None)

    def _backward(self, loss_of: peers.Loss, model: Any) -> Results:
        """The loss, and the gradients of one weight in the first layer, one in the last, and of the embeddings."""
        loss = loss_of(self._batch(model, self.ref_logps))
        loss.backward()
        layers = model.base_model.layers
        watched = {"d_first": layers[0].self_attn.q_proj.weight, "d_last": layers[-1].mlp.down_proj.weight}
        if self.case.trainable:
            watched["d_embeddings"] = model.get_output_embeddings().weight
        return {"loss": loss.detach()} | {name: weight.grad for name, weight in watched.items()}

    def call(self, provider: str) -> Callable[[], Results]:
        loss_of, optimizer = peers.provider(provider, "dpo", self.device).loss, self._optimizer

        def run() -> Results:
            optimizer.zero_grad()
            found = self._backward(loss_of, self.model)
            optimizer.step()
            return found

        return run

    @functools.cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        """One optimizer for all: its state is as large as two models."""
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    @functools.cached_property
    def _eager(self) -> tuple[Results, float]:
        """(gradients in fp64, the largest error of those in the model's dtype)"""
        eager, compacted = (peers.provider(name, "dpo", self.device).loss for name in ("eager", "eager_compacted"))
        exact = copy.deepcopy(self.model).double().train()
        # in fp64 attention keeps its scores: 93 GB for 1B parameters and 8,192 tokens, 2 GB a layer when recomputed
        exact.gradient_checkpointing_enable({"use_reentrant": False})
        wanted = self._backward(compacted, exact)
        del exact
        found = self._backward(eager, copy.deepcopy(self.model))
        return wanted, max(relative_error(found[name], value) for name, value in wanted.items())

    def truth(self, provider: str) -> Results:
        return self._eager[0]

    def limits(self, provider: str, truth: Results, results: Results) -> dict[str, float]:
        """What eager loses through all the layers in the same dtype, and the same again."""
        return dict.fromkeys(truth, FP32_LIMIT + ALLOWED * self._eager[1])


BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "small": [Case("tiny", 1, 16, FP32)],
    "quick": [Case("smollm2-135m, 4 layers", 1, 64, FP32)],
    "cpu": [Case("smollm2-135m", 2, 256, FP32, trainable) for trainable in (True, False)],
    "cuda": [
        *(Case("smollm2-135m", 16, 512, BF16, trainable) for trainable in (True, False)),
        *(Case("llama-3.2-1b", 4, 1024, BF16, trainable) for trainable in (True, False)),
    ],
}
SUITE = Suite("train", "Whole training steps: forward, DPO, backward, AdamW", TrainProblem, CASES)
