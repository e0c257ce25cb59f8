"""The client of the critic service, for the trainer and for other projects.

A call is retried while its deadline allows it: on connections that fail and on 429, 502, 503 and 504, with exponential
backoff and jitter, never before the server's ``Retry-After``. A 504 ``engine_timeout`` is raised at once: the critic
has given as much time to this request as it gives to any. A critique that does not align is no error: the response has
a ``failure``.

::

    async with CriticClient("http://127.0.0.1:8300") as critic:
        response = await critic.critique(CritiqueRequest(question="3 + 4", attempt="<step_1> 3 + 4 = 7 </step_1>"))

    with SyncCriticClient("http://127.0.0.1:8300") as critic:
        responses = critic.critique_many([CritiqueRequest(question="3 + 4", attempt="<step_1> 3 + 4 = 7 </step_1>")])
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import httpx
from anyio.from_thread import start_blocking_portal
from pydantic import BaseModel, ValidationError

from stepalign.errors import ConfigError, CriticError, CriticRequestError, CriticUnavailableError
from stepalign.retry_after import read_retry_after
from stepalign.types import MAX_REQUEST_TIMEOUT_MS, REQUEST_TIMEOUT_HEADER, CritiqueRequest, CritiqueResponse, ModelList
from stepalign.validation import explain

T = TypeVar("T")
M = TypeVar("M", CritiqueResponse, ModelList)

log = logging.getLogger(__name__)

_RETRIED_STATUSES = frozenset({429, 502, 503, 504})
_RETRIED_ERRORS = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, TimeoutError)
_CONNECT_SECONDS = 5.0
_TIMEOUT_SECONDS = 120.0
_NOUNS = {CritiqueResponse: "critique response", ModelList: "list of models"}
ENGINE_ERROR = "engine_error"
LOADING = "loading"
ENGINE_TIMEOUT = "engine_timeout"
"""The code of a critic whose engine took longer than it may for one answer."""


class _ErrorDetail(BaseModel):
    message: str
    code: str | None = None


class _ErrorEnvelope(BaseModel):
    error: _ErrorDetail


class CriticClient:
    """Calls the critic at ``base_url``.

    ``api_key`` is sent as a bearer token. ``timeout`` is the deadline of one call in seconds, retries included; the
    service is told the time that is left, and gives up when the client does.
    ``backoff`` is the first pause in seconds; it doubles up to ``max_backoff``, and each pause is a random half to
    whole of it. ``transport``, ``sleep``, ``uniform`` (a random number in [0, 1)) and ``clock`` (monotonic seconds) are
    injected by tests. Proxies that the environment names are not used. Raises ConfigError when ``base_url`` is no http
    or https address, or when the key cannot stand in a header, as one with a newline at its end.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = _TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
        backoff: float = 0.25,
        max_backoff: float = 8.0,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        uniform: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check_url(base_url)
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.split() == [api_key]):
            raise ConfigError("the API key is empty or holds a space, a newline or something else that no header takes")
        headers = {"authorization": f"Bearer {api_key}"} if api_key is not None else None
        self._http = httpx.AsyncClient(base_url=base_url, headers=headers, transport=transport, trust_env=False)
        self._timeout = timeout
        self._backoff = backoff
        self._max_backoff = max_backoff
        self._sleep = sleep
        self._uniform = uniform
        self._clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        """The critic's answer. ``request_id`` goes into both sides' logs; all tries of a call share it.

        Raises CriticUnavailableError when no try gave an answer before the deadline, or with the code
        ``engine_timeout`` when the critic's engine took too long; CriticRequestError when the service refused the
        request; and CriticError on an answer that is no critique response or when the critic's engine failed at this
        request every time.
        """
        _checked([request])
        headers = {"content-type": "application/json", "x-request-id": request_id or f"req_{uuid4().hex}"}
        body = request.model_dump_json().encode()
        deadline = self._clock() + self._timeout
        attempt = 0
        told: CriticUnavailableError | None = None
        while True:
            try:
                sent = headers | _timeout_header(deadline - self._clock())
                answer = await self._send("POST", "/v1/critiques", deadline, content=body, headers=sent)
                return _read(answer, CritiqueResponse)
            except CriticUnavailableError as error:
                if error.code == ENGINE_TIMEOUT:
                    raise
                # The last try is often cut short by the deadline, which says nothing of the cause.
                silent = isinstance(error.__cause__, TimeoutError)
                await self._pause(error, attempt, deadline, told if silent else None)
                told = told if silent else error
                attempt += 1

    async def critique_many(
        self, requests: Iterable[CritiqueRequest], *, concurrency: int = 16
    ) -> list[CritiqueResponse | CriticError]:
        """The critic's answers in the order of ``requests``; an error takes the place of the answer that it prevented.

        At most ``concurrency`` calls are open at once. The deadline is that of each call, from when its turn comes.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}; at least one call must be open at once")
        turns = asyncio.Semaphore(concurrency)

        requests = _checked(requests)

        async def one(request: CritiqueRequest) -> CritiqueResponse | CriticError:
            async with turns:
                try:
                    return await self.critique(request)
                except CriticError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in requests]
        return [task.result() for task in tasks]

    async def wait_ready(self, timeout: float = 60.0, poll: float = 0.1) -> None:
        """Return once the critic takes requests; asks every ``poll`` seconds.

        Raises CriticUnavailableError with the last reason after ``timeout`` seconds, and CriticError when something
        else than a critic answers.
        """
        deadline = self._clock() + timeout
        while True:
            try:
                answer = await self._send("GET", "/health/ready", deadline)
            except CriticUnavailableError as error:
                if self._clock() + poll > deadline:
                    raise CriticUnavailableError(f"the critic is not ready after {timeout:g} s: {error}") from error
                await self._sleep(poll)
                continue
            if answer.status_code != 200:
                raise CriticError(f"{self._http.base_url} is no critic: /health/ready gave {answer.status_code}")
            return

    async def models(self) -> ModelList:
        """The served critics, by the identities that their critiques carry. One try.

        Raises CriticUnavailableError when the critic cannot be reached or is not ready, CriticRequestError when it
        refuses the key, and CriticError when something else than a critic answers.
        """
        answer = await self._send("GET", "/v1/models", self._clock() + self._timeout)
        return _read(answer, ModelList)

    async def _send(self, method: str, path: str, deadline: float, **options: Any) -> httpx.Response:
        """One try. Raises CriticUnavailableError on a trouble that may pass."""
        began = self._clock()
        remaining = deadline - began
        timeout = httpx.Timeout(max(remaining, 0.001), connect=max(min(remaining, _CONNECT_SECONDS), 0.001))
        try:
            async with asyncio.timeout(max(remaining, 0.001)):
                answer = await self._http.request(method, path, timeout=timeout, **options)
        except _RETRIED_ERRORS as error:
            how = f": {error}" if str(error) else f" after {self._clock() - began:.1f} s"
            said = f"no answer from the critic at {self._http.base_url}: {type(error).__name__}{how}"
            raise CriticUnavailableError(said) from error
        except httpx.HTTPError as error:
            said = f"the critic at {self._http.base_url} cannot be called: {type(error).__name__}: {error}"
            raise CriticError(said) from error
        if answer.status_code in _RETRIED_STATUSES:
            message, code = _explain(answer)
            raise CriticUnavailableError(
                f"{_status(answer, code)}: {message}", read_retry_after(answer.headers.get("retry-after", "")), code
            )
        return answer

    async def _pause(
        self, error: CriticUnavailableError, attempt: int, deadline: float, earlier: CriticUnavailableError | None
    ) -> None:
        """Wait before the next try. Raises ``error``, with the ``earlier`` one, if the deadline would pass before."""
        longest = min(self._max_backoff, self._backoff * 2 ** min(attempt, 30))
        seconds = longest * (0.5 + 0.5 * self._uniform()) + (error.retry_after or 0.0)
        if self._clock() + seconds >= deadline:
            if error.code == ENGINE_ERROR:
                raise CriticError(f"the critic's engine failed {attempt + 1} times on this request: {error}") from error
            raise CriticUnavailableError(
                f"gave up after {attempt + 1} {'try' if attempt == 0 else 'tries'} in {self._timeout:g} s (timeout); "
                f"last: {error}{f'; before it: {earlier}' if earlier is not None else ''}",
                error.retry_after,
            ) from error
        # A critic that loads is no trouble: it says so to everybody who starts with it.
        level = logging.INFO if error.code == LOADING else logging.WARNING
        log.log(level, "the critic gave no answer; trying again in %.2f s: %s", seconds, error)
        await self._sleep(seconds)


class SyncCriticClient:
    """A CriticClient for code that is not async: it runs on an event loop of its own, in a background thread.

    It may be used from several threads, and from a thread that runs an event loop, as a notebook's does; that loop
    stands still during a call. ``base_url`` and the options are those of CriticClient, and so are the errors.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = _TIMEOUT_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = CriticClient(base_url, api_key=api_key, timeout=timeout, transport=transport)
        closing = ExitStack()
        self._portal = closing.enter_context(start_blocking_portal("asyncio", name="critic-client"))
        closing.callback(self._portal.call, self._client.aclose)
        # A client that is never closed would keep its process from ending.
        self._close = weakref.finalize(self, closing.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread. Calls are refused afterwards (RuntimeError)."""
        self._close()

    def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        """As CriticClient.critique."""
        return self._call(lambda: self._client.critique(request, request_id))

    def critique_many(
        self, requests: Iterable[CritiqueRequest], *, concurrency: int = 16
    ) -> list[CritiqueResponse | CriticError]:
        """As CriticClient.critique_many."""
        return self._call(lambda: self._client.critique_many(requests, concurrency=concurrency))

    def models(self) -> ModelList:
        """As CriticClient.models."""
        return self._call(self._client.models)

    def wait_ready(self, timeout: float = 60.0, poll: float = 0.1) -> None:
        """As CriticClient.wait_ready."""
        self._call(lambda: self._client.wait_ready(timeout, poll))

    def _call(self, act: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if not self._close.alive:
            raise RuntimeError("this client is closed; make another one")
        running = self._portal.start_task_soon(act)
        try:
            return running.result()
        finally:
            # Of use when the wait was interrupted, as by Ctrl-C: the calls end too.
            running.cancel()


def _checked(requests: Iterable[Any]) -> list[CritiqueRequest]:
    """Raises TypeError when something else than requests is given: dictionaries, or one request in place of many."""
    given = [requests] if isinstance(requests, CritiqueRequest) else list(requests)
    wrong = next((each for each in given if not isinstance(each, CritiqueRequest)), None)
    if wrong is not None or isinstance(requests, CritiqueRequest):
        said = "one request" if wrong is None else type(wrong).__name__
        raise TypeError(f"give CritiqueRequest objects, critique_many a list of them, and not {said}")
    return given


def _timeout_header(seconds: float) -> dict[str, str]:
    """The header that tells the service when to give up; none for a time longer than it may say."""
    milliseconds = max(1, int(seconds * 1000))
    return {REQUEST_TIMEOUT_HEADER: str(milliseconds)} if milliseconds <= MAX_REQUEST_TIMEOUT_MS else {}


def _check_url(base_url: str) -> None:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"the critic's address {base_url!r} is no URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"the critic's address is {base_url!r}; it must look like http://127.0.0.1:8300")


def _read(answer: httpx.Response, form: type[M]) -> M:
    if 400 <= answer.status_code < 500:
        message, code = _explain(answer)
        if answer.status_code == 404:
            message += f"; is {answer.url} the critic's address, which has no path, followed by /v1/critiques?"
        raise CriticRequestError(f"{_status(answer, code)}: {message}", answer.status_code, code)
    if answer.status_code != 200:
        message, code = _explain(answer)
        raise CriticError(f"the critic answered {_status(answer, code)}: {message}")
    try:
        return form.model_validate_json(answer.content)
    except ValidationError as error:
        raise CriticError(f"the critic's answer is no {_NOUNS[form]}: {explain(error)}") from error


def _status(answer: httpx.Response, code: str | None) -> str:
    return f"{answer.status_code}" if code is None else f"{answer.status_code} {code}"


def _explain(answer: httpx.Response) -> tuple[str, str | None]:
    """Message and code of an error answer; of one that is not ours (a load balancer's), its first characters."""
    try:
        detail = _ErrorEnvelope.model_validate_json(answer.content).error
    except ValidationError:
        return f"no answer of a critic: {answer.text[:200]!r}", None
    return detail.message, detail.code
