"""Responses from a server: `fastpref generate --server`, and a sampler for online training."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from fastpref.data.sampling import Prompt, Sampling
from fastpref.online import servers
from fastpref.online.answer_log import AnswerLog
from fastpref.online.answers import Answer, Request
from fastpref.online.client import Client
from fastpref.online.command import Progress
from fastpref.online.prompts import checked_prompt, refuse_images, with_responses
from fastpref.online.records import Journal, fingerprint
from fastpref.online.servers import Server


def request_seed(seed: int, index: int, response: int) -> int:
    """A response's own seed, 31 bits."""
    return int(np.random.SeedSequence([seed, index, response]).generate_state(1)[0] >> 1)


def _request(
    prompt: Prompt | Mapping[str, Any] | Sequence[int], kind: str, how: Sampling, index: int, response: int,
    **wanted: bool,
) -> Request:  # fmt: skip
    record: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
    refuse_images(record, f"prompt {index}")
    fields = servers.sampling_fields(kind, how) | {"seed": request_seed(how.seed, index, response)}
    request = Request(record["prompt"], fields, **wanted)
    if not request.chat:
        return request
    template = {name: record[name] for name in ("tools", "chat_template_kwargs") if record.get(name)}
    return Request(request.prompt, fields | template, **wanted)


def generate_from_server(
    server: Server, prompts: Sequence[Mapping[str, Any]], output: str | os.PathLike[str],
    sampling: Sampling | None = None, *, overwrite: bool = False, save_ids: bool = False, progress: bool = False,
) -> int:  # fmt: skip
    """Samples responses to each record's `prompt` from a server into JSON lines. Returns how many prompts it did.

    The file is that of `generate_file`, in the order of the prompts. Each response is a request of its own with a seed
    of its own. Answers are on the disk when they come, in `OUTPUT.answers.jsonl` until the output is complete, so a
    stopped run loses only requests that were under way.

    What a server samples depends on what else it computes at that time: the same seeds do not give the same responses,
    and the rest of a continued run is another sample, not the one that the first run would have given. Only the name of
    the model is compared; the server must still have the same weights under it.

    Args:
        server: where to ask.
        prompts: records with a `prompt`: messages, which go through the server's chat template, or text.
        output: the file.
        sampling: how to sample.
        overwrite: begin anew.
        save_ids: keep the sampled tokens, if the server gives them (vLLM does).
        progress: show a bar.

    Raises:
        ServerError: the server failed, or does not give what was asked for. Names the request: (prompt, response).
        ValueError: a prompt is none, or the file was begun with other settings (see `Journal`).
    """
    how = sampling or Sampling()
    for i, prompt in enumerate(prompts):
        checked_prompt(prompt, f"prompts[{i}]")
        refuse_images(prompt, f"prompts[{i}]")  # before the first request
    with Client(server) as client:
        settings = asdict(how) | {
            "server_model": client.server.model, "kind": client.kind, "extra_body": dict(server.extra_body),
            "prompts": fingerprint(prompts), "save_ids": save_ids,
        }  # fmt: skip
        journal = Journal(output, len(prompts), settings, overwrite)
        start = journal.done
        if journal.finished:
            AnswerLog.remove(journal.path)
            return 0
        log = AnswerLog(journal, [how.k] * len(prompts), overwrite)
        known = max(start * how.k, len(log.answers))
        if known:
            print(f"{output}: continued with {known} of {len(prompts) * how.k} responses there; a server does not "
                  "repeat itself, so the rest is another sample", file=sys.stderr)  # fmt: skip
        with Progress(len(prompts) * how.k, "responses", known, shown=progress) as bar:
            found = log.in_order(
                client.ask, lambda i, j: _request(prompts[i], client.kind, how, i, j, want_ids=save_ids), bar.update
            )
            for index, answers in enumerate(found, start):
                journal.append([with_responses(prompts[index], index, answers, save_ids)])
    _remarks(log, how, client.kind)
    AnswerLog.remove(journal.path)
    return journal.done - start


def _remarks(log: AnswerLog, how: Sampling, kind: str) -> None:
    """Says, once, what is odd about the answers."""
    texts: dict[int, set[str]] = {}
    for (index, _), answer in log.answers.items():
        texts.setdefault(index, set()).add(answer.text)
    same = sum(len(some) == 1 for some in texts.values())
    if how.k > 1 and same * 2 > len(texts):
        print(f"the {how.k} responses to {same} of {len(texts)} prompts are all the same: a server may follow the "
              f"model's generation_config in place of the request (its kind is {kind!r}; transformers serve does, "
              "unless it is --server-kind transformers)", file=sys.stderr)  # fmt: skip
    reasoning = sum(a.reasoning for a in log.answers.values())
    if reasoning:
        print(f"{reasoning} of {len(log.answers)} responses came without their reasoning, which the server took out; "
              "without a reasoning parser it leaves it in the text", file=sys.stderr)  # fmt: skip


class ServerSampler:
    """Samples from a server, for online training: `(prompts, sampling, numbers) -> responses`.

    `repeatable` is false: a run that samples from a server cannot be resumed to the bit (see `generate_from_server`).

    Args:
        server: where to ask. It must have the weights of the policy that is trained; to bring them there is the
            server's business.
        ids: whether to ask for the sampled tokens (vLLM gives them).
        logps: whether to ask for the tokens' log-probs. vLLM gives those of the model before temperature, top-p and
            top-k, unless it runs with `--logprobs-mode processed_logprobs`.
    """

    repeatable = False

    def __init__(self, server: Server, *, ids: bool = False, logps: bool = False) -> None:
        self.server, self.ids, self.logps = server, ids, logps

    def __call__(
        self, prompts: Sequence[Prompt | Mapping[str, Any] | Sequence[int]], sampling: Sampling,
        numbers: Sequence[tuple[int, int]] | None = None,
    ) -> list[Answer]:  # fmt: skip
        """One response to each prompt.

        Args:
            prompts: token ids (which vLLM takes), messages, text, or records with a `prompt`. A prompt is there once
                for each of its responses.
            sampling: how to sample. `sampling.k` says nothing here.
            numbers: (prompt, response) for each, which with `sampling.seed` make the seed of its request.

        Returns:
            `text`, `finished` and `tokens` of each; `ids` and `logps` if they were asked for.

        Raises:
            ServerError: the server failed, or does not give what was asked for.
        """
        places = [(i, 0) for i in range(len(prompts))] if numbers is None else numbers
        wanted = {"want_ids": self.ids, "want_logps": self.logps}
        with Client(self.server) as client:
            requests = (
                (i, _request(prompt, client.kind, sampling, *place, **wanted))
                for i, (prompt, place) in enumerate(zip(prompts, places, strict=True))
            )
            found = dict(client.ask(requests))
        return [found[i] for i in range(len(prompts))]
