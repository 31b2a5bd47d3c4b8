"""`fastpref evaluate`: accuracy, margins, calibration, length bias and KL on held-out pairs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from fastpref.common.files import check_writable
from fastpref.online import evaluation, loading
from fastpref.online.command import Progress, at_least, command
from fastpref.online.prompts import load_pairs
from fastpref.online.records import write_json
from fastpref.online.text import interval, number, quantiles_text, share_text, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="PATH", help="a policy: a checkpoint or adapter, a hub id, or smollm2")
    model.add_argument("--reward-model", metavar="PATH", help="a sequence classifier with one label")
    add("--data", required=True, metavar="FILE", help="held-out pairs in any format that `fastpref train` reads")
    add("--reference", metavar="PATH", help="the policy's reference: DPO's rewards and the KL")
    add("--beta", type=at_least(float, 0, exclusive=True), default=0.1, help="of a policy's rewards (default: 0.1)")
    add("--batch-size", type=at_least(int, 1), default=8, help="sequences at once (default: %(default)s)")
    add("--max-length", type=at_least(int, 1), help="tokens of a sequence (default: all)")
    add("--responses-as-written", action="store_true", help="no chat template for responses, as in training with it")
    add("--assistant-only-loss", action="store_true", help="score the assistant's messages alone, with --model")
    add("--bins", type=at_least(int, 1), default=10, help="of the calibration (default: %(default)s)")
    add("--json", metavar="FILE", help="all figures")
    add("--plot", metavar="FILE.png", help="a reliability diagram")
    loading.add_machine_arguments(parser)


@command("evaluate")
def run(args: argparse.Namespace) -> int:
    if args.reward_model is not None and args.reference is not None:
        raise ValueError("--reference: got one with a reward model, want it with --model only")
    if args.reward_model is not None and args.assistant_only_loss:
        raise ValueError("--assistant-only-loss: got it with a reward model, which scores no tokens; want --model")
    for option in ("json", "plot"):
        check_writable(f"--{option}", getattr(args, option))
    pairs = load_pairs(args.data)
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("batch_size", "max_length", "bins", "responses_as_written")
    }
    with Progress(2 * len(pairs), "responses") as bar:
        options["progress"] = bar.update
        if args.reward_model is not None:
            reward_model, tokenizer = loading.load_reward_model(args.reward_model, args.device, args.dtype)
            found = evaluation.evaluate_reward_model(reward_model, tokenizer, pairs, **options)
        else:
            policy, tokenizer = loading.load_policy(args.model, args.device, args.dtype)
            reference = args.reference and loading.load_policy(args.reference, args.device, args.dtype)[0]
            found = evaluation.evaluate_policy(
                policy, tokenizer, pairs, reference=reference or None, beta=args.beta,
                assistant_only_loss=args.assistant_only_loss, **options,
            )  # fmt: skip
    print("\n".join(report_lines(found)))
    if args.json:
        write_json(args.json, found)
    if args.plot:
        from fastpref.online.plot import reliability_diagram

        reliability_diagram(found["calibration"], args.plot)
    return 0


def report_lines(found: Mapping[str, Any]) -> list[str]:
    """The evaluation as lines for a terminal."""
    rows = [("pairs", f"{found['pairs']}" + (f", {found['left_out']} left out" if found["left_out"] else ""))]
    rows += [("accuracy", _share(found["accuracy"]) + (f", {found['ties']} ties" if found["ties"] else ""))]
    rows += [
        ("margin", f"mean {found['margins']['mean']:+.4f}"),
        ("", quantiles_text(found["margins"]["quantiles"], "+.3f")),
        ("rewards", "  ".join(f"{side} {value:+.4f}" for side, value in found["rewards"].items())),
    ]
    if found["kind"] == "policy":
        rows += _policy_rows(found)
    calibration, length = found["calibration"], found["length_bias"]
    rows += [
        ("calibration of sigmoid(margin)", f"ECE {calibration['ece']:.4f}  Brier {calibration['brier']:.4f}  "
         f"log loss {calibration['log_loss']:.4f}"),
        *((f"  confidence {b['low']:.2f}-{b['high']:.2f}",
           f"{b['count']:5d} pairs  said {b['confidence']:6.1%}  right {b['accuracy']:6.1%} {interval(b)}")
          for b in calibration["bins"]),
        ("length: chosen is longer", f"{length['chosen_longer']:.1%}, by {length['mean_difference']:+.1f} characters"),
        ("  accuracy where it is longer", _share(length["accuracy_chosen_longer"])),
        ("  accuracy where it is shorter", _share(length["accuracy_chosen_shorter"])),
        ("  correlation with the margin", number(length["correlation"])),
    ]  # fmt: skip
    return table(rows)


def _policy_rows(found: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    rows = [
        (f"log-probs of {side}", f"{logps['sum']:.2f} summed, {logps['per_token']:.4f} per token")
        for side, logps in found["logps"].items()
    ]
    rows += [
        ("gives chosen more, summed", _share(found["prefers_chosen"]["sum"])),
        ("gives chosen more, per token", _share(found["prefers_chosen"]["per_token"])),
    ]
    for side, kl in (found["kl"] or {}).items():
        values = (f"{name} {number(v['per_token'], '.5f')}" for name, v in kl.items())
        rows.append((f"KL per token at {side}", "  ".join(values)))
    return rows


def _share(found: Mapping[str, Any]) -> str:
    return share_text(found, "- (no pairs)")
