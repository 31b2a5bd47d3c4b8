"""Makes the record of a run of `examples/rlhf_and_dpo.sh`: what its policies came to, and every step of two of them.

python -m benchmarks.rlhf FOLDER [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks import record

FOLDER = record.ROOT / "benchmarks" / "results" / "rlhf"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rlhf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the example's output")
    parser.add_argument("--json", type=Path, default=FOLDER / "rlhf-and-dpo.json", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    found = json.loads((args.folder / "report.json").read_text())
    runs = {name: json.loads((args.folder / name / "training.json").read_text()) for name in ("rloo", "no-kl", "dpo")}
    settings = json.dumps({name: run["changed"] for name, run in runs.items()})
    for folder in (args.folder.resolve(), record.ROOT):  # no paths of this machine
        settings = settings.replace(f"{folder}/", "")
    new = record.new("rlhf-and-dpo", settings=json.loads(settings), rows=found["rows"])
    record.write(new | {"runs": found["runs"]}, args.json)
    shutil.copy(args.folder / "reward-kl.png", args.json.with_suffix(".png"))
    print(f"{args.json}, {args.json.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
