import sys

from benchmarks.cli import main

if __name__ == "__main__":  # the processes that measure memory import this file
    sys.exit(main())
