"""The `fastpref` command. Each subcommand has a module of its own, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name -> (module with add_arguments(parser) and run(args) -> exit status, one line of help)
COMMANDS = {
    "validate": ("fastpref.validate.scorecard", "check every operator against fp64 on this machine"),
    "bench": ("fastpref.commands.bench", "measure fastpref, eager PyTorch and the peers on this machine"),
    "demo": ("fastpref.commands.demo.run", "train a small language model on preference pairs with a fused DPO loss"),
    "train": ("fastpref.commands.train.entry", "train with any preference method, from files to a summary with plots"),
    "generate": ("fastpref.online.generate", "sample responses to prompts from a language model"),
    "score": ("fastpref.online.score", "score responses with a reward model or any Python function"),
    "judge": (
        "fastpref.online.judge",
        "let a language model judge which responses are better, and report on the judge",
    ),
    "pairs": ("fastpref.online.pairs", "make preference pairs of scored or ranked responses"),
    "hub": ("fastpref.commands.hub", "write the Triton kernels as a kernel of the Hugging Face Hub"),
    "evaluate": ("fastpref.online.evaluate", "evaluate a policy or a reward model on held-out pairs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastpref", description="Preference learning, fast and lean.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    argv = list(sys.argv[1:] if argv is None else argv)
    for name, (module, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if argv[:1] == [name]:  # the others' modules need not import
            importlib.import_module(module).add_arguments(sub)
    args = parser.parse_args(argv)
    return importlib.import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    sys.exit(main())
