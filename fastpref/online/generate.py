"""`fastpref generate`: k responses to each prompt, into a file. A run that was stopped can be continued."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastpref.common.files import check_writable
from fastpref.data.sampling import Sampling, all_prompt_ids, end_tokens, sample_encoded
from fastpref.online import loading, servers
from fastpref.online.command import Progress, at_least, command
from fastpref.online.prompts import read_prompts, with_responses
from fastpref.online.records import Journal, to_line
from fastpref.online.served import generate_from_server

BATCH_SIZE = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Sampling()
    add("--model", metavar="PATH", help="a transformers checkpoint or adapter, a hub id, or smollm2")
    add("--prompts", required=True, metavar="FILE", help="prompts in any format that `fastpref train` reads")
    add("--output", required=True, metavar="OUT.jsonl", help="prompts with their responses; continued if it exists")
    add("-k", type=at_least(int, 1), default=default.k, help="responses per prompt (default: %(default)s)")
    add("--max-new-tokens", type=at_least(int, 1), default=default.max_new_tokens, help="(default: %(default)s)")
    add(
        "--temperature", type=at_least(float, 0), default=default.temperature, help="0 is greedy (default: %(default)s)"
    )
    add("--top-p", type=float, default=default.top_p, help="nucleus (default: %(default)s, everything)")
    add("--top-k", type=at_least(int, 0), default=default.top_k, help="(default: %(default)s, everything)")
    add("--repetition-penalty", type=float, default=default.repetition_penalty, help="(default: %(default)s, none)")
    add("--seed", type=at_least(int, 0), default=default.seed, help="(default: %(default)s)")
    add("--batch-size", type=at_least(int, 1), help=f"responses at once (default: {BATCH_SIZE})")
    add("--limit", type=at_least(int, 1), metavar="N", help="the first N prompts only")
    add("--chat", action="store_true", help="prompts of text are a user's message, not the beginning of a text")
    add("--save-ids", action="store_true", help="keep the sampled tokens, for training with responses_as_written")
    add("--overwrite", action="store_true", help="begin anew where OUT.jsonl exists")
    loading.add_machine_arguments(parser)
    servers.add_server_arguments(parser)


@command("generate")
def run(args: argparse.Namespace) -> int:
    names = ("k", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(args, name) for name in names})
    check_writable("--output", args.output)
    prompts = read_prompts(args.prompts, chat=args.chat)[: args.limit]
    options = {"overwrite": args.overwrite, "save_ids": args.save_ids, "progress": True}
    if server := servers.of_arguments(args):
        done = generate_from_server(server, prompts, args.output, sampling, **options)
    else:
        model, tokenizer = loading.load_policy(args.model, args.device, args.dtype)
        size = args.batch_size or BATCH_SIZE
        done = generate_file(model, tokenizer, prompts, args.output, sampling, batch_size=size, **options)
    print(f"{args.output}: {done} prompts done now, {len(prompts)} in all, {sampling.k} responses each")
    return 0


def generate_file(
    model: Any, tokenizer: Any, prompts: Sequence[Mapping[str, Any]], output: str | os.PathLike[str],
    sampling: Sampling | None = None, *, batch_size: int = BATCH_SIZE, overwrite: bool = False, save_ids: bool = False,
    progress: bool = False,
) -> int:  # fmt: skip
    """Samples responses to each record's `prompt` into JSON lines. Returns how many prompts this call did.

    A line is the record itself with `index`, `responses` and, for each response, `response_tokens` and `finished`
    (false: cut at `max_new_tokens`). With `save_ids` it also has `response_ids`: the sampled tokens, with what ended
    them. Training with `responses_as_written` takes these in place of the text.

    A file that a stopped run left is continued, with the very responses that the run would have given (see
    `sample_responses`). A file that is complete is left alone.

    Raises:
        ValueError: the file was begun with other prompts, another model or other sampling (see `Journal`).
    """
    how = sampling or Sampling()
    ids = all_prompt_ids(prompts, tokenizer)
    settings = asdict(how) | {
        "model": loading.fingerprint(model),
        "prompts": _fingerprint(ids, prompts),
        "end_tokens": end_tokens(model, tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if save_ids:
        settings["save_ids"] = True
    journal = Journal(output, len(prompts), settings, overwrite)
    if journal.finished:
        return 0
    start = journal.done
    with Progress(len(prompts) * how.k, "responses", start * how.k, shown=progress) as bar:
        found = sample_encoded(
            model, tokenizer, prompts, ids, how, batch_size=batch_size, start=start, progress=bar.update
        )
        for index, responses in enumerate(found, start):
            journal.append([with_responses(prompts[index], index, responses, save_ids)])
    return journal.done - start


def _fingerprint(ids: Iterable[list[int]], prompts: Sequence[Mapping[str, Any]]) -> str:
    """A hash of the records, and of what tokenizer and template make of them."""
    from fastpref.data.reference_cache import Fingerprint

    return Fingerprint().rows(({"ids": row} for row in ids), ["ids"]).text(*map(to_line, prompts)).hexdigest()
