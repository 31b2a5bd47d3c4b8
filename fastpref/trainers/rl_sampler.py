"""What online training wants of another sampler, and what it says of one."""

from __future__ import annotations

import warnings
from typing import Any

from fastpref.trainers.rollouts import Sampled


def say_what_it_samples_from(sampler: Any, corrected: bool) -> None:
    """Warns of a sampler that the policy is not brought to: what it gives is more and more another policy's."""
    if sampler is None or hasattr(sampler, "update"):
        return
    rest = (
        "its log-probs correct for that (vllm_importance_sampling_*), and the further the policy moves, the fewer "
        "responses are learnt from: look at sampling/importance_sampling_ratio/mean, which begins near 1"
        if corrected
        else "without vllm_importance_sampling_correction nothing corrects for that, and its responses are taken for "
        "the policy's"
    )
    warnings.warn(
        f"sampler: it samples from the weights that it holds, which training does not change (it has no `update`); "
        f"{rest}",
        stacklevel=3,
    )


def say_it_does_not_repeat(sampler: Any) -> None:
    """Warns, in a resumed run, of a sampler that does not promise the same responses."""
    if not getattr(sampler, "repeatable", True):
        warnings.warn(
            "resume_from_checkpoint: the sampler does not repeat itself, so what is sampled from here on is another "
            "sample than the stopped run's: the run goes on, but not to the bit",
            stacklevel=3,
        )


def checked_responses(found: list[Sampled], number: int, embeddings: Any) -> list[Sampled]:
    """What a sampler gave.

    Raises:
        ValueError: another number of responses, an empty one, tokens that the policy's `embeddings` do not have, or
            log-probs that are not one for each token.
    """
    if len(found) != number:
        raise ValueError(f"sampler: got {len(found)} responses, want {number}")
    for i, response in enumerate(found):
        if not response.ids:
            got = "no token ids" if response.ids is None else "an empty list of token ids"
            raise ValueError(
                f"sampler: got {got} in response {i}, want those that were sampled (`ids=True` of a server)"
            )
        if not 0 <= min(response.ids) <= max(response.ids) < len(embeddings.weight):
            raise ValueError(
                f"sampler: got tokens from {min(response.ids)} to {max(response.ids)} in response {i}, want them from "
                f"0 to {len(embeddings.weight) - 1}: it has to use the policy's tokenizer"
            )
        if response.logps is not None and len(response.logps) != len(response.ids):
            raise ValueError(
                f"sampler: got {len(response.logps)} log-probs in response {i}, want {len(response.ids)}, one a token"
            )
    return found
