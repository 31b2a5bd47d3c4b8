"""Evaluates a policy or a reward model on held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fastpref.common import checks
from fastpref.data import encode, images
from fastpref.data.remarks import Remarks
from fastpref.objectives.reward import RewardHead
from fastpref.online import statistics
from fastpref.online.pairing import characters
from fastpref.online.sequences import PolicyScores, TokenSequence, pictured, policy_scores, rewards

SIDES = ("chosen", "rejected")
Pairs = Sequence[Mapping[str, Any]]
Kept = tuple[list[Mapping[str, Any]], list[TokenSequence]]


def evaluate_policy(
    model: Any, tokenizer: Any, pairs: Pairs, *, reference: Any = None, beta: float = 0.1,
    batch_size: int = 8, max_length: int | None = None, bins: int = 10, responses_as_written: bool = False,
    assistant_only_loss: bool = False, progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A language model's preferences between the responses of each pair.

    With a reference, a response's reward is DPO's implicit one, `beta * (logps - ref_logps)`. Without one it is `beta *
    logps`. A pair's margin is the chosen reward less the rejected one. The accuracy is the share of margins above 0.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        pairs: records with `prompt`, `chosen` and `rejected`, as messages or as text (see `fastpref.data.formats`).
        reference: the model that rewards are measured against, or None.
        beta: the scale of rewards.
        batch_size: sequences in one forward.
        max_length: responses are cut where a sequence has so many tokens. A pair is left out if its prompt alone has as
            many. None: never.
        bins: of the calibration.
        responses_as_written: as in training (see `fastpref.data.encode.part`).
        assistant_only_loss: as in training.
        progress: called with the number of sequences that each batch finished.

    Returns:
        JSON values. Besides what `evaluate_reward_model` gives: `logps`, of each side the mean of summed log-probs and
            the mean per token; `prefers_chosen`, how often the policy itself gives chosen the higher log-prob, summed
            or per token. With a reference `kl`, in nats per token and per sequence, of each side: `exact`, KL(policy ||
            reference) over the whole vocabulary at each prefix of the response; `k1` and `k3`, its estimates from the
            response's own tokens (Schulman). The policy did not sample the data: `exact` is the divergence at the
            data's prefixes, and `k1` and `k3`, which are unbiased for samples of the policy, may differ from it widely.

    Raises:
        ValueError: no pair is short enough, or the reference has another vocabulary.
    """
    checks.positive("beta", beta)
    options = {"responses_as_written": responses_as_written, "assistant_only_loss": assistant_only_loss}

    def of_pair(pair: dict[str, Any]) -> tuple[list[TokenSequence], int]:
        if images.checked_processor(pair, tokenizer):
            return pictured(pair, SIDES, tokenizer, **options), 0
        prompt, responses, found = encode.part(pair, SIDES, images.tokenizer_of(tokenizer), **options)
        return [TokenSequence(prompt, *response) for response in responses], found

    sequences = _encoded(pairs, of_pair)
    room = [
        max_length is None or max(len(s.prompt) for s in _two(sequences, i)) < max_length for i in range(len(pairs))
    ]
    kept, sequences = _kept(pairs, sequences, room, max_length)
    found = policy_scores(
        model, [s.cut(max_length) for s in sequences], tokenizer, reference=reference, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    reward = beta * (found.logps if found.ref_logps is None else found.logps - found.ref_logps)
    per_token = found.logps / found.tokens.clamp(min=1)
    return (
        {"kind": "policy", "beta": beta, "reference": reference is not None}
        | _of_rewards(reward, kept, len(pairs), bins)
        | {
            "logps": {
                side: {"sum": statistics.mean(found.logps[i::2]), "per_token": statistics.mean(per_token[i::2])}
                for i, side in enumerate(SIDES)
            },
            "prefers_chosen": {
                "sum": statistics.share(found.logps[0::2] > found.logps[1::2]),
                "per_token": statistics.share(per_token[0::2] > per_token[1::2]),
            },
            "kl": None if reference is None else {side: _kl(found, i) for i, side in enumerate(SIDES)},
        }
    )


def evaluate_reward_model(
    model: RewardHead, tokenizer: Any, pairs: Pairs, *, batch_size: int = 8, max_length: int | None = None,
    bins: int = 10, responses_as_written: bool = False, progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A reward model's preferences between the responses of each pair.

    Pairs with a sequence of more than `max_length` tokens are left out. The other arguments are as in
    `evaluate_policy`.

    Returns:
        JSON values: `pairs` and how many were `left_out`; `accuracy` with Wilson's 95 % interval and `ties`; `rewards`
            and `margins`; `calibration` of sigmoid(margin) (see `statistics.calibration`); `length_bias`, by the
            responses' lengths in characters.

    Raises:
        ValueError: no pair is short enough.
    """

    def of_pair(pair: dict[str, Any]) -> tuple[list[TokenSequence], int]:
        if images.checked_processor(pair, tokenizer):
            return pictured(pair, SIDES, tokenizer, responses_as_written=responses_as_written), 0
        text = images.tokenizer_of(tokenizer)
        sequences, found = encode.wholes(pair, text, responses_as_written=responses_as_written)
        return [TokenSequence([], ids) for ids in sequences], found

    sequences = _encoded(pairs, of_pair)
    room = [
        max_length is None or max(len(s.prompt + s.response) for s in _two(sequences, i)) <= max_length
        for i in range(len(pairs))
    ]
    kept, sequences = _kept(pairs, sequences, room, max_length)
    reward = rewards(model, sequences, tokenizer, batch_size=batch_size, progress=progress)
    return {"kind": "reward model"} | _of_rewards(reward, kept, len(pairs), bins)


def _encoded(pairs: Pairs, of_pair: Callable[[dict[str, Any]], tuple[list[TokenSequence], int]]) -> list[TokenSequence]:
    """The two sequences of each pair. Says what is odd about them.

    Raises:
        ValueError: names the pair that is wrong.
    """
    sequences, told = [], Remarks("evaluation")
    for i, pair in enumerate(pairs, 1):
        try:
            some, flags = of_pair(dict(pair))
        except ValueError as error:
            raise ValueError(f"pairs, record {i}: {error}") from None
        told.add(i, flags)
        sequences += some
    told.say()
    return sequences


def _two(sequences: Sequence[TokenSequence], pair: int) -> Sequence[TokenSequence]:
    return sequences[2 * pair : 2 * pair + 2]


def _kept(pairs: Pairs, sequences: Sequence[TokenSequence], room: Sequence[bool], max_length: int | None) -> Kept:
    kept = [i for i, fits in enumerate(room) if fits]
    if not kept:
        raise ValueError(f"max_length: got {max_length}, want more: none of {len(pairs)} pairs has room")
    return [pairs[i] for i in kept], [s for i in kept for s in _two(sequences, i)]


def _of_rewards(reward: Tensor, pairs: Pairs, given: int, bins: int) -> dict[str, Any]:
    """`reward` `[2 pairs]`: chosen, rejected, chosen, ..."""
    margins = (reward[0::2] - reward[1::2]).numpy()
    differences = [characters(p["chosen"]) - characters(p["rejected"]) for p in pairs]
    return {
        "pairs": len(pairs),
        "left_out": given - len(pairs),
        "accuracy": statistics.share(margins > 0),
        "ties": int((margins == 0).sum()),
        "rewards": {side: statistics.mean(reward[i::2]) for i, side in enumerate(SIDES)},
        "margins": {"mean": statistics.mean(margins), "quantiles": statistics.quantiles(margins)},
        "calibration": statistics.calibration(margins, bins),
        "length_bias": statistics.length_bias(margins, differences),
    }


def _kl(found: PolicyScores, side: int) -> dict[str, dict[str, float | None]]:
    assert found.ref_logps is not None and found.kl is not None and found.k3 is not None
    sums = {"exact": found.kl, "k1": found.logps - found.ref_logps, "k3": found.k3}
    tokens = float(found.tokens[side::2].sum())
    return {
        name: {
            "per_token": float(values[side::2].sum()) / tokens if tokens else None,
            "per_sequence": statistics.mean(values[side::2]),
        }
        for name, values in sums.items()
    }
