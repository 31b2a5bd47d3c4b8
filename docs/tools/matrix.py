"""What works with what: feature by host, each cell with the tests that show it (tests/docs checks that they exist)."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `tests`

from tests.matrix import table

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compatibility"
HOSTS = ("our trainers", "TRL, patched", "TRL, subclasses", "transformers mixin, plain loop")

TRAINERS, REFERENCE = "tests/trainers/test_trainers.py", "tests/trainers/test_reference.py"
DISTRIBUTED, AGAINST = "tests/trainers/test_distributed.py", "tests/trainers/test_against_trl.py"
PATCH, SUBCLASSES = "tests/integrations/test_trl_patch.py", "tests/integrations/test_trl_trainers.py"
LOOPS, ATTENTION = "tests/integrations/test_loops.py", "tests/models/test_attention.py"

NO = "not supported"  # refused with an error that says so
HOST = "the host's own"  # the host's code runs, on our head where it can
UNTRIED = ""  # no test

# feature -> what each host in HOSTS has: the test that shows it, or one of the words above
FEATURES: dict[str, tuple[str, str, str, str]] = {
    "losses and gradients are the host's": (
        f"{AGAINST}::test_losses_are_those_of_trl", f"{PATCH}::test_training_is_the_same",
        f"{SUBCLASSES}::test_training_is_the_same", f"{LOOPS}::test_an_update_is_that_of_a_loop_over_logits",
    ),
    "DPO's 15 loss types": (
        f"{AGAINST}::test_losses_are_those_of_trl", f"{PATCH}::test_twenty_steps_of_each_loss_type",
        f"{SUBCLASSES}::test_each_loss_type", UNTRIED,
    ),
    "KTO, unpaired losses": (
        f"{TRAINERS}::test_every_method_trains_and_names_its_metrics_as_trl", f"{PATCH}::test_training_is_the_same",
        f"{SUBCLASSES}::test_training_is_the_same", f"{LOOPS}::test_unpaired_losses",
    ),
    "no logits in memory": (
        f"{TRAINERS}::test_what_needs_logits", f"{PATCH}::test_no_logits_are_built",
        f"{SUBCLASSES}::test_products_and_packing_of_a_dpo_step",
        f"{LOOPS}::test_an_update_is_that_of_a_loop_over_logits",
    ),
    "a shared prompt runs once": (
        f"{ATTENTION}::test_shared_rows_are_the_separate_sequences", f"{PATCH}::test_products_of_a_dpo_step",
        f"{SUBCLASSES}::test_products_and_packing_of_a_dpo_step", NO,
    ),
    "LoRA": (
        f"{REFERENCE}::test_the_reference_is_the_model_without_adapters",
        f"{PATCH}::test_training_with_adapters_is_the_same", f"{SUBCLASSES}::test_training_with_adapters_is_the_same",
        f"{LOOPS}::test_adapters_off_are_the_reference",
    ),
    "an adapter that goes on": (
        f"{REFERENCE}::test_an_adapter_from_before_is_the_reference", UNTRIED,
        f"{SUBCLASSES}::test_a_peft_model_keeps_its_adapter_as_the_reference", UNTRIED,
    ),
    "a head in modules_to_save": (f"{REFERENCE}::test_a_trained_head_is_trained", UNTRIED, UNTRIED, UNTRIED),
    "reference log-probs on disk": (f"{REFERENCE}::test_a_second_run_does_no_reference_forward", HOST, HOST, NO),
    "reference in every step": (
        f"{REFERENCE}::test_an_online_reference_gives_the_same_losses", f"{PATCH}::test_training_is_the_same",
        f"{SUBCLASSES}::test_training_is_the_same", f"{LOOPS}::test_adapters_off_are_the_reference",
    ),
    "TR-DPO": (f"{REFERENCE}::test_tr_dpo_moves_the_reference", HOST, HOST, NO),
    "bf16 autocast": (
        f"{TRAINERS}::test_autocast_reaches_policy_and_reference", UNTRIED, UNTRIED,
        f"{LOOPS}::test_autocast_reaches_the_backbone",
    ),
    "a token budget": (f"{TRAINERS}::test_an_update_is_the_same_however_its_batch_is_split", NO, NO, NO),
    "resuming": (f"{TRAINERS}::test_a_resumed_run_is_the_run_that_was_not_interrupted", HOST, HOST, HOST),
    "streaming data": (f"{TRAINERS}::test_a_stream_of_examples", HOST, HOST, HOST),
    "two ranks, DDP": (
        f"{DISTRIBUTED}::test_two_ranks_are_one_process", f"{DISTRIBUTED}::test_the_patch_changes_nothing_on_two_ranks",
        UNTRIED, UNTRIED,
    ),
    "two ranks, FSDP2": (f"{DISTRIBUTED}::test_sharding_changes_nothing", UNTRIED, HOST, UNTRIED),
    "DeepSpeed ZeRO-2 and 3": (f"{DISTRIBUTED}::test_deepspeed", UNTRIED, HOST, UNTRIED),
}  # fmt: skip


def tests() -> set[str]:
    return {cell for cells in FEATURES.values() for cell in cells if "::" in cell}


def page() -> str:
    lines = ["| feature | " + " | ".join(HOSTS) + " |", "|---|" + "---|" * len(HOSTS)]
    notes: dict[str, int] = {}
    for feature, cells in FEATURES.items():
        lines.append(f"| {feature} | {' | '.join(_cell(cell, notes) for cell in cells)} |")
    tests = "\n".join(f"{number}. `{test}`" for test, number in notes.items())
    return (
        "# What works with what\n\n"
        "A **yes** has the number of a test that shows it, on a CPU, in the list below. *The host's own*: the host's "
        "code does it, on our head where it can. An empty cell is not tested. Nothing here has been tried on a GPU.\n\n"
        + "\n".join(lines)
        + "\n\n## The tests\n\n"
        + tests
        + f"\n\n## How people train\n\n{how_people_train()}\n\n{how_it_went()}\n"
        + f"\n## Versions\n\n{versions()}\n"
    )


def how_it_went() -> str:
    """What the last `make matrix` found, from its record."""
    found = json.loads((RECORDS / "matrix.json").read_text())
    total = Counter()
    for counts in found["cells"].values():
        total.update(counts)
    parts = [
        f"{table.AXES['ranks'][ranks]}: {sum(counts.values()):,} of {found['wanted'][ranks]:,}"
        for ranks, counts in found["cells"].items()
    ]
    words = {table.RUNS: "ran", table.REFUSED: "were refused with their message", table.HOST: "ran as the host's own"}
    outcomes = [f"{total[what]:,} {text}" for what, text in words.items()]
    half = found["half_precision"]
    return (
        f"On {found['date']} (commit {found['commit']}, torch {found['versions']['torch']}, {found['machine']['cpu']}) "
        f"{sum(total.values()):,} combinations were tried ({'; '.join(parts)}): {', '.join(outcomes)}, "
        f"{total['fault']} did otherwise than the table says. Over {half['cells']:,} in half precision our gradients' "
        f"error is {half['mean_ratio']:.2f} times the host's own (geometric mean)."
    )


def versions() -> str:
    """What was run with other versions than the pinned ones, from its record."""
    lines = [
        "| torch | triton | transformers | what ran | passed | skipped | failed | when | commit |",
        "|" + "---|" * 9,
    ]
    for run in json.loads((RECORDS / "versions.json").read_text()):
        columns = ("torch", "triton", "transformers", "what", "passed", "skipped", "failed", "date", "commit")
        lines.append("| " + " | ".join(str(run[column]) for column in columns) + " |")
    return "By hand, on a CPU, kernels in Triton's interpreter. CI has the pins of `constraints.txt`.\n\n" + "\n".join(
        lines
    )


def how_people_train() -> str:
    """The table that `make matrix` runs, a row a value: whether a host runs it, and what it says where it does not."""
    hosts = table.AXES["host"]
    all_cells, some = list(table.cells()), len(table.covering())
    runs = sum(table.outcome(cell).what == table.RUNS for cell in all_cells)
    lines = [
        f"Of the {len(all_cells):,} combinations of the rows below {runs:,} are to run. `make matrix` tries them all, "
        f"each against fp64 of the same model; CI tries {some} that hold every pair of values. A number leads to what "
        "happens instead in some of a row's combinations.",
        "",
        "| | " + " | ".join(hosts.values()) + " |",
        "|---|" + "---|" * len(hosts),
    ]
    notes: dict[str, int] = {}
    for axis, values in table.AXES.items():
        if axis != "host":
            for value, text in values.items():
                cells = [_of_host(all_cells, axis, value, host, notes) for host in hosts]
                lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items())])


def _of_host(cells: list[table.Cell], axis: str, value: str, host: str, notes: dict[str, int]) -> str:
    """Whether any of a host's combinations with the value runs, and the numbers of what belongs to this value alone."""
    mine = [cell for cell in cells if cell.host == host and getattr(cell, axis) == value]
    runs = any(table.outcome(cell).what == table.RUNS for cell in mine)
    rules = [rule for rule in table.RULES if axis in rule.when and any(rule.applies(cell) for cell in mine)]
    numbers = [_note(rule, notes) for rule in rules]
    marks = f" <sup>{', '.join(map(str, numbers))}</sup>" if numbers else ""
    return ("**yes**" if runs else "no") + marks


def _note(rule: table.Rule, notes: dict[str, int]) -> int:
    when = "; ".join(
        " or ".join(table.AXES[axis][value] for value in values.split())
        for axis, values in rule.when.items()
        if axis != "host"
    )
    text = f"{when}: {rule.outcome.what}" + (f" ({rule.outcome.text})" if rule.outcome.text else "")
    return notes.setdefault(text, len(notes) + 1)


def _cell(cell: str, notes: dict[str, int]) -> str:
    if "::" not in cell:
        return f"*{cell}*" if cell == HOST else cell
    return f"**yes** <sup>{notes.setdefault(cell, len(notes) + 1)}</sup>"
