"""Asks a server many things at once: bounded, with retries and time-outs, answers as they come."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Generator, Hashable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, TypeVar

from fastpref.online.answers import Answer, NotGiven, Request
from fastpref.online.servers import KINDS, Server, ServerError

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)
AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # statuses that may be other ones later
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds


class _Refused(ServerError):
    """The server will not do it, however often it is asked."""


class _Failed(Exception):
    """One try that came to nothing. `after`: the seconds that the server wants to be left alone, or None."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        super().__init__(problem)
        self.after = after


class Client:
    """A connection to a server, open in a `with` block, in which `server` has a model and a kind.

    The requests run on a thread of their own, so that it works inside a running event loop too, as in a notebook.

    Raises:
        ServerError: the server does not say which model to take.
        ValueError: the key's variable is not right.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._key = server.api_key()
        self._retried = 0

    @property
    def kind(self) -> str:
        """What the server understands, once it is connected."""
        assert self.server.kind is not None
        return self.server.kind

    def __enter__(self) -> Client:
        import httpx2

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fastpref client", daemon=True)
        self._thread.start()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx2.AsyncClient(
            base_url=self.server.base + "/",
            headers=headers,
            timeout=None,  # a try is timed as a whole
            limits=httpx2.Limits(max_connections=self.server.concurrency),
        )
        try:
            if self.server.model is None or self.server.kind is None:
                self.server = self._start(self._known()).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._start(self._closed()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._retried:
            print(f"{self.server.url}: {self._retried} tries of requests failed and were repeated", file=sys.stderr)

    def ask(self, requests: Iterable[tuple[Key, Request]]) -> Generator[tuple[Key, Answer]]:
        """Yields (key, answer) as they come. The next request is taken when one is answered.

        Those under way are given up when the iterator is closed. If one fails, the others' answers still come.

        Raises:
            ServerError: a request failed for good. Names its key.
        """
        source, running = iter(requests), dict[Future[Answer], Key]()
        failed: ServerError | None = None
        try:
            while True:
                free = 0 if failed else self.server.concurrency - len(running)
                for key, request in islice(source, free):
                    running[self._start(self._answer(request))] = key
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in [future for future in running if future in done]:
                    key = running.pop(future)
                    try:
                        answer = future.result()
                    except ServerError as error:
                        failed = failed or ServerError(f"request {key}: {error}")
                    else:
                        yield key, answer
        finally:
            for future in running:
                future.cancel()
        if failed:
            raise failed

    def _start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _closed(self) -> None:
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        await self._http.aclose()

    async def _answer(self, request: Request) -> Answer:
        body = {"model": self.server.model, **request.body(), **self.server.extra_body}
        body = {name: value for name, value in body.items() if value is not None}
        return await self._tried("POST", request.path, request.answer, body)

    async def _known(self) -> Server:
        """The server with the model and the kind that it says itself."""
        try:
            models = await self._tried("GET", "models", _listed, again={429, 503})  # some have no list, and fail
        except _Refused:
            models = {}
        model, kind = self.server.model, self.server.kind
        if model is None:
            if len(models) != 1:
                raise ServerError(
                    f"{self.server.url}: it lists {', '.join(models) or 'no models':.400}; want a model's name"
                )
            (model,) = models
        owner = models.get(model)
        return replace(self.server, model=model, kind=kind or (owner if owner in KINDS else "openai"))

    async def _tried(
        self, method: str, path: str, read: Callable[[Any], T], body: Any = None, again: Collection[int] = AGAIN
    ) -> T:
        """What `read` makes of the server's answer, after as many tries as it takes."""
        for left in range(self.server.retries, -1, -1):
            try:
                async with asyncio.timeout(self.server.timeout):
                    return await self._once(method, path, read, body, again)
            except TimeoutError:
                failed = _Failed(f"no answer in {self.server.timeout:g} s")
            except _Failed as error:
                failed = error
            if not left:
                break
            done = self.server.retries - left
            pause = min(LONGEST_WAIT, FIRST_WAIT * 2**done) * random.uniform(0.75, 1.25)
            if failed.after is not None and failed.after > self.server.timeout:
                raise ServerError(
                    f"{self.server.base}/{path}: {failed}; it wants to be left alone for {failed.after:g} s"
                )
            self._retried += 1
            if self._retried == 1:
                print(f"{self.server.base}/{path}: {failed}; trying again", file=sys.stderr)
            await asyncio.sleep(max(pause, failed.after or 0.0))
        tries = f"{self.server.retries + 1} tries" if self.server.retries else "1 try"
        raise ServerError(f"{self.server.base}/{path}: {failed}, after {tries}")

    async def _once(self, method: str, path: str, read: Callable[[Any], T], body: Any, again: Collection[int]) -> T:
        import httpx2

        try:
            content = None if body is None else json.dumps(body)  # in ASCII: half of a surrogate pair has no UTF-8
            response = await self._http.request(method, path, content=content)
        except httpx2.HTTPError as error:
            raise _Failed(self._shown(f"{type(error).__name__}: {error}".removesuffix(": "))) from None
        if response.status_code != 200:
            problem = self._shown(f"status {response.status_code}: {' '.join(response.text.split())}")
            if response.status_code in again:
                raise _Failed(problem, _seconds(response.headers.get("Retry-After")))
            hint = "; want a key (--api-key-env NAME)" if response.status_code == 401 and self._key is None else ""
            raise _Refused(f"{self.server.base}/{path}: {problem}{hint}")
        try:
            return read(_json(response.content))
        except NotGiven as error:
            raise _Refused(f"{self.server.base}/{path}: {error}") from None
        except ValueError as error:
            got = self._shown(" ".join(response.text.split()), 80)
            raise _Failed(f"{self._shown(str(error))}, of the answer {got!r}") from None

    def _shown(self, text: str, most: int = 400) -> str:
        """The text without the key, which some servers repeat, and not all of it if it is long."""
        text = text.replace(self._key, "[the key]") if self._key else text
        return text if len(text) <= most else text[:most] + "..."


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        raise ValueError("got no JSON") from None


def _listed(found: Any) -> Mapping[str, Any]:
    """The models by name, and who owns them."""
    models = found.get("data") if isinstance(found, dict) else None
    if not isinstance(models, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in models):
        raise ValueError("got no list of models")
    return {m["id"]: m.get("owned_by") for m in models}


def _seconds(retry_after: str | None) -> float | None:
    """Of a `Retry-After` in seconds or with a date. None if it is neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
