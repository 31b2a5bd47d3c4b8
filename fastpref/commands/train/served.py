"""The options of `fastpref train rloo` and `grpo` that name a server, and the sampler that they make."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from fastpref.online.client import Client
from fastpref.online.served import ServerSampler
from fastpref.online.servers import KINDS, Server, json_object

_DEFAULT = Server("http://localhost")


@dataclass
class ServerOptions:
    """A server that samples the responses, as `fastpref generate --server` asks one."""

    server: str | None = field(
        default=None,
        metadata={
            "help": "The URL of an OpenAI-compatible server that samples the responses and gives their token ids and "
            "log-probs (vLLM does). It samples from the weights that it holds: training does not change them."
        },
    )
    server_model: str | None = field(default=None, metadata={"help": "A name that it serves (default: the only one)."})
    server_kind: str | None = field(
        default=None, metadata={"help": "What it understands (default: what it says it is).", "choices": list(KINDS)}
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "The environment variable that holds its key (default: no key)."}
    )
    server_concurrency: int = field(default=_DEFAULT.concurrency, metadata={"help": "Requests at once."})
    server_timeout: float = field(
        default=_DEFAULT.timeout, metadata={"help": "Seconds in which a request must be answered."}
    )
    server_retries: int = field(default=_DEFAULT.retries, metadata={"help": "Of a request."})
    server_extra_body: str | None = field(
        default=None, metadata={"help": "A JSON object: fields for every request; null leaves one out."}
    )


def asked(server: Server) -> Server:
    """The server with the model and the kind that it says itself, so that a wrong one is known before training.

    Raises:
        ServerError: it does not answer, or does not say which model to take.
    """
    with Client(server) as client:
        return client.server


def sampler_of(options: ServerOptions, args: Any) -> ServerSampler | None:
    """The sampler, or None without a server.

    Raises:
        ServerError: the server does not answer, or does not say which model to take.
        ValueError: an option is wrong, or is given without a server.
    """
    if options.server is None:
        for known in fields(ServerOptions):
            if getattr(options, known.name) != known.default:
                raise ValueError(f"--{known.name}: got it without --server, want the server's URL")
        return None
    try:
        body = json_object(options.server_extra_body or "{}")
    except ValueError as error:
        raise ValueError(f"--server_extra_body: {error}") from None
    server = Server(
        options.server, options.server_model, options.server_kind, options.api_key_env, options.server_concurrency,
        options.server_timeout, options.server_retries, body,
    )  # fmt: skip
    server = asked(server)
    if args.process_index == 0:
        print(f"Responses from {server.url}, model {server.model}, kind {server.kind}", flush=True)
        if args.temperature != 1.0 and args.vllm_importance_sampling_correction:
            print(
                f"--temperature is {args.temperature:g}: the server's log-probs must be those after it, as vLLM's are "
                "with --logprobs-mode processed_logprobs",
                flush=True,
            )
    return ServerSampler(server, ids=True, logps=args.vllm_importance_sampling_correction)
