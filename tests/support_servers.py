"""Servers in processes of their own: one that answers by script, and `transformers serve`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import scripted_server

_NUMBERS = itertools.count()


class Scripted:
    """The scripted server's process."""

    def __init__(self, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, scripted_server.__file__, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def url(self, script: str) -> str:
        """With state of its own."""
        return f"http://127.0.0.1:{self.port}/{next(_NUMBERS)}.{script}"

    def got(self, url: str) -> list[dict[str, Any]]:
        """The bodies of the requests that came to the URL."""
        with urlopen(f"{url}/log", timeout=10) as answer:
            return json.load(answer)

    def killed_after(self, requests: int, url: str, *arguments: str) -> None:
        """Runs `fastpref ARGUMENTS --server URL` in a process, which is killed when so many requests have come."""
        command = [sys.executable, "-m", "fastpref.commands.cli", *arguments, "--server", url]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
        while len(self.got(url)) < requests:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """The URL of a `transformers serve` process with the model of a folder. Skips where it cannot be run."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers serve needs fastapi, uvicorn and openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--device", "cpu"]
    log = folder / "serve.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], stdout=out, stderr=out,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 240  # it imports torch and transformers, beside other tests
        while True:
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
