"""Compares the policies of `examples/rlhf_and_dpo.sh` on held-out prompts: reward model, truth, exact KL, length.

    python examples/rlhf_report.py FOLDER BASE_MODEL

Writes `report.json` and `reward-kl.png`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from fastpref.commands.train.plot import overoptimization
from fastpref.online import load_policy, read_records
from fastpref.online.sequences import TokenSequence, policy_scores

POLICIES = ("base", "rloo", "no-kl", "dpo")
CURVES = ("step", "reward", "heldout/liked/mean", "kl/exact", "kl/sampled", "beta", "completions/mean_length", "loss")


def exact_kl(folder: Path, base: Any, tokenizer: Any, records: list[dict[str, Any]]) -> float:
    """KL(policy || base) of the policy's own responses, exact at each token; the mean over responses, in nats."""
    policy, _ = load_policy(folder)
    sequences = [
        TokenSequence(
            tokenizer(record["prompt"])["input_ids"],
            tokenizer(response)["input_ids"] + [tokenizer.eos_token_id] * finished,
        )
        for record in records
        for response, finished in zip(record["responses"], record["finished"], strict=True)
    ]
    found = policy_scores(policy, sequences, tokenizer, reference=base, batch_size=64).kl
    assert found is not None
    return float(found.mean())


def main(folder: Path, model: str) -> None:
    base, tokenizer = load_policy(model)
    rows, runs = [], {}
    print(f"{'policy':8}{'reward model':>14}{'truth':>8}{'exact KL':>10}{'words':>8}")
    for name in POLICIES:
        records = read_records(folder / f"{name}-scores.jsonl")
        means = {
            judge: statistics.fmean(score for record in records for score in record["scores"][judge])
            for judge in ("reward", "truth")
        }
        kl = 0.0 if name == "base" else exact_kl(folder / name, base, tokenizer, records)
        words = statistics.fmean(len(text.split()) for r in records for text in r["responses"])
        rows.append({"policy": name, **means, "kl": kl, "words": words})
        print(f"{name:8}{means['reward']:14.3f}{means['truth']:8.3f}{kl:10.2f}{words:8.1f}")
        if name in ("rloo", "no-kl"):
            history = json.loads((folder / name / "training.json").read_text())["history"]
            runs[name] = [{k: e[k] for k in CURVES if k in e} for e in history if "kl/exact" in e]
    (folder / "report.json").write_text(json.dumps({"rows": rows, "runs": runs}, indent=1) + "\n")
    overoptimization({"exact KL in the reward": runs["rloo"], "no KL": runs["no-kl"]}, folder / "reward-kl.png")
    print(f"{folder}/report.json, {folder}/reward-kl.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
