"""Tile sizes of a GPU from its experiments record, as the file that the kernels read.

    python -m benchmarks.tune RECORD.json [--out kernels/fastpref_kernels/configs]

For each kernel it takes the fastest BLOCK and number of warps of the `rows` experiment. These replace the default's
tile sizes for long rows. Those for rows that stay in the L2 cache between two sweeps are kept. Kernels that the
experiment does not run keep their default, too.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref_kernels._launch import CONFIGS, config_name

from benchmarks import record

KERNELS = {
    "forward": "row_logprob", "forward + U": "row_logprob_u", "gradient": "row_gradient",
    "exact KL": "token_kl", "exact KL + K": "token_kl_k", "exact KL gradient": "token_kl_gradient",
}  # fmt: skip
GAIN = 0.98  # of the default's time: what is less than 2 % faster in one run may be noise


def table(found: record.Record) -> dict[str, Any]:
    """The contents of the file.

    Raises:
        ValueError: the record has no sweep of the row kernels on a GPU.
    """
    seconds: dict[str, dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
    for row in found["rows"]:
        swept = re.fullmatch(r"(.+), BLOCK (\d+) warps (\d+)", row["provider"]) if row["case"] == "rows" else None
        if swept:
            kernel = KERNELS[swept[1]]
            seconds[kernel][int(swept[2]), int(swept[3])] += statistics.median(row["seconds"])
    if not seconds or "gpu" not in found["machine"]:
        raise ValueError("record: got one without a sweep of row kernels on a GPU, want one of benchmarks.experiments")
    default = json.loads((CONFIGS / "default.json").read_text())
    name = found["machine"]["gpu"]["name"]
    contents = {"device": name, "source": record.file_name(found)}
    for kernel, measured in seconds.items():
        *kept, (_, *usual) = default[kernel]
        best = min(measured, key=measured.__getitem__)
        if tuple(usual) in measured and measured[best] > GAIN * measured[tuple(usual)]:
            best = tuple(usual)  # type: ignore[assignment]
        contents[kernel] = [*kept, [None, *best]]
    return contents


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, default=CONFIGS)
    args = parser.parse_args(argv)
    try:
        contents = table(record.read(args.record))
    except ValueError as error:
        print(f"benchmarks.tune: {error}", file=sys.stderr)
        return 2
    path = args.out / f"{config_name(contents['device'])}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
