"""What `fastpref train rloo` and `grpo` give their trainer besides: rewards by name, a sampler, and when to stop."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from fastpref.commands.train.judging import PREFIX, judge_reward
from fastpref.commands.train.options import OnlineOptions
from fastpref.commands.train.served import sampler_of
from fastpref.online.judges import function_scorer, load_function, reward_function
from fastpref.trainers.overoptimization import StopOveroptimization


def reward_of(spec: str) -> Any:
    """A function, or the name of a reward model, from how `--reward` names it.

    Raises:
        ValueError: there is no such function, or a judge's file is wrong.
        ServerError: a judge's server does not answer.
    """
    if spec.startswith(PREFIX):
        return judge_reward(spec.removeprefix(PREFIX))
    if ":" not in spec and not spec.endswith(".py"):
        return spec
    function = load_function(spec)
    if "completions" in inspect.signature(function).parameters:
        return function
    return reward_function(function_scorer(function), spec.rpartition(":")[2])


def online_arguments(options: OnlineOptions, args: Any) -> tuple[dict[str, Any], list[Any]]:
    """(arguments of the trainer, callbacks).

    Raises:
        ValueError: there is no reward, a rule to stop by lacks what it looks at, or an option of a server is wrong.
        ServerError: the server does not answer, or does not say which model to take.
    """
    if not options.reward:
        raise ValueError("--reward: got none, want a reward model, module:name or file.py:name")
    rewards, heldout = _all(options.reward), _all(options.heldout_reward or [])
    callbacks = []
    if options.stop_at_kl is not None:
        args.track_kl = True
    if options.stop_patience is not None and len(heldout) != 1:
        raise ValueError(f"--stop_patience: got it with {len(heldout)} of --heldout_reward, want one to look at")
    if options.stop_at_kl is not None or options.stop_patience is not None:
        callbacks.append(StopOveroptimization(options.stop_at_kl, options.stop_patience))
    sampler = sampler_of(options, args)
    return {"reward_funcs": rewards, "heldout_funcs": heldout or None, "sampler": sampler}, callbacks


def _all(specs: Sequence[str]) -> list[Any]:
    return [reward_of(spec) for spec in specs]
