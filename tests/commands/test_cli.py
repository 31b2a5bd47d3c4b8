"""`fastpref`: what starting it costs."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import contextlib, sys
from fastpref.commands import cli

with contextlib.suppress(SystemExit):
    cli.main(["--help"])
assert "torch" not in sys.modules
for name in ("generate", "score", "judge", "pairs", "evaluate"):
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
sys.exit(", ".join({"transformers", "datasets", "httpx2", "peft"} & sys.modules.keys()) or None)
"""


def test_help_waited_for_libraries_that_it_does_not_use() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert done.stdout.count("usage: fastpref") == 6
