"""Runs `python -m benchmarks`."""

import signal
import sys

from benchmarks.cli import main

if __name__ == "__main__":  # the processes that measure memory import this file
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without one
    sys.exit(main())
