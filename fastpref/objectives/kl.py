"""KL penalties against a reference model: sampled estimates, penalised rewards, exact divergences, controllers.

The reference is a constant everywhere: no gradient reaches it. Results are fp32, or fp64 where an input is fp64.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastpref import ops
from fastpref.common import checks
from fastpref.common.precision import wide
from fastpref.objectives.head_inputs import HeadOptions, ScoredRows, choose_plan, head_inputs, operator_options
from fastpref.objectives.tokens import rows_of_logits
from fastpref.reference import DIVERGENCES, KL_ESTIMATORS


def _widened(*values: Tensor) -> list[Tensor]:
    """All in fp64 if one is, else in fp32; contiguous."""
    dtype = wide(functools.reduce(torch.promote_types, (v.dtype for v in values)))
    return [v.to(dtype).contiguous() for v in values]


def _check_logps(logps: Tensor, ref_logps: Tensor) -> None:
    checks.tensor("logps", logps, dtypes=checks.FLOATS)
    checks.tensor("ref_logps", ref_logps, dtypes=checks.FLOATS)
    checks.shape("ref_logps", ref_logps, logps.shape, "the shape of logps")
    checks.same_device("ref_logps", ref_logps, "logps", logps)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) estimated at each token that the policy sampled, from its two log-probs.

    With x = logps - ref_logps (Schulman, joschu.net/blog/kl-approx.html):

    | estimator | value | gradient in logps | its mean over the policy's samples |
    |---|---|---|---|
    | `"k1"` | x | 1 | the KL; the gradient's mean is 0: a penalty on rewards, not a loss |
    | `"k2"` | x^2 / 2 | x | biased, low variance; as a loss, the gradient of the KL |
    | `"k3"` | exp(-x) - 1 + x | 1 - exp(-x) | the KL, never negative; as a loss, the gradient of the forward KL |
    | `"abs"` | \\|x\\| | sign(x) | an upper bound |

    Args:
        logps, ref_logps: natural-log probabilities of one shape, any float dtypes.
        estimator: a name from the table.

    Returns:
        Nats of the same shape, fp32 (fp64 if an input is), differentiable once in `logps` alone.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or estimator.
    """
    _check_logps(logps, ref_logps)
    checks.choice("estimator", estimator, KL_ESTIMATORS)
    wide, ref = _widened(logps, ref_logps.detach())
    kl, _ = torch.ops.fastpref.kl_estimate(wide.view(-1), ref.view(-1), estimator)
    return kl.view(logps.shape)


class PenalizedRewards(NamedTuple):
    """What `kl_penalized_rewards` returns with `return_sums`: every token's reward, and each sequence's total.

    The total is the sequence's score minus its summed penalty.
    """

    rewards: Tensor  # [S, T]
    sums: Tensor  # [S]


@overload
def kl_penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float, estimator: str = ...,
    *, return_sums: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def kl_penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float, estimator: str = ...,
    *, return_sums: Literal[True],
) -> PenalizedRewards: ...  # fmt: skip
def kl_penalized_rewards(
    scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float, estimator: str = "k1",
    *, return_sums: bool = False,
) -> Tensor | PenalizedRewards:  # fmt: skip
    """The reward of RLHF, R = r - beta KL (InstructGPT, arXiv 2203.02155, eq. 2), token by token and in one pass.

    Args:
        scores: `[S]`, the reward model's score of each sequence.
        logps, ref_logps: `[S, T]` log-probs of the sampled tokens. Values where `mask` is 0 are never used.
        mask: `[S, T]`, the scored tokens: bool, or 0 and 1 in any dtype.
        beta: the weight of the penalty, at least 0.
        estimator: see `kl_estimate`.
        return_sums: return `PenalizedRewards(rewards, sums)`, with the sums `[S]` from the same pass.

    Returns:
        `[S, T]`: -beta * KL at scored tokens, plus the sequence's score at its last one; 0 elsewhere. It is fp32 (fp64
        if an input is), and differentiable once in `scores` and `logps`. A sequence without scored tokens took no
        action: its rewards are 0, and its score is in `sums` alone (`sums` is always score - beta * KL).

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, beta or estimator.
    """
    checks.tensor("scores", scores, dtypes=checks.FLOATS, ndim=(1,))
    checks.tensor("logps", logps, dtypes=checks.FLOATS, ndim=(2,))
    _check_logps(logps, ref_logps)
    checks.shape("scores", scores, logps.shape[:1], "one per sequence")
    checks.same_device("scores", scores, "logps", logps)
    mask = checks.mask("mask", mask, tuple(logps.shape), "the shape of logps", "logps", logps)
    checks.within("beta", beta, 0, math.inf)
    checks.choice("estimator", estimator, KL_ESTIMATORS)
    r, p, q = _widened(scores, logps, ref_logps.detach())
    # on the device, so that a new beta (AdaptiveKLController) compiles nothing again
    weight = torch.full((), float(beta), dtype=p.dtype, device=p.device)
    out = PenalizedRewards(*torch.ops.fastpref.kl_penalized_rewards(r, p, q, mask.contiguous(), weight, estimator))
    return out if return_sums else out.rewards


def token_kl(
    policy_logits: Tensor,
    ref_logits: Tensor,
    direction: str = "reverse",
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The exact divergence of every row over the whole vocabulary: KL or generalised Jensen-Shannon.

    KL is sum_v p_v log(p_v / q_v) (Kullback & Leibler 1951). With the mixture m = beta * reference + (1 - beta) *
    policy, the generalised Jensen-Shannon divergence is beta * KL(reference || m) + (1 - beta) * KL(policy || m)
    (Agarwal et al. 2024, arXiv 2306.13649, eq. 1). It is never above log 2.

    Args:
        policy_logits, ref_logits: `[..., V]`, any float dtypes. Strided views such as `logits[:, :-1]` are read in
            place. Both go through `softcap * tanh(logits * logit_scale / softcap) / temperature`.
        direction: `"reverse"`, KL(policy || reference), the penalty of RLHF; `"forward"`, KL(reference || policy); or
            `"jsd"`, between both.
        beta: the reference's weight in the mixture of `"jsd"`, between 0 and 1. Divided by beta, the divergence goes to
            the forward KL as beta goes to 0; divided by 1 - beta, to the reverse KL as beta goes to 1.
        mask: `[...]`, bool or 0 and 1 in any dtype. Rows where it is 0 give exactly 0 and get exactly 0 gradient.

    Returns:
        `[...]` nats, fp32 (fp64 if an input is), differentiable once in `policy_logits` with any upstream gradient.
        Both logits are read once (for `"jsd"` twice). The backward reads them once more and writes the gradient. In a
        KL a token that only the second distribution excludes (logit -inf) gives inf. One that the first excludes, or
        whose probability underflows there, gives 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or option.
    """
    checks.tensor("policy_logits", policy_logits, dtypes=checks.FLOATS)
    checks.tensor("ref_logits", ref_logits, dtypes=checks.FLOATS)
    if policy_logits.ndim == 0 or policy_logits.shape[-1] == 0:
        raise ValueError(f"policy_logits: got shape {tuple(policy_logits.shape)}, want [..., V] with V >= 1")
    checks.shape("ref_logits", ref_logits, policy_logits.shape, "the shape of policy_logits")
    checks.same_device("ref_logits", ref_logits, "policy_logits", policy_logits)
    if mask is not None:
        rows = tuple(policy_logits.shape[:-1])
        mask = checks.mask("mask", mask, rows, "one per row of logits", "policy_logits", policy_logits).reshape(-1)
    _check_divergence(direction, beta)
    checks.transform(temperature, logit_scale, softcap)
    kl, *_ = torch.ops.fastpref.token_kl(
        rows_of_logits(policy_logits), rows_of_logits(ref_logits.detach()), mask, direction,
        *HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap).transform, float(beta),
    )  # fmt: skip
    return kl.view(policy_logits.shape[:-1])


def _check_divergence(direction: str, beta: float) -> None:
    checks.choice("direction", direction, DIVERGENCES)
    if direction == "jsd":
        checks.positive("beta", beta)
        checks.within("beta", beta, 0, 1)


class TokenKL(NamedTuple):
    """What `linear_token_kl` returns, each shaped like the rows: divergence, and both models' log-probs of the labels.

    The log-probs are detached. They are None without labels.
    """

    kl: Tensor
    logps: Tensor | None
    ref_logps: Tensor | None


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    direction: str = "reverse",
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    scored_rows: ScoredRows = None,
) -> TokenKL:
    """`token_kl(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias)` without the logits in memory.

    Args:
        hidden, ref_hidden: `[..., d]` and `[..., d_ref]`.
        weight, ref_weight: `[V, d]` and `[V, d_ref]`.
        bias, ref_bias: `[V]` or None.
        labels: `[...]` the sampled tokens, or None for the divergence alone on every row. With labels the result has
            their log-probs under both models, from the same sweep.
        direction, beta: `"reverse"`, `"forward"` or `"jsd"` with its beta, as in `token_kl`.
        ignore_index: rows with this label never enter a product, give exactly 0 and get exactly 0 gradient.
        plan: as in `linear_token_logprobs`: 2 products without gradients, 3 with a frozen head, 4 with a trainable
            one (`"store"`), 6 where what that keeps would not fit (`"recompute"`).
        workspace_bytes, scored_rows: as in `linear_token_logprobs`.

    Returns:
        `TokenKL(kl, logps, ref_logps)`, fp32 (fp64 if an input is). `kl` is differentiable once in `hidden`, `weight`
        and `bias`. From inputs in half precision the log-probs are those of `linear_token_logprobs`: the label's logit
        is recomputed in fp32. The divergence is that of the rounded logits, since its terms depend on every token.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device, plan or option, or a label out of range (see
            `token_logprobs`).
    """
    _check_divergence(direction, beta)
    given = labels
    if labels is None:
        checks.tensor("hidden", hidden, dtypes=checks.FLOATS)
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        ignore_index, scored_rows = -100, labels.numel()
    options = HeadOptions(ignore_index, temperature, logit_scale, softcap, plan, workspace_bytes, scored_rows)
    inputs = head_inputs(hidden, weight, labels, bias, options)
    ref = reference_inputs(hidden, weight, ref_hidden, ref_weight, ref_bias)
    choice = choose_plan(inputs, options)
    kl, logps, ref_logps, *_ = torch.ops.fastpref.linear_token_kl(
        inputs.hidden, inputs.weight, ref[0], ref[1], None if given is None else inputs.labels, inputs.bias, ref[2],
        direction, *operator_options(options), choice.plan, choice.workspace_bytes, inputs.compute_weight,
        None if given is None else choice.known.rows, float(beta),
    )  # fmt: skip
    shape = labels.shape
    if given is None:
        return TokenKL(kl.view(shape), None, None)
    return TokenKL(kl.view(shape), logps.view(shape), ref_logps.view(shape))


def reference_inputs(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference's hidden states, weight and bias: detached, and else as `head_inputs` does with the policy's."""
    checks.tensor("ref_hidden", ref_hidden, dtypes=checks.FLOATS)
    checks.tensor("ref_weight", ref_weight, dtypes=checks.FLOATS, ndim=(2,))
    checks.shape("ref_weight", ref_weight, (weight.shape[0], ref_weight.shape[1]), "the vocabulary of weight")
    checks.shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_weight.shape[1]), "the rows of hidden")
    values = [("ref_hidden", ref_hidden), ("ref_weight", ref_weight)]
    if ref_bias is not None:
        checks.tensor("ref_bias", ref_bias, dtypes=checks.FLOATS)
        checks.shape("ref_bias", ref_bias, weight.shape[:1], "[V]")
        values.append(("ref_bias", ref_bias))
    device = hidden.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    ready = []
    for name, value in values:
        checks.same_device(name, value, "hidden", hidden)
        ready.append(value.detach() if cast is None else value.detach().to(cast))
    for (name, _), value in zip(values[1:], ready[1:], strict=True):
        checks.same_dtype(name, value, "ref_hidden", ready[0])
    return ready[0].reshape(-1, ref_hidden.shape[-1]), ready[1], ready[2] if ref_bias is not None else None


class FixedKLController:
    """A constant `beta`, the weight of a KL penalty, with the interface of `AdaptiveKLController`.

    Args:
        beta: at least 0.
    """

    def __init__(self, beta: float) -> None:
        checks.within("beta", beta, 0, math.inf)
        self.beta = float(beta)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """Return beta, which stays as it is."""
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """`{"beta": ...}`, for checkpoints."""
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        checks.within("beta", state["beta"], 0, math.inf)
        self.beta = float(state["beta"])


class AdaptiveKLController:
    """Steers the KL towards `target` by changing `beta`, the weight of the penalty, in proportion to the error.

    As in Ziegler et al. 2019, arXiv 1909.08593, section 2.2, in the form of their code (lm-human-preferences):

        beta *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon

    Args:
        init_beta: the first beta, greater than 0.
        target: the wanted KL of a sequence, in nats.
        horizon: sequences over which a KL 20 % or more off target changes beta by about 20 %.
    """

    def __init__(self, init_beta: float, target: float, horizon: float) -> None:
        checks.positive("init_beta", init_beta)
        checks.positive("target", target)
        checks.positive("horizon", horizon)
        self.beta, self.target, self.horizon = float(init_beta), float(target), float(horizon)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """Change beta after `n_steps` sequences, and return it.

        Args:
            kl: the mean KL of these sequences, in nats. A tensor on an accelerator costs a host sync.
            n_steps: how many sequences there were since the last update.

        Raises:
            ValueError: `kl` is not finite, or so many steps would make beta vanish.
        """
        kl = float(kl)
        if not math.isfinite(kl):
            raise ValueError(f"kl: got {kl}, want a finite number")
        checks.positive("n_steps", n_steps)
        if n_steps >= 5 * self.horizon:
            raise ValueError(
                f"n_steps: got {n_steps}, want less than 5 * horizon = {5 * self.horizon:g}: beta would vanish"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n_steps / self.horizon
        return self.beta

    def state_dict(self) -> dict[str, Any]:
        """beta, target and horizon, for checkpoints."""
        return {"beta": self.beta, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name in ("beta", "target", "horizon"):
            checks.positive(name, state[name])
        self.beta, self.target, self.horizon = (float(state[name]) for name in ("beta", "target", "horizon"))


# `ops` registers the operators that torch.ops.fastpref finds.
_ = ops
