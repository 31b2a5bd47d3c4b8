"""Four ranked responses to each of a few prompts, and all their pairs: real text for `benchmarks.trainers`.

    python -m benchmarks.rankings dpo_en_demo.json benchmarks/data/rankings.json      builds the file that is there

Prompts and the first two responses, chosen and rejected, are those of the public project hiyouga/LLaMA-Factory
(`data/dpo_en_demo.json`, Apache-2.0). The other two are sampled from SmolLM2-135M-Instruct (Apache-2.0), and rank last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

FILE = Path(__file__).parent / "data" / "rankings.json"
PROMPTS, SAMPLES, LONGEST_PROMPT, LONGEST_RESPONSE = 8, 2, 256, 256  # the latter in tokens


def all_pairs(rankings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair of every prompt's responses, which are ordered from the best to the worst."""
    return [
        {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}
        for ranking in rankings
        for chosen, rejected in itertools.combinations(ranking["responses"], 2)
    ]


def pairs_file(folder: Path) -> Path:
    """The pairs of `FILE` as a file of preference data."""
    target = folder / "all_pairs.json"
    target.write_text(json.dumps(all_pairs(json.loads(FILE.read_text()))))
    return target


def build(source: str) -> list[dict[str, Any]]:
    """Takes the first prompts that are short enough, and samples the last responses. Takes minutes on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpref import models
    from fastpref.data.files import load_records
    from fastpref.data.formats import paired

    folder = models.smollm2()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for pair in cast(Any, paired(load_records([source]))):
        ids: Any = tokenizer.apply_chat_template(
            pair["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = ids["input_ids"].shape[1]
        if length > LONGEST_PROMPT:
            continue
        sampled = model.generate(
            **ids, do_sample=True, max_new_tokens=LONGEST_RESPONSE, num_return_sequences=SAMPLES,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[:, length:]  # fmt: skip
        texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
        responses = [pair["chosen"], pair["rejected"]]
        responses += [[{"role": "assistant", "content": text.strip()}] for text in texts]
        found.append({"prompt": pair["prompt"], "responses": responses})
        print(f"{len(found)} of {PROMPTS}", flush=True)
        if len(found) == PROMPTS:
            break
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rankings", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="dpo_en_demo.json")
    parser.add_argument("output", type=Path)
    args = parser.parse_args(argv)
    args.output.write_text(json.dumps(build(args.source), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
