"""A model behind any OpenAI-compatible server, through ``POST /chat/completions``: greedy.

The server applies its chat template to text, so this backend cannot keep control tokens out of a prompt: a server that
does not do so itself reads an attempt's ``<|im_end|>`` as the end of a turn. Backends with token ids keep them out.

A server may refuse the fields that every request has, as some do ``max_tokens``. That is the configuration's fault and
no request's. So the backend asks for one word with the same fields: at the start, and after a refusal that may be
theirs. A refusal of the word stops the start; later it makes the backend unhealthy until the word is given.

Callers read the messages of errors, those of a start that failed too. The server's address stands in the log alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx

from stepalign.errors import ConfigError
from stepalign.prompts import Message, load_prompt
from stepalign.prompts.layout import load_layout
from stepalign.secret_files import read_secret
from stepalign.types import CriticIdentity
from stepalign_critic.backends.admission import Admission
from stepalign_critic.backends.base import Alignment, Generation, RenderedPrompt
from stepalign_critic.backends.openai_answers import (
    AFTER_TIMEOUT_SECONDS,
    REMEDIES,
    Answer,
    read_completion,
    status_of,
    words_of,
)
from stepalign_critic.backends.openai_models import choose_model, read_models
from stepalign_critic.backends.openai_turns import OpenAITurns
from stepalign_critic.decoding.plan import Plan
from stepalign_critic.errors import EngineError, EngineTimeoutError, NotReadyError, ServiceError
from stepalign_run.config import CriticServerSection
from stepalign_run.logging import get_logger

_LOOK_SECONDS = 2.0
_START_LOOK_SECONDS = 0.5
_MODELS_SECONDS = 10.0
_CONNECT_SECONDS = 10.0
_WORD_SECONDS = 30.0
"""How long a refusal may take: servers read a request's fields before they generate."""
_LOOKS_BETWEEN_WORDS = 30
_MOST_ANSWER_BYTES = 32 * 2**20
_WORD_GRAMMAR = 'root ::= "OK"'
_WORD = "Reply with the word OK and nothing else."
# Statuses of the word that refuse it. 404, 405 and 501 also come from a gateway whose server is not up yet.
_REFUSED = frozenset({400, 401, 402, 403, 413, 422})
_MAY_BE_OURS = _REFUSED - {413} | {404, 405, 501}

_log = get_logger(__name__)


class _NotYet(Exception):
    """The server is not up yet, or is another one than was meant."""


class OpenAIBackend:
    """Asks ``critic.openai.base_url``. ``transport`` takes the place of aiohttp's, for tests."""

    name = "openai"
    recovers = True

    def __init__(self, section: CriticServerSection, transport: httpx.AsyncBaseTransport | None = None) -> None:
        settings = section.openai
        if settings.base_url is None:
            raise ConfigError("backend 'openai' needs critic.openai.base_url, such as http://127.0.0.1:8000/v1")
        self._settings = settings
        self._section = section
        self._url = _shown(settings.base_url)
        self._model = settings.model
        self._admission = Admission(section.max_batch, section.max_queue)
        self._silence: str | None = "it was not asked yet"
        self._refusal: str | None = None
        self._taken = False
        self._asking_for_word = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        key_file = settings.api_key_file
        # Only a conversation can be had with a server that has the tokenizer to itself.
        self.aligns = load_layout(section.prompts).form == "turns"
        self._turns = OpenAITurns(settings, self._ask_in_turn, section.max_batch)
        # A critique in turns has many requests; those of all critiques are no more than the same number of critiques.
        self._open = asyncio.Semaphore(section.max_batch)
        self._key = None if key_file is None else read_secret("critic.openai.api_key_file", key_file)
        self._http = httpx.AsyncClient(
            base_url=settings.base_url.rstrip("/") + "/",
            headers={} if self._key is None else {"authorization": f"Bearer {self._key}"},
            transport=_aiohttp_transport() if transport is None else transport,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            # One caller's cookie is not for the next, and one that no header takes would fail all that follow.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
            trust_env=False,
        )

    def identity(self, prompt_version: str) -> CriticIdentity:
        if self._model is None:
            raise NotReadyError("the server's models are not known yet", "loading")
        return CriticIdentity(
            model=self._model,
            weights_revision=self._settings.revision,
            prompt_version=prompt_version,
            backend=self.name,
        )

    async def start(self) -> None:
        """Wait until the server answers; it may still be loading its own model.

        Raises ConfigError when it refuses our key or our fields, does not serve the model, or never answers.
        """
        try:
            await self._wait_for_server()
        except ConfigError as error:
            _log.error("the model's server cannot be used", base_url=self._url, reason=str(error))
            raise
        self._silence = None
        self._watching = asyncio.create_task(self._watch())

    async def _wait_for_server(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout_seconds
        told = ""
        while True:
            try:
                self._model = await self._find_model()
                await self._ask_for_word_at_start()
                return
            except (_NotYet, httpx.HTTPError) as error:
                reason = _reason(error)
                if loop.time() > deadline:
                    said = _kind(error) if isinstance(error, httpx.HTTPError) else reason
                    waited = f"{self._settings.timeout_seconds:g} s"
                    raise ConfigError(
                        f"the server of critic.openai.base_url took no requests in {waited}: {said}"
                    ) from None
                if reason != told:
                    told = reason
                    _log.warning("waiting for the model's server", base_url=self._url, reason=reason)
                await asyncio.sleep(_START_LOOK_SECONDS)

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        async with self._admission.place():
            return read_completion(await self._answered(prompt.messages, self._fields()))

    async def _ask_in_turn(self, messages: list[Message], tokens: int | None, fields: dict[str, Any]) -> Answer:
        async with self._open:
            return await self._answered(messages, {**self._fields(tokens), **fields})

    async def _answered(self, messages: list[Message], fields: dict[str, Any]) -> Answer:
        """An answer that holds a completion. Raises ServiceError when there is none."""
        answer = await self._complete(messages, self._settings.timeout_seconds, fields)
        try:
            read_completion(answer)
        except ServiceError:
            status = status_of(answer)
            if status in _MAY_BE_OURS:
                await self._find_fault(status)
            raise
        self._taken = True
        return answer

    async def align(self, prompt: RenderedPrompt, plan: Plan) -> Alignment:
        """A critique by ``plan``, in turns; one time limit holds for all its requests."""
        async with self._admission.place(), _in_time(self._settings.timeout_seconds):
            return await self._turns.align(plan)

    def expected_wait_seconds(self) -> float | None:
        return self._admission.expected_wait_seconds()

    def healthy(self) -> bool:
        """Whether the server answered the latest look, one every two seconds, and takes our fields."""
        return self._silence is None and self._refusal is None

    def trouble(self) -> str:
        return self._refusal or f"the model's server does not answer: {self._silence}"

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._http.aclose()

    async def _find_model(self) -> str:
        """The name to ask for. A server without a list of models is taken at our word.

        Raises ConfigError when it does not serve that, _NotYet and httpx.HTTPError when it may be asked again.
        """
        answer = await self._get_models()
        listed = read_models(answer.content) if answer.status == 200 else None
        if listed is not None:
            return choose_model(self._settings.model, listed)
        if answer.status == 429 or (answer.status >= 500 and answer.status != 501):
            raise _NotYet(f"/models says {answer.status}: {words_of(answer)}")
        if self._settings.model is not None:
            _log.warning("the server has no list of models", base_url=self._url, status=answer.status)
            return self._settings.model
        if answer.status in (401, 403):
            raise ConfigError(
                f"the model's server refuses the key: status {answer.status}; set critic.openai.api_key_file, or "
                "critic.openai.model if it is the list of models alone that it refuses"
            )
        if answer.status == 404:
            hint = "there is no /models (404): critic.openai.base_url ends before it, mostly in /v1"
        else:
            hint = f"/models gives no list of models, but status {answer.status}{REMEDIES.get(answer.status, '')}"
        raise _NotYet(f"{hint}; if the server has none, set critic.openai.model")

    async def _get_models(self) -> Answer:
        try:
            async with asyncio.timeout(min(_MODELS_SECONDS, self._settings.timeout_seconds)):
                return await self._send("GET", "models")
        except TimeoutError:
            raise _NotYet("/models gave no answer in time") from None

    async def _ask_for_word_at_start(self) -> None:
        """Raises ConfigError when the server refuses our fields, and _NotYet when it has no chat completions."""
        if not self._settings.probe:
            return
        refusal = await self._refusal_of_a_word((404, 405, 501))
        if refusal is not None and refusal[0] in _REFUSED:
            raise ConfigError(refusal[1])
        if refusal is not None:
            raise _NotYet(refusal[1])
        self._taken = True

    async def _find_fault(self, status: int) -> None:
        """After a refusal that our fields may be to blame for: raises NotReadyError if they are.

        A request is to blame when others were taken before it; so at most every second refusal costs a word.
        """
        if not self._settings.probe:
            return
        taken, self._taken = self._taken, False
        if taken and status not in REMEDIES:
            return
        async with self._asking_for_word:
            if not self._taken and self._refusal is None:
                await self._renew_refusal()
        if self._refusal is not None:
            raise NotReadyError(self._refusal, "unhealthy")

    async def _renew_refusal(self) -> None:
        found = await self._refusal_of_a_word(_MAY_BE_OURS)
        refusal = None if found is None else found[1]
        if refusal is not None and self._refusal is None:
            _log.error("the model's server takes no requests", base_url=self._url, reason=refusal)
        self._refusal, self._taken = refusal, refusal is None

    async def _refusal_of_a_word(self, also: Sequence[int] | frozenset[int]) -> tuple[int, str] | None:
        """Status and message of the refusal of a short request with the fields that every request has.

        None where it is taken, and where there is no answer soon or another error: that is no refusal.
        """
        # The roles are the prompt's: some models take no system message.
        roles = [role for role, _ in load_prompt(self._section.prompts, "critique").messages]
        try:
            messages = [{"role": role, "content": _WORD} for role in roles]
            answer = await self._complete(messages, _WORD_SECONDS, self._word_fields())
        except ServiceError as error:
            _log.warning("it is not known whether the server takes our fields", reason=str(error))
            return None
        status = status_of(answer)
        return (status, self._blame(status, answer)) if status in _REFUSED or status in also else None

    def _blame(self, status: int, answer: Answer) -> str:
        refused = f"the model's server refuses the model {self._model!r} and what every request has"
        remedy = REMEDIES.get(status)
        if remedy is not None:
            return f"{refused}: status {status}: {words_of(answer)}{remedy}"
        sent = ", ".join(sorted(self._word_fields()))
        return (
            f"{refused} ({sent}): status {status}: {words_of(answer)}; critic.openai.max_tokens_field renames a "
            "field, critic.openai.omit leaves one out, critic.openai.extra_body adds some, critic.openai.logprobs and "
            "critic.openai.grammar choose those of aligned decoding; critic.max_new_tokens, "
            "critic.chat_template_options and critic.prompts hold the rest"
        )

    def _word_fields(self) -> dict[str, Any]:
        """The fields of the request of a word: all that some request has."""
        return {**self._fields(), **(self._turns.fields(_WORD_GRAMMAR) if self.aligns else {})}

    def _fields(self, tokens: int | None = None) -> dict[str, Any]:
        """The fields of every request besides model and messages; ``tokens`` is its budget, if it is not the usual."""
        settings, options = self._settings, self._section.chat_template_options
        budget = {settings.max_tokens_field: self._section.max_new_tokens if tokens is None else tokens}
        return {
            **({} if "temperature" in settings.omit else {"temperature": 0}),
            **({} if "max_tokens" in settings.omit else budget),
            **({"chat_template_kwargs": options} if options else {}),
            **settings.extra_body,
        }

    async def _complete(self, messages: list[Message], seconds: float, fields: dict[str, Any]) -> Answer:
        """Raises EngineTimeoutError when there is no answer in ``seconds``, and EngineError when there is none."""
        body = {"model": self._model, "messages": messages, **fields}
        try:
            async with _in_time(seconds):
                return await self._send("POST", "chat/completions", json=body)
        except httpx.HTTPError as error:
            # An error's own words hold addresses, which are no caller's business.
            _log.warning("the model's server gave no answer", error=_reason(error))
            raise EngineError(f"the model's server gave no answer: {_kind(error)}") from error

    async def _send(self, method: str, path: str, **options: Any) -> Answer:
        """Raises httpx.HTTPError when there is no whole answer, or none that anybody would read."""
        content = bytearray()
        async with self._http.stream(method, path, **options) as answer:
            async for part in answer.aiter_bytes():
                content += part
                if len(content) > _MOST_ANSWER_BYTES:
                    raise httpx.ReadError(f"the answer is over {_MOST_ANSWER_BYTES} bytes")
        kind, retry_after = (answer.headers.get(name, "") for name in ("content-type", "retry-after"))
        return Answer(answer.status_code, kind.strip().lower(), retry_after, bytes(content), self._key)

    async def _watch(self) -> None:
        looks = 0
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            looks += 1
            silence = await self._look()
            if (silence is None) is not (self._silence is None):
                said = "answers again" if silence is None else "does not answer"
                _log.warning(f"the model's server {said}", base_url=self._url, reason=silence)
            self._silence = silence
            if self._refusal is not None and looks % _LOOKS_BETWEEN_WORDS == 0:
                async with self._asking_for_word:
                    await self._renew_refusal()

    async def _look(self) -> str | None:
        """Why the server does not answer; None when it does, though it may have no list of models."""
        try:
            answer = await self._get_models()
        except (_NotYet, httpx.HTTPError) as error:
            return type(error).__name__ if isinstance(error, httpx.HTTPError) else str(error)
        return f"/models says {answer.status}" if answer.status >= 500 and answer.status != 501 else None


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    """Raises EngineTimeoutError after ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineTimeoutError(
            f"the model's server gave no answer in {seconds:g} s; where that is too short for its queue and the "
            "longest critique, raise critic.openai.timeout_seconds or lower critic.max_new_tokens",
            min(AFTER_TIMEOUT_SECONDS, seconds),
        ) from None


def _aiohttp_transport() -> httpx.AsyncBaseTransport:
    # httpx's own transport carries a third of the requests at 32 connections (benchmarks/results/critic.json).
    from aiohttp import ClientError, ClientSession, DummyCookieJar, TCPConnector
    from httpx_aiohttp import AiohttpTransport

    class Transport(AiohttpTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            try:
                return await super().handle_async_request(request)
            except ClientError as error:
                # Some errors of aiohttp are not made errors of httpx, such as that of a status line which is none.
                raise httpx.RemoteProtocolError(f"{type(error).__name__}: {error}") from error

    def session() -> ClientSession:
        # The backend itself bounds how many requests are open.
        connector = TCPConnector(ssl=httpx.create_ssl_context(trust_env=False), limit=0)
        return ClientSession(connector=connector, cookie_jar=DummyCookieJar())

    return Transport(client=session)


def _kind(error: httpx.HTTPError) -> str:
    """What went wrong on the way, without the addresses that an error's own words hold."""
    return type(error.__cause__ or error).__name__


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _NotYet) else f"{type(error).__name__}: {error}"


def _shown(base_url: str) -> str:
    """The address for the log, without a password. Raises ConfigError when it is none."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"critic.openai.base_url is no URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"critic.openai.base_url is {base_url!r}; it must look like http://127.0.0.1:8000/v1")
    return str(url.copy_with(username=None, password=None)) if url.userinfo else base_url
