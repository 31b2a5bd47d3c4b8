"""What each placement and estimator of the KL does to the gradient: bias and variance, without sampling.

    python -m benchmarks.kl_gradients [--json FILE]

A small Llama whose responses are few enough to go through all of them, in fp64 (but for its norms, which are fp32 in
transformers). So means and variances over responses are sums, and a bias of 0 is below 1e-6. Two gradients are wanted,
and they are not the same:

- `sequence`: of the KL of whole responses, KL(policy || reference) = E sum_t x_t, x_t the log-ratio of token t. It has
  two parts: a token changes the KL at its own place, and which places come later.
- `token`: of the first part alone, sum_t KL_t at places that are taken as given. That is what a term of the loss is
  about: arXiv 2510.01555 and 2512.21852 compare estimators by it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record

VOCABULARY, LENGTH, START = 5, 3, 0
DISTANCES = (0.05, 0.15, 0.4)  # noise on the reference's weights, relative to their own size
NONE = 1e-6  # a bias that is rounding
STALE = 0.15  # noise on the policy that sampled, for what is off-policy


class World(NamedTuple):
    """All responses: their probabilities and, for each of their tokens, what the estimators are made of, fp64."""

    policy: Tensor  # [Y] probability of a response
    sampler: Tensor  # [Y] by the policy that sampled
    x: Tensor  # [Y, T] log-ratio to the reference
    ratio: Tensor  # [Y, T] probability by the policy over that by the sampler
    gradients: Tensor  # [Y, T, P] of a token's log-prob
    kl: Tensor  # [Y, T] exact KL at the token's place
    kl_gradients: Tensor  # [Y, T, P] of that


def small_model(seed: int) -> LlamaForCausalLM:
    """A Llama of one layer, in fp64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def moved(model: LlamaForCausalLM, by: float, seed: int) -> LlamaForCausalLM:
    """A copy with noise on its weights."""
    found = small_model(0)
    found.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    for weight in found.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * by * weight.std())
    return found


def world(policy: LlamaForCausalLM, reference: LlamaForCausalLM, sampler: LlamaForCausalLM) -> World:
    """Everything about all responses of `LENGTH` tokens."""
    responses = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    ids = torch.cat([torch.full((len(responses), 1), START), responses], 1)
    log_p = policy(ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        log_q, log_m = (model(ids).logits[:, :-1].log_softmax(-1) for model in (reference, sampler))

    def taken(log_probs: Tensor) -> Tensor:
        return log_probs.gather(2, responses[..., None])[..., 0]

    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    own, parameters = taken(log_p), list(policy.parameters())
    return World(
        own.sum(1).exp().detach(), taken(log_m).sum(1).exp(), (own - taken(log_q)).detach(),
        (own - taken(log_m)).exp().detach(), jacobian(own, parameters), exact.detach(), jacobian(exact, parameters),
    )  # fmt: skip


def jacobian(values: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradients of `values` `[Y, T]`, flat: `[Y, T, P]`."""
    rows = []
    for value in values.flatten():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                               for g, p in zip(found, parameters, strict=True)]))  # fmt: skip
    return torch.stack(rows).view(*values.shape, -1)


def estimators(w: World) -> Iterator[tuple[str, str, str, Tensor]]:
    """(where it is sampled, placement, estimator, gradient of each response `[Y, P]`).

    In the reward, a response's KL is compared with the mean, as leave-one-out does with many samples.
    """
    score = w.gradients.sum(1)

    def in_reward(kl: Tensor, probability: Tensor) -> Tensor:
        total = kl.sum(1)
        return (total - (probability * total).sum())[:, None] * score

    def per_token(weight: Tensor) -> Tensor:
        return (weight[..., None] * w.gradients).sum(1)

    exact, k3 = w.kl_gradients.sum(1), torch.expm1(-w.x) + w.x
    yield "policy", "reward", "k1", in_reward(w.x, w.policy)
    yield "policy", "reward", "exact, by samples alone", in_reward(w.kl, w.policy)
    yield "policy", "reward", "exact", in_reward(w.kl, w.policy) + exact
    yield "policy", "loss", "k1", score
    yield "policy", "loss", "k2", per_token(w.x)
    yield "policy", "loss", "k3, unweighted", per_token(-torch.expm1(-w.x))
    yield "policy", "loss", "k3", per_token(k3 - torch.expm1(-w.x))
    yield "policy", "loss", "exact", exact
    yield "older policy", "loss", "k2, unweighted", per_token(w.x)
    yield "older policy", "loss", "k2", per_token(w.ratio * w.x)
    yield "older policy", "loss", "k3, unweighted", per_token(-torch.expm1(-w.x))
    yield "older policy", "loss", "k3", per_token(w.ratio * (k3 - torch.expm1(-w.x)))
    yield "older policy", "loss", "exact", exact


def mean(values: Tensor, probability: Tensor) -> Tensor:
    return (probability[:, None] * values).sum(0)


def measured(w: World) -> list[dict[str, Any]]:
    """Bias and standard deviation of one response's gradient, relative to the length of the gradient that is wanted."""
    later = w.x.flip(1).cumsum(1).flip(1)  # of a token and those after it
    whole = mean((later[..., None] * w.gradients).sum(1), w.policy)
    rows = []
    for sampled, placement, estimator, found in estimators(w):
        probability = w.policy if sampled == "policy" else w.sampler
        wanted = whole if placement == "reward" else mean(w.kl_gradients.sum(1), probability)
        average = mean(found, probability)
        variance = (probability * (found - average).square().sum(1)).sum()
        rows.append({
            "sampled": sampled, "placement": placement, "estimator": estimator,
            "bias": float((average - wanted).norm() / wanted.norm()),
            "cosine": float(average @ wanted / (average.norm() * wanted.norm()).clamp(min=1e-300)),
            "deviation": float(variance.sqrt() / wanted.norm()),
        })  # fmt: skip
    return rows


def study(distances: tuple[float, ...] = DISTANCES) -> list[dict[str, Any]]:
    """All estimators at all distances from the reference."""
    policy = small_model(1)
    rows = []
    for distance in distances:
        found = world(policy, moved(policy, distance, 2), moved(policy, STALE, 3))
        kl = float((found.policy * found.x.sum(1)).sum())
        rows += [{"noise": distance, "kl": kl, **row} for row in measured(found)]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The study as Markdown: bias and deviation at each KL."""
    kls = sorted({row["kl"] for row in rows})
    lines = ["| sampled by | KL in the | estimator | " + " | ".join(f"KL {kl:.2g} nats" for kl in kls) + " |"]
    lines.append("|---" * (3 + len(kls)) + "|")
    for name in dict.fromkeys((row["sampled"], row["placement"], row["estimator"]) for row in rows):
        some = sorted(
            (r for r in rows if (r["sampled"], r["placement"], r["estimator"]) == name), key=lambda r: r["kl"]
        )
        cells = [f"{'0' if r['bias'] < NONE else format(r['bias'], '.2g')} ± {r['deviation']:.2g}" for r in some]
        lines.append(f"| {' | '.join((*name, *cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kl_gradients", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="write the record to this file")
    args = parser.parse_args(argv)
    rows = study()
    print(table(rows))
    if args.json:
        settings = {"vocabulary": VOCABULARY, "length": LENGTH, "responses": VOCABULARY**LENGTH, "stale": STALE}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        record.write(record.new("kl-gradients", settings=settings, rows=rows), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
