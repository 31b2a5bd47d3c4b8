"""Runs `python -m benchmarks`."""

import sys

from benchmarks.cli import main
from benchmarks.suite import take_interrupts

if __name__ == "__main__":  # the processes that measure memory import this file
    take_interrupts()
    sys.exit(main())
