"""How people train, as one table: every combination of what follows runs, or is in RULES with what happens instead.

Nothing heavy is imported here, so that documentation can be made from it:

    from tests.matrix.table import AXES, cells, outcome
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

AXES: dict[str, dict[str, str]] = {
    "host": {
        "patch": "TRL's trainers under the patch",
        "subclass": "the subclasses of TRL's trainers",
        "trainers": "fastpref.trainers",
        "mixin": "transformers.Trainer with PreferenceLossMixin",
        "loop": "a loop of one's own with batch_loss",
    },
    "precision": {
        "bf16": "bf16 autocast", "fp16": "fp16 autocast", "weights": "bf16 weights", "fp32": "fp32",
    },
    "trains": {
        "all": "all weights",
        "frozen": "all but the head",
        "lora": "LoRA",
        "qlora": "LoRA on a 4-bit base",
        "saved": "LoRA and the head (modules_to_save)",
        "continued": "an adapter that goes on",
    },
    "reference": {
        "online": "the policy as it was, in every step",
        "precomputed": "the policy as it was, log-probs computed before",
        "explicit": "another model",
        "synchronised": "moved towards the policy (TR-DPO)",
        "none": "none (SimPO)",
    },
    "layout": {"shared": "packed, a pair's prompt once", "packed": "packed", "padded": "padded"},
    "ranks": {"one": "one process", "ddp": "two ranks, DDP", "fsdp2": "two ranks, FSDP2"},
}  # fmt: skip

RUNS, REFUSED, HOST, ABSENT = "runs", "is refused", "runs as the host's own code", "does not exist"


class Cell(NamedTuple):
    host: str
    precision: str
    trains: str
    reference: str
    layout: str
    ranks: str

    def __str__(self) -> str:
        return "-".join(self)


class Outcome(NamedTuple):
    what: str  # RUNS, REFUSED (with an error), HOST (with a warning), ABSENT (there is nothing to call)
    text: str = ""  # in the error or the warning; why there is nothing


class Rule(NamedTuple):
    when: Mapping[str, str]  # axis -> values, separated by spaces
    outcome: Outcome

    def applies(self, cell: Cell) -> bool:
        return all(getattr(cell, axis) in values.split() for axis, values in self.when.items())


ADAPTED = "lora qlora saved continued"
TRL = "patch subclass"
SYNCHRONISED = "You passed `sync_ref_model=True` while using a PEFT model"
# the first that applies
RULES = [
    Rule({"host": "subclass", "reference": "none"},
         Outcome(ABSENT, "TRL's subclasses are DPO, KTO and Reward: reference-free methods run under the patch")),
    Rule({"host": "mixin loop", "layout": "shared packed"},
         Outcome(ABSENT, "batches of loops are padded: pair_batch")),
    Rule({"host": "mixin loop", "reference": "synchronised"},
         Outcome(ABSENT, "a loop moves its reference itself")),
    Rule({"host": "patch", "reference": "none", "layout": "shared packed"},
         Outcome(ABSENT, "CPO and ORPO under the patch keep TRL's padded batches")),
    Rule({"trains": "qlora", "ranks": "fsdp2"},
         Outcome(ABSENT, "FSDP2 does not shard 4-bit weights that are not stored as floats")),
    Rule({"host": TRL, "trains": ADAPTED, "reference": "synchronised"},
         Outcome(REFUSED, SYNCHRONISED)),
    Rule({"host": "trainers", "trains": ADAPTED, "reference": "synchronised"},
         Outcome(REFUSED, "sync_ref_model: got True with adapters")),
    Rule({"host": TRL, "reference": "online precomputed explicit synchronised", "ranks": "fsdp2",
          "layout": "shared packed"},
         Outcome(ABSENT, "TRL's own code, which runs there, pads")),
    Rule({"host": TRL, "reference": "online precomputed explicit synchronised", "ranks": "fsdp2"},
         Outcome(HOST, "is_fsdp_enabled: got True, want False")),
]  # fmt: skip


def cells() -> Iterator[Cell]:
    return itertools.starmap(Cell, itertools.product(*AXES.values()))


def outcome(cell: Cell) -> Outcome:
    return next((rule.outcome for rule in RULES if rule.applies(cell)), Outcome(RUNS))


def covering() -> list[Cell]:
    """Cells that can be tried and that hold every pair of values which some such cell holds: greedily, the cell with
    the most new pairs first."""
    possible = [cell for cell in cells() if outcome(cell).what != ABSENT]
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in possible}
    missing, found = set().union(*pairs.values()), []
    while missing:
        best = max(possible, key=lambda cell: len(pairs[cell] & missing))
        missing -= pairs[best]
        found.append(best)
    return found
