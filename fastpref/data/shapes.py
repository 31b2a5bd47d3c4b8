"""A dozen small pairs about pictures, drawn here: a shape, a description that is right, and one that is wrong.

    python -m fastpref.data.shapes FOLDER

writes `FOLDER/pairs.jsonl` and one PNG a pair, in the format that `fastpref train` reads.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"red": (200, 30, 40), "green": (30, 150, 60), "blue": (40, 70, 200), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
QUESTION = "What is in the picture?"


def picture(shape: str, colour: str, size: int = 64, seed: int = 0) -> Any:
    """A PIL image, `size` times `size` pixels, of one shape on white. `seed` decides its place and how large it is.

    Raises:
        ValueError: the shape or the colour is not known.
    """
    from PIL import Image, ImageDraw

    if shape not in SHAPES or colour not in COLOURS:
        raise ValueError(f"shape, colour: got {shape!r}, {colour!r}; want of {SHAPES} and {tuple(COLOURS)}")
    numbers = random.Random(seed)
    width = numbers.randint(size // 3, size // 2)
    left, top = (numbers.randint(2, size - width - 2) for _ in range(2))
    right, bottom = left + width, top + width
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=COLOURS[colour])
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLOURS[colour])
    return image


def shape_pairs(number: int = 12, size: int = 64, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs as records: `images` (one PIL image), `prompt`, `chosen` and `rejected` as messages.

    Each combination of shape and colour comes once before one comes again. The rejected response has the wrong shape or
    the wrong colour, in turns.
    """
    numbers = random.Random(seed)
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    found: list[dict[str, Any]] = []
    for i in range(number):
        if i % len(kinds) == 0:
            numbers.shuffle(kinds)
        shape, colour = kinds[i % len(kinds)]
        other_shape = numbers.choice([s for s in SHAPES if s != shape])
        other_colour = numbers.choice([c for c in COLOURS if c != colour])
        wrong = (other_shape, colour) if i % 2 else (shape, other_colour)
        found.append({
            "images": [picture(shape, colour, size, seed + i)],
            "prompt": [{"role": "user", "content": QUESTION}],
            "chosen": [{"role": "assistant", "content": f"A {colour} {shape}."}],
            "rejected": [{"role": "assistant", "content": f"A {wrong[1]} {wrong[0]}."}],
        })  # fmt: skip
    return found


def write_shape_pairs(folder: str | Path, number: int = 12, size: int = 64, seed: int = 0) -> Path:
    """Writes `shape_pairs` into a folder: PNGs, and `pairs.jsonl` that names them. Returns the path of that file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, record in enumerate(shape_pairs(number, size, seed)):
        (image,) = record["images"]
        image.save(folder / f"{i:02d}.png")
        lines.append(json.dumps({**record, "images": [f"{i:02d}.png"]}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastpref.data.shapes", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--number", type=int, default=12, help="of pairs (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of a picture, in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    print(write_shape_pairs(args.folder, args.number, args.size, args.seed))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
