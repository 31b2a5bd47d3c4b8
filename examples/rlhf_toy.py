"""What `examples/rlhf_and_dpo.sh` runs on by default: a tiny language, a tiny model of it, and people who like it.

    python examples/rlhf_toy.py FOLDER

The model lists things that it knows, and stops after each with a probability of one in six. People like lists of ten
things or more, and are bored by more than twenty. Nearly all lists of the model are short of that, so that in their
preferences longer is better: a reward model cannot know more. That is how a reward gets exploited by length.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from fastpref import models
from fastpref.data.batches import padded

THINGS = (
    "apples", "bread", "cheese", "dates", "eggs", "figs", "grapes", "honey", "ice", "jam", "kale", "lemons", "milk",
    "nuts", "olives", "peas", "rice", "salt", "tea",
)  # fmt: skip
PLACES = ("market", "garden", "kitchen", "harbour", "village", "station", "school", "forest", "island", "castle")
STOP, MOST = 1 / 6, 32  # things in a list
ENOUGH, BORING = 10, 20
STEPS, BATCH = 400, 32


def prompt(place: str, number: int) -> str:
    """A request that the model answers."""
    return f"{number} from the {place}:"


def words(source: random.Random) -> str:
    """A list as the model learns it."""
    found = [source.choice(THINGS)]
    while source.random() > STOP and len(found) < MOST:
        found.append(source.choice(THINGS))
    return "".join(f" {word}" for word in found)


def liked(prompt: str, responses: list[str]) -> list[float]:
    """How much people like each response: 1 for `ENOUGH` things up to `BORING`, else less. The truth in this toy."""
    lengths = [len(response.split()) for response in responses]
    return [min(n, ENOUGH) / ENOUGH - max(0, n - BORING) / BORING for n in lengths]


def base_model(seed: int = 0) -> tuple[torch.nn.Module, object]:
    """A model that was trained on such lists, and its tokenizer."""
    source = random.Random(seed)
    model, tokenizer = models.tiny([prompt(place, 10) + words(source) for place in PLACES for _ in range(40)], seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(STEPS):
        texts = [prompt(source.choice(PLACES), source.randrange(100)) + words(source) for _ in range(BATCH)]
        rows = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        ids, mask = padded(rows, tokenizer.pad_token_id, "right")
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"  base model: step {step + 1}, loss {loss.item():.3f}", flush=True)
    return model, tokenizer


def main(folder: str) -> None:
    out, source = Path(folder), random.Random(1)
    out.mkdir(parents=True, exist_ok=True)
    for name, number in (("prompts", 128), ("heldout", 64)):
        lines = [json.dumps({"prompt": prompt(source.choice(PLACES), source.randrange(100))}) for _ in range(number)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for part in base_model():
        part.save_pretrained(out / "base")  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1])
