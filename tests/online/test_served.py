"""Responses from servers: what is asked, what is read, and that no failure loses an answer."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest
import scripted_server
from support_online import PROMPTS, PowerCut, server, stop_at, write_lines
from support_servers import Scripted

from fastpref.commands import cli
from fastpref.online import Sampling, Server, ServerError, ServerSampler, generate_from_server, read_records
from fastpref.online.client import _seconds
from fastpref.online.served import request_seed

HOW = Sampling(k=3, max_new_tokens=6, seed=3)
PAIRS = [(i, j) for i in range(len(PROMPTS)) for j in range(3)]


def generated(url: str, path, **options) -> int:
    return generate_from_server(server(url, **options), PROMPTS, path, HOW)


@pytest.fixture(scope="module")
def whole(scripted, tmp_path_factory) -> bytes:
    """The file of a run in which nothing happened."""
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert generated(scripted.url("plain"), path) == len(PROMPTS)
    return path.read_bytes()


def test_each_response_is_a_request_with_a_seed_of_its_own(scripted, tmp_path) -> None:
    url, records = (
        scripted.url("plain"),
        [*PROMPTS[:2], {"prompt": "Once", "tools": [{}], "chat_template_kwargs": {"a": 1}}],
    )
    records[1] = records[1] | {"chat_template_kwargs": {"thinking": False}}
    generate_from_server(server(url), records, tmp_path / "out.jsonl", HOW)
    got = scripted.got(url)
    assert len({body["seed"] for body in got}) == len(got) == 9 and all(0 <= b["seed"] < 2**31 for b in got)
    chat = {"path": "v1/chat/completions", "model": "scripted", "max_tokens": 6, "temperature": 1.0, "top_p": 1.0}
    text = chat | {"path": "v1/completions", "prompt": "Once"}
    wanted = [
        chat | {"messages": records[0]["prompt"]},
        chat | {"messages": records[1]["prompt"], "chat_template_kwargs": {"thinking": False}},
        text,
    ]
    for body in got:
        assert {name: value for name, value in body.items() if name != "seed"} in wanted
    found = read_records(tmp_path / "out.jsonl")
    assert [{k: r[k] for k in records[i]} for i, r in enumerate(found)] == records
    for record in found:
        assert len(set(record["responses"])) == 3 and record["finished"] == [True] * 3
        assert record["response_tokens"] == [3, 3, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.meta.json"]


KINDS = {
    "openai": ({}, {}),
    "openai ": ({"top_k": 5, "repetition_penalty": 1.5}, {"top_k": 5, "repetition_penalty": 1.5}),
    "vllm": ({}, {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
    "sglang": ({"top_k": 7}, {"top_k": 7, "min_p": 0.0, "repetition_penalty": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_generation_config_decided_what_no_request_said(kind, scripted) -> None:
    options, beyond = KINDS[kind]
    url = scripted.url("plain")
    ServerSampler(server(url, kind=kind.strip()))(["Once"], Sampling(k=1, **options))
    (body,) = scripted.got(url)
    known = {"path", "model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
    assert {name: value for name, value in body.items() if name not in known} == beyond


def test_what_a_server_says_of_its_kind_and_model(scripted, tmp_path) -> None:
    url = scripted.url("vllm")
    sampler = ServerSampler(server(url), ids=True, logps=True)
    (answer,) = sampler([PROMPTS[0]["prompt"]], Sampling(k=1))
    assert (answer.ids, answer.logps, answer.tokens) == ([5, 6, 7], [-0.5, -1.25, -0.125], 3)
    assert [a.logps for a in sampler([[1, 2]], Sampling(), [(3, 1)])] == [[-0.5, -1.25, -0.125]]
    first, second = scripted.got(url)
    assert (first["top_k"], first["return_token_ids"], first["logprobs"]) == (-1, True, True)
    assert (second["prompt"], second["logprobs"], second["path"]) == ([1, 2], 1, "v1/completions")
    assert second["seed"] == request_seed(0, 3, 1)
    generate_from_server(server(url), PROMPTS[:1], tmp_path / "ids.jsonl", HOW, save_ids=True)
    assert read_records(tmp_path / "ids.jsonl")[0]["response_ids"] == [[5, 6, 7]] * 3
    for script, message in (("many", "it lists a, b; want a model's name"), ("broken-list", "it lists no models")):
        with pytest.raises(ServerError, match=message):
            ServerSampler(server(scripted.url(script)))(["Once"], Sampling(k=1))
    url = scripted.url("broken-list")
    assert ServerSampler(server(url, model="x"))(["Once"], Sampling(k=1)) and scripted.got(url)[0]["model"] == "x"


def test_fields_of_ones_own(scripted) -> None:
    url = scripted.url("plain")
    extra = {"max_tokens": None, "max_completion_tokens": 9}
    ServerSampler(server(url, extra_body=extra))(["Once \ud800"], Sampling(k=1))
    (body,) = scripted.got(url)
    assert "max_tokens" not in body and body["max_completion_tokens"] == 9 and body["prompt"] == "Once \ud800"


@pytest.mark.parametrize("script", ["429@2", "500@2"])
def test_tries_again(scripted, script, tmp_path, whole, capsys) -> None:
    url = scripted.url(script)
    generated(url, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert len(scripted.got(url)) == len(PAIRS) + 2
    err = capsys.readouterr().err
    assert err.count("; trying again") == 1 and "2 tries of requests failed and were repeated" in err


FAILURES = {
    "stall@5": r"no answer in 0\.4 s, after 3 tries",
    "die@5": "RemoteProtocolError: .*, after 3 tries",
    "truncated@5": "got no JSON, of the answer '.*, after 3 tries",
    "html@5": "got no JSON, of the answer '<html>Welcome</html>', after 3 tries",
    "empty@5": "got no choices, want 1, of the answer '{}', after 3 tries",
    "wait@5": "status 429: .*it wants to be left alone for 4000 s",
}


@pytest.mark.parametrize("script, message", FAILURES.items())
def test_a_server_that_fails_is_a_clear_error_and_a_file_that_goes_on(
    scripted, script, message, tmp_path, whole
) -> None:
    out, url = tmp_path / "out.jsonl", scripted.url(script)
    with pytest.raises(ServerError, match=r"^request \(\d, \d\): http://127.0.0.1:\d+/.*: " + message):
        generated(url, out, timeout=0.4)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.answers.jsonl").read_text().splitlines()]
    assert len(kept) == 5
    assert whole.startswith(out.read_bytes() if out.exists() else b"")
    other = scripted.url("plain")
    generated(other, out)
    assert out.read_bytes() == whole and len(scripted.got(other)) == len(PAIRS) - 5
    assert generated(other, out) == 0 and len(scripted.got(other)) == len(PAIRS) - 5


NONSENSE = {
    "tools": "got tool calls, want text",
    "two": "got 2 choices, want 1",
    "400@0": 'status 400: {"error": "by script"}$',
    "unlisted": "it lists no models",
}


@pytest.mark.parametrize("script, message", NONSENSE.items())
def test_answers_that_are_none(scripted, script, message) -> None:
    with pytest.raises(ServerError, match=message):
        ServerSampler(server(scripted.url(script)))([PROMPTS[0]["prompt"]], Sampling(k=1))


def test_what_a_server_cannot_give_is_refused(scripted, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(ServerError, match="got no token_ids of the response, which were asked for"):
        generate_from_server(server(scripted.url("plain")), PROMPTS, out, HOW, save_ids=True)
    assert generated(scripted.url("plain"), out) == len(PROMPTS)  # nothing was begun
    with pytest.raises(ServerError, match="got no logprobs of the response's tokens"):
        ServerSampler(server(scripted.url("plain")), logps=True)(["Once"], Sampling(k=1))
    assert ServerSampler.repeatable is False


def test_a_server_that_dies_and_comes_back(tmp_path, whole) -> None:
    own, out = Scripted(), tmp_path / "out.jsonl"
    url, port = own.url("slow@30"), own.port
    found = generate_until(lambda: len(own.got(url)) > 8, own.kill, url, out)
    assert isinstance(found, ServerError) and "ConnectError" in str(found)
    done = len((tmp_path / "out.jsonl.answers.jsonl").read_text().splitlines())
    assert 0 < done < len(PAIRS)
    own = Scripted(port)
    try:
        generated(url, out)
        assert out.read_bytes() == whole and len(own.got(url)) == len(PAIRS) - done
    finally:
        own.kill()


def generate_until(ready, then, url, out):
    """Generates on a thread until `ready`. Returns the error."""
    errors = []

    def work() -> None:
        try:
            generated(url, out)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not ready():
        time.sleep(0.01)
    then()
    thread.join()
    return errors[0]


def test_a_killed_run_asks_only_again_what_was_under_way(scripted, tmp_path, whole) -> None:
    url, out = scripted.url("slow@100"), tmp_path / "out.jsonl"
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    command = ["generate", "--prompts", str(prompts), "--output", str(out)]
    command += ["-k", "3", "--max-new-tokens", "6", "--seed", "3", "--concurrency", "4"]
    scripted.killed_after(10, url, *command)
    assert generated(url, out) > 0
    assert out.read_bytes() == whole
    assert len(scripted.got(url)) - len(PAIRS) == scripted_server.repeated(scripted.got(url)) <= 4


def test_a_crash_while_the_output_is_written(scripted, tmp_path, whole, monkeypatch) -> None:
    url, out = scripted.url("plain"), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)  # of the answers and of the output: the answers come first
        with pytest.raises(PowerCut):
            generated(url, out)
    generated(url, out)
    assert out.read_bytes() == whole
    assert scripted_server.repeated(scripted.got(url)) <= 4


def test_an_interrupt_gives_up_what_is_under_way_at_once(scripted, tmp_path, capsys) -> None:
    out, prompts = tmp_path / "out.jsonl", write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    log = tmp_path / "out.jsonl.answers.jsonl"

    def interrupt() -> None:
        while not log.exists() or log.read_bytes().count(b"\n") < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begin = time.perf_counter()
    command = ["generate", "--prompts", str(prompts), "--output", str(out), "--server", scripted.url("stall@5")]
    assert cli.main(command) == 130
    assert time.perf_counter() - begin < 30, "a request waits for its answer for up to 300 s"
    assert "stopped; the same command goes on from here" in capsys.readouterr().err
    assert log.read_bytes().count(b"\n") == 5


def test_requests_at_once_are_bounded(scripted, tmp_path) -> None:
    url, begin = scripted.url("slow@50"), time.perf_counter()
    generated(url, tmp_path / "out.jsonl", concurrency=2)
    assert time.perf_counter() - begin > len(PAIRS) / 2 * 0.05
    assert len(scripted.got(url)) == len(PAIRS)


def test_keys_are_never_shown_or_written(scripted, tmp_path, monkeypatch, capsys) -> None:
    url, prompts = scripted.url("key"), write_lines(tmp_path / "prompts.jsonl", PROMPTS[:2])
    command = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / "out" / "out.jsonl"), "--server", url]
    command += ["-k", "1", "--temperature", "0"]
    assert cli.main(command) == 2
    assert "status 401: bad key: None; want a key (--api-key-env NAME)" in capsys.readouterr().err
    command += ["--api-key-env", "OUR_KEY"]
    assert cli.main(command) == 2
    assert "got no value in the environment variable OUR_KEY, want a key" in capsys.readouterr().err
    monkeypatch.setenv("OUR_KEY", "sk-wrong-and-secret")
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "status 401: bad key: Bearer [the key]" in err and "sk-wrong" not in err
    monkeypatch.setenv("OUR_KEY", scripted_server.KEY)
    assert cli.main(command) == 0
    for file in (tmp_path / "out").iterdir():
        assert scripted_server.KEY not in file.read_text()
    for where in ("http://me:pass@localhost", "http://localhost/v1?key=pass"):
        with pytest.raises(ValueError) as caught:
            Server(where)
        assert "pass" not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://localhost:99999", ""])
def test_what_is_no_url(url) -> None:
    with pytest.raises(ValueError, match=r"server: got '.*', want a URL such as http://localhost:8000"):
        Server(url)


def test_options_that_mean_a_local_model(scripted, tmp_path, capsys) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS[:1])
    command = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 2
    assert "--model: got none, want one, or a --server" in capsys.readouterr().err
    for option in (["--device", "cpu"], ["--batch-size", "4"], ["--dtype", "float32"]):
        assert cli.main([*command, "--server", scripted.url("plain"), *option]) == 2
        assert f"{option[0]}: got it with --server" in capsys.readouterr().err


def test_remarks_are_said_once(scripted, tmp_path, capsys) -> None:
    generate_from_server(server(scripted.url("reasoning")), PROMPTS, tmp_path / "a.jsonl", HOW)
    assert "21 of 21 responses came without their reasoning" in capsys.readouterr().err


def test_retry_after() -> None:
    assert (_seconds("3"), _seconds("-3"), _seconds("soon"), _seconds(None), _seconds("nan")) == (
        3,
        0,
        None,
        None,
        None,
    )
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and _seconds("Fri, 21 Oct 2395 07:28:00 GMT") > 1e9
