"""`fastpref score`: scores of responses, into a file. A run that was stopped can be continued."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

from fastpref.common.files import check_writable
from fastpref.data.remarks import Remarks
from fastpref.online import judges, loading
from fastpref.online.command import Progress, at_least, command
from fastpref.online.judges import Scorer
from fastpref.online.prompts import checked_prompt, checked_responses
from fastpref.online.records import Journal, Record, fingerprint, read_records
from fastpref.online.sequences import PicturedSequence, sequences_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--responses", required=True, metavar="IN.jsonl", help="records with a prompt and its responses")
    add("--output", required=True, metavar="OUT.jsonl", help="the same with scores; continued if it exists")
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--reward-model", metavar="PATH", help="a sequence classifier with one label")
    judge.add_argument(
        "--function", metavar="WHERE:NAME", help="module:name or file.py:name, (prompt, responses) -> list of numbers"
    )
    judge.add_argument("--implicit", action="store_true", help="beta log(policy / reference), of --model, --reference")
    add("--model", metavar="PATH", help="the policy of --implicit")
    add("--reference", metavar="PATH", help="the reference of --implicit")
    add("--beta", type=at_least(float, 0, exclusive=True), default=0.1, help="of --implicit (default: %(default)s)")
    add("--name", help="what to call these scores; with names, several judges' scores go together")
    add("--workers", type=at_least(int, 1), default=1, help="threads that call the function (default: %(default)s)")
    add("--batch-size", type=at_least(int, 1), default=8, help="sequences at once (default: %(default)s)")
    add("--max-length", type=at_least(int, 1), help="tokens of a sequence that a model reads (default: all)")
    add("--responses-as-written", action="store_true", help="no chat template for responses, as in training with it")
    add("--overwrite", action="store_true", help="begin anew where OUT.jsonl exists")
    loading.add_machine_arguments(parser)


@command("score")
def run(args: argparse.Namespace) -> int:
    check_writable("--output", args.output)
    records = read_records(args.responses)
    scorer, settings = _scorer(args, records)
    done = score_file(records, args.output, scorer, settings, name=args.name, overwrite=args.overwrite, progress=True)
    print(f"{args.output}: {done} prompts scored now, {len(records)} in all")
    return 0


def _scorer(args: argparse.Namespace, records: Sequence[Record]) -> tuple[Scorer, dict[str, Any]]:
    """The scorer, and what its scores of the records depend on."""
    written = args.responses_as_written
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "responses_as_written": written}
    if args.function is not None:
        function = judges.load_function(args.function)
        return judges.function_scorer(function, args.workers), {"function": args.function}
    if args.reward_model is not None:
        model, tokenizer = loading.load_reward_model(args.reward_model, args.device, args.dtype)
        settings = {"reward_model": loading.fingerprint(model), "max_length": args.max_length}
        settings["tokens"] = _fingerprint(records, tokenizer, written)
        return judges.reward_model_scorer(model, tokenizer, **options), settings
    if args.model is None or args.reference is None:
        raise ValueError("--implicit: got no --model or no --reference, want both")
    policy, tokenizer = loading.load_policy(args.model, args.device, args.dtype)
    reference, _ = loading.load_policy(args.reference, args.device, args.dtype)
    settings = {
        "implicit": [loading.fingerprint(policy), loading.fingerprint(reference)],
        "beta": args.beta,
        "max_length": args.max_length,
        "tokens": _fingerprint(records, tokenizer, written),
    }
    return judges.implicit_reward_scorer(policy, reference, tokenizer, args.beta, **options), settings


def _fingerprint(records: Sequence[Record], tokenizer: Any, responses_as_written: bool) -> str:
    """A hash of what tokenizer and template make of the records. Says what is odd about it."""
    from fastpref.data.reference_cache import Fingerprint

    found, told = Fingerprint(), Remarks("score")
    for i, record in enumerate(records, 1):
        checked_prompt(record, f"record {i}")
        checked_responses(record, f"record {i}")
        try:
            sequences, flags = sequences_of(record, tokenizer, responses_as_written=responses_as_written)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from None
        told.add(i, flags)
        for sequence in sequences:
            pictures = {"pixels": sequence.record["pixels"]} if isinstance(sequence, PicturedSequence) else {}
            found.rows([sequence._asdict() | pictures], ("prompt", "response", *pictures))
    told.say()
    return found.hexdigest()


def score_records(
    records: Sequence[Mapping[str, Any]], scorer: Scorer, *, name: str | None = None, start: int = 0
) -> Generator[Record]:
    """Yields each record from `start` on with `scores`: a list, one number (or None: no opinion) for each response.

    Args:
        records: each with `prompt` and `responses`.
        scorer: see `fastpref.online.judges`.
        name: makes `scores` an object of named lists, beside those that are there.
        start: index of the first record.

    Raises:
        ValueError: a record is none, already has scores, or the scorer failed on it. The scorer has to give one finite
            number or None for each response. The message names the record.
    """
    for i, record in enumerate(records, 1):
        checked_prompt(record, f"record {i}")
        checked_responses(record, f"record {i}")
        check_free(record, name, f"record {i}")
    found = scorer(records, start)
    try:
        for i in range(start, len(records)):
            where = f"record {i + 1}"
            try:
                scores = next(found)
            except StopIteration:
                raise ValueError(f"{where}: got no scores, want one list for each of {len(records)} records") from None
            except Exception as error:
                raise ValueError(f"{where}: the judge raised {type(error).__name__}: {error}") from error
            yield with_scores(records[i], _checked_scores(scores, len(records[i]["responses"]), where), name)
    finally:  # its threads and connections end here, not when it is collected, which may be in any thread
        if isinstance(found, Generator):
            found.close()


def with_scores(record: Mapping[str, Any], scores: list[float | None], name: str | None) -> Record:
    """The record with these scores; with a name beside those that are there."""
    return {**record, "scores": scores if name is None else {**(record.get("scores") or {}), name: scores}}


def check_free(record: Mapping[str, Any], name: str | None, where: str) -> None:
    """Refuses a record that has scores already where new ones would go.

    Raises:
        ValueError: it has.
    """
    old = record.get("scores")
    if name is None and old is not None:
        raise ValueError(f"{where}: got scores already, want a name (--name) for scores beside them")
    if name is not None and old is not None and not isinstance(old, dict):
        raise ValueError(f"{where}: got scores without a name, want named ones to put {name!r} beside")
    if name is not None and name in (old or {}):
        raise ValueError(f"{where}: got scores named {name!r} already, want another name")


def _checked_scores(scores: Any, count: int, where: str) -> list[float | None]:
    try:
        found = [None if s is None else float(s) for s in scores]
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the judge gave {scores!r}, want {count} numbers") from None
    if len(found) != count:
        raise ValueError(f"{where}: the judge gave {len(found)} scores, want {count}, one per response")
    bad = [i for i, s in enumerate(found) if s is not None and not math.isfinite(s)]
    if bad:
        raise ValueError(
            f"{where}: the judge gave {found[bad[0]]} to response {bad[0] + 1}, want a finite number or None"
        )
    return found


def score_file(
    records: Sequence[Mapping[str, Any]], output: str | os.PathLike[str], scorer: Scorer,
    settings: Mapping[str, Any] | None = None, *, name: str | None = None, overwrite: bool = False,
    progress: bool = False,
) -> int:  # fmt: skip
    """Writes the records with their scores as JSON lines. Returns how many this call scored.

    A record is on the disk before the next one is asked for, so a judge that fails loses nothing. Call again to go on
    with the record on which it failed. A file that is complete is left alone.

    Args:
        records: each with `prompt` and `responses`.
        output: the file.
        scorer: see `fastpref.online.judges`.
        settings: JSON values that say what the scores depend on.
        name: as in `score_records`.
        overwrite: begin anew.
        progress: show a bar.

    Raises:
        ValueError: a record, a score or the file is not right (see `score_records` and `Journal`).
    """
    settings = {**(settings or {}), "name": name, "responses": fingerprint(records)}
    journal = Journal(output, len(records), settings, overwrite)
    start = journal.done
    if journal.finished:
        return 0
    with (
        Progress(len(records), "prompts", start, shown=progress) as bar,
        closing(score_records(records, scorer, name=name, start=start)) as found,
    ):
        for record in found:
            journal.append([record])
            bar.update(1)
    return journal.done - start
