"""`fastpref judge`: a model says which responses are better. A run that was stopped can be continued."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastpref.common.files import check_writable
from fastpref.data.sampling import Sampling, all_prompt_ids, sample_encoded
from fastpref.online import judge_report, loading, servers, verdicts
from fastpref.online.answer_log import AnswerLog, Ask, Key, MakeRequest, in_order
from fastpref.online.answers import Answer, Request
from fastpref.online.client import Client
from fastpref.online.command import Progress, at_least, command
from fastpref.online.judges import Records, Scorer, Scores
from fastpref.online.prompts import checked_prompt, checked_responses, read_responses, refuse_images
from fastpref.online.records import Journal, fingerprint, write_json
from fastpref.online.score import check_free, with_scores
from fastpref.online.served import request_seed
from fastpref.online.servers import Server
from fastpref.online.verdicts import Judging

BATCH_SIZE = 16
Judge = Server | tuple[Any, Any]  # a server, or (model, tokenizer)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Judging()
    add("--responses", required=True, metavar="IN.jsonl", help="records with a prompt and its responses; or pairs in "
        "any format that `fastpref train` reads, whose labels are then people's")  # fmt: skip
    add("--output", required=True, metavar="OUT.jsonl", help="the same with scores; continued if it exists")
    add("--model", metavar="PATH", help="the judge: a transformers checkpoint or adapter, a hub id, or smollm2")
    add("--how", choices=verdicts.TEMPLATES, default=default.how, help="pairs: which of two is better, in both orders; "
        "grades: each by itself (default: %(default)s)")  # fmt: skip
    add("--rubric", metavar="FILE", help="the criteria, as text (default: right, does what is asked, clear)")
    add("--template", metavar="FILE", help="what is asked, with {prompt}, {response_a} and {response_b}, or {response}")
    add("--samples", type=at_least(int, 1), default=default.samples, help="answers to each (default: %(default)s)")
    add("--temperature", type=at_least(float, 0), default=default.temperature, help="(default: %(default)s)")
    add("--max-new-tokens", type=at_least(int, 1), default=default.max_new_tokens, help="(default: %(default)s)")
    add("--seed", type=at_least(int, 0), default=default.seed, help="(default: %(default)s)")
    add("--grades", nargs=2, type=float, default=(default.low, default.high), metavar=("LOW", "HIGH"),
        help="the worst and the best grade (default: 1 10)")  # fmt: skip
    add("--name", help="what to call these scores; with names, several judges' scores go together")
    add("--human", default="human", metavar="NAME", help="the scores that are people's (default: %(default)s)")
    add("--json", metavar="FILE", help="the report")
    add("--batch-size", type=at_least(int, 1), help=f"answers at once (default: {BATCH_SIZE})")
    add("--overwrite", action="store_true", help="begin anew where OUT.jsonl exists")
    loading.add_machine_arguments(parser)
    servers.add_server_arguments(parser)


@command("judge")
def run(args: argparse.Namespace) -> int:
    judging = Judging(
        args.how, args.samples, args.temperature, args.max_new_tokens, args.seed, low=args.grades[0],
        high=args.grades[1], template=_text(args.template),
        **({} if args.rubric is None else {"rubric": str(_text(args.rubric)).strip()}),
    )  # fmt: skip
    for option in ("output", "json"):
        check_writable(f"--{option}", getattr(args, option))
    records = read_responses(args.responses, args.human)
    judge: Judge = servers.of_arguments(args) or loading.load_policy(args.model, args.device, args.dtype)
    report = judge_file(
        judge, records, args.output, judging, name=args.name, human=args.human,
        batch_size=args.batch_size or BATCH_SIZE, overwrite=args.overwrite, progress=True,
    )  # fmt: skip
    print("\n".join(judge_report.lines(report)))
    if args.json:
        write_json(args.json, report)
    if report["answers"] and report["answers"] == report["unparsable"]["count"]:
        raise ValueError(
            f"{args.output}: got no verdict in {report['answers']} answers, want a judge that ends as asked"
        )
    return 0


def _text(path: str | None) -> str | None:
    return None if path is None else Path(path).read_text(encoding="utf-8")


def judge_file(
    judge: Judge, records: Sequence[Mapping[str, Any]], output: str | os.PathLike[str],
    judging: Judging | None = None, *, name: str | None = None, human: str = "human", batch_size: int = BATCH_SIZE,
    overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes the records with a judge's scores as JSON lines, as `fastpref pairs` reads them. Returns a report.

    Every answer is on the disk when it comes, in `OUTPUT.answers.jsonl`, which is kept: it says what the judge said. A
    stopped run goes on from there. It loses only requests that were under way; of a model on this machine, the window
    of batches. An answer that is no verdict is never guessed at (see `Judging` and `verdicts.scores`): it is counted,
    and what needs it has no score.

    Args:
        judge: a `Server`, or a model on this machine and its tokenizer.
        records: each with `prompt` and `responses`.
        output: the file.
        judging: what is asked.
        name: makes `scores` an object of named lists, beside those that are there.
        human: the name of people's scores, with which the judge is compared.
        batch_size: answers at once, of a model on this machine.
        overwrite: begin anew.
        progress: show a bar.

    Returns:
        the report, as JSON values (see `fastpref.online.judge_report.report`).

    Raises:
        ServerError: the server failed. Names the request: (record, question).
        ValueError: a record is none or has such scores already, or the file was begun with other settings.
    """
    how = judging or Judging()
    asked = _questions(records, how)
    for i, record in enumerate(records, 1):
        check_free(record, name, f"record {i}")
    with _asking(judge, records, asked, how, batch_size) as (ask, request, who):
        settings = {**asdict(how), **who, "name": name, "responses": fingerprint(records)}
        journal = Journal(output, len(records), settings, overwrite)
        start, log = journal.done, AnswerLog(journal, [len(some) for some in asked], overwrite)
        with Progress(sum(map(len, asked)), "answers", len(log.answers), shown=progress) as bar:
            for index, answers in enumerate(log.in_order(ask, request, bar.update), start):
                found = verdicts.scores(records[index]["responses"], how, [_verdict(a, how) for a in answers])
                journal.append([with_scores(records[index], found, name)])
    said = {key: (answer, _verdict(answer, how)) for key, answer in log.answers.items()}
    return judge_report.report(journal.path, asked, said, how, human)


def judge_scorer(judge: Judge, judging: Judging | None = None, *, batch_size: int = BATCH_SIZE) -> Scorer:
    """A scorer by a judge: what `judge_file` writes, without a file. It warns, once, of answers without a verdict.

    As a reward of online training it needs `reward_function`. `judging.how = "pairs"` compares the responses of a group
    with each other, so that their rewards are win rates within the group.
    """
    how = judging or Judging()

    def score(records: Records, start: int = 0) -> Iterator[Scores]:
        asked = _questions(records, how)
        with _asking(judge, records, asked, how, batch_size) as (ask, request, _):
            found = in_order(ask, [len(some) for some in asked], request, start=start)
            for record, answers in zip(records[start:], found, strict=True):
                read = [_verdict(answer, how) for answer in answers]
                if None in read:
                    warnings.warn("judge: got answers without a verdict; their responses have no score", stacklevel=2)
                yield verdicts.scores(record["responses"], how, read)

    return score


def _questions(records: Sequence[Mapping[str, Any]], how: Judging) -> list[list[tuple[int, ...]]]:
    for i, record in enumerate(records, 1):
        prompt = checked_prompt(record, f"record {i}")
        checked_responses(record, f"record {i}")
        refuse_images(record, f"record {i}")
        try:
            verdicts.prompt_text(prompt)
        except ValueError as error:
            raise ValueError(f"record {i}: {error}") from None
    return [verdicts.questions(record["responses"], how) for record in records]


def _verdict(answer: Answer, how: Judging) -> float | None:
    """None if it was cut: what follows could have been another verdict."""
    return how.read(answer.text) if answer.finished else None


@contextmanager
def _asking(
    judge: Judge, records: Sequence[Mapping[str, Any]], asked: Sequence[Sequence[tuple[int, ...]]], how: Judging,
    batch_size: int,
) -> Generator[tuple[Ask, MakeRequest, dict[str, Any]]]:  # fmt: skip
    """(how to ask, how to make a request, what the answers depend on besides `how`)."""
    sampling = Sampling(1, how.max_new_tokens, how.temperature, seed=how.seed)

    def messages(i: int, j: int) -> list[dict[str, Any]]:
        text = how.message(records[i]["prompt"], [records[i]["responses"][r] for r in asked[i][j]])
        return [{"role": "user", "content": text}]

    if not isinstance(judge, Server):
        model, tokenizer = judge
        every = [(i, j) for i, some in enumerate(asked) for j in range(len(some))]
        who = {"judge": loading.fingerprint(model), "dtype": str(model.dtype).removeprefix("torch.")}
        yield _local(model, tokenizer, every, messages, sampling, batch_size), lambda i, j: Request([], {}), who
        return
    with Client(judge) as client:
        fields = servers.sampling_fields(client.kind, sampling)
        known = {"judge": client.server.model, "kind": client.kind, "extra_body": dict(judge.extra_body)}
        yield client.ask, lambda i, j: Request(messages(i, j), fields | {"seed": request_seed(how.seed, i, j)}), known


def _local(model: Any, tokenizer: Any, every: Sequence[Key], messages: Any, sampling: Sampling, batch_size: int) -> Ask:
    """Asks a model on this machine. It answers in order, so that what is left of `every` is its end."""

    def ask(requests: Iterable[tuple[Key, Request]]) -> Generator[tuple[Key, Answer]]:
        todo = [key for key, _ in requests]
        if not todo:
            return
        prompts = [messages(*key) for key in every]
        ids = all_prompt_ids(prompts, tokenizer)
        start = len(every) - len(todo)
        found = sample_encoded(model, tokenizer, prompts, ids, sampling, batch_size=batch_size, start=start)
        for key, asked, (response,) in zip(todo, ids[start:], found, strict=True):
            yield key, Answer(response.text, response.finished, len(asked), response.tokens)

    return ask
