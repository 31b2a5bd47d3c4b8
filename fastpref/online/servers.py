"""OpenAI-compatible servers: how one is named, what its kind understands, and how it is asked to sample."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastpref.common import checks
from fastpref.data.sampling import Sampling
from fastpref.online.command import at_least

KINDS = ("openai", "vllm", "sglang", "transformers")
LOCAL_ONLY = ("batch_size", "device", "dtype")  # options that mean a model on this machine


class ServerError(OSError):
    """A server that cannot be reached, does not answer in time, refuses, or answers nonsense."""


@dataclass(frozen=True)
class Server:
    """A server of language models that speaks OpenAI's protocol: vLLM, SGLang, `transformers serve`, a hosted one.

    Args:
        url: where it is, with or without `/v1`.
        model: the name of a model that it serves. By default the only one that it lists.
        kind: what it understands beyond the protocol: `"openai"` (nothing), `"vllm"`, `"sglang"` or `"transformers"`.
            By default what the server says of its models, else `"openai"`.
        api_key_env: the environment variable that holds the key. Without it no key is sent. The key itself is never
            kept, written or shown.
        concurrency: the most requests that are under way at once.
        timeout: seconds in which a request must be answered.
        retries: how often a request is tried again. The waits double from half a second to a minute, or are what the
            server's `Retry-After` wants.
        extra_body: fields for the body of every request, over those that are there. None leaves a field out.

    Raises:
        ValueError: the URL is none, or holds a password or a query; or another argument is out of range.
    """

    url: str
    model: str | None = None
    kind: str | None = None
    api_key_env: str | None = None
    concurrency: int = 16
    timeout: float = 300.0
    retries: int = 5
    extra_body: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if "@" in parts.netloc or parts.query or parts.fragment:  # it is shown and may hold a secret
            raise ValueError(
                "server: got a URL with a user, a query or a fragment, want none: keys go into api_key_env"
            )
        try:
            there = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # of a port that is none
            there = False
        if not there:
            raise ValueError(f"server: got {self.url!r}, want a URL such as http://localhost:8000")
        if self.kind is not None:
            checks.choice("kind", self.kind, KINDS)
        checks.positive("concurrency", self.concurrency)
        checks.positive("timeout", self.timeout)
        checks.within("retries", self.retries, 0, float("inf"))

    @property
    def base(self) -> str:
        """The URL of the protocol's root."""
        return self.url.rstrip("/").removesuffix("/v1") + "/v1"

    def api_key(self) -> str | None:
        """The key, read now.

        Raises:
            ValueError: the variable is not set, or no header can hold what it has.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            what = "no value" if not key else "a value that no header can hold"
            raise ValueError(f"api_key_env: got {what} in the environment variable {self.api_key_env}, want a key")
        return key


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--server` and what says how to ask it."""
    add, default = parser.add_argument_group("a server").add_argument, Server("http://localhost")
    add("--server", metavar="URL", help="an OpenAI-compatible server (vLLM, SGLang, transformers serve), in place of a "
        "local model; --model is then a name that it serves (default: the only one)")  # fmt: skip
    add("--server-kind", choices=KINDS, help="what it understands beyond the protocol (default: what it says it is)")
    add("--api-key-env", metavar="NAME", help="the environment variable that holds its key (default: no key)")
    add("--concurrency", type=at_least(int, 1), default=default.concurrency, help="requests at once (default: "
        "%(default)s)")  # fmt: skip
    add("--timeout", type=at_least(float, 0, exclusive=True), default=default.timeout, metavar="SECONDS",
        help="in which a request must be answered (default: %(default)s)")  # fmt: skip
    add("--retries", type=at_least(int, 0), default=default.retries, help="of a request (default: %(default)s)")
    add("--extra-body", type=_json_argument, default={}, metavar="JSON", help="fields for every request; null leaves "
        "one out")  # fmt: skip


def json_object(text: str) -> dict[str, Any]:
    """Reads one.

    Raises:
        ValueError: the text is none.
    """
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"got {text!r}, want a JSON object")
    return found


def _json_argument(text: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def of_arguments(args: argparse.Namespace) -> Server | None:
    """The server that the arguments name. None if they name a model on this machine.

    Args:
        args: with what `add_server_arguments` added, `model`, and the options that mean a model on this machine, None
            where they are not given.

    Raises:
        ValueError: they name neither, or one of those options is given with a server.
    """
    if args.server is None:
        if args.model is None:
            raise ValueError("--model: got none, want one, or a --server")
        return None
    for name in LOCAL_ONLY:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: got it with --server, want it for a model on this machine")
    return Server(
        args.server, args.model, args.server_kind, args.api_key_env, args.concurrency, args.timeout, args.retries,
        args.extra_body,
    )  # fmt: skip


def sampling_fields(kind: str, how: Sampling) -> dict[str, Any]:
    """How to sample, as fields of a request's body.

    The protocol has no `top_k` and no `repetition_penalty`. A server that knows them takes them from the model's own
    `generation_config.json` where a request has none, so they are always said there. `transformers serve` takes even
    whether to sample from it, unless it gets a whole configuration.
    """
    fields = {"max_tokens": how.max_new_tokens, "temperature": how.temperature, "top_p": how.top_p}
    if kind == "transformers":
        config: dict[str, Any] = {"do_sample": how.temperature > 0, "repetition_penalty": how.repetition_penalty}
        if how.temperature > 0:
            config |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "min_p": how.min_p}
            return {"max_tokens": how.max_new_tokens, "generation_config": json.dumps(config)}
        return {"max_tokens": how.max_new_tokens, "temperature": 0.0, "generation_config": json.dumps(config)}
    beyond = {"top_k": how.top_k, "min_p": how.min_p or 0.0, "repetition_penalty": how.repetition_penalty}
    if kind in ("vllm", "sglang"):
        return fields | beyond | {"top_k": how.top_k or -1}
    nothing = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return fields | {name: value for name, value in beyond.items() if value != nothing[name]}
