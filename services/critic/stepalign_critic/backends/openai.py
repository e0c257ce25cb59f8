"""A model behind any OpenAI-compatible server, through ``POST /chat/completions``: greedy, one request per critique.

The server applies its chat template to text, so this backend cannot keep control tokens out of a prompt: a server that
does not do so itself reads an attempt's ``<|im_end|>`` as the end of a turn. Backends with token ids keep them out.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from stepalign.errors import ConfigError
from stepalign.prompts import Message
from stepalign.secret_files import read_secret
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.admission import Admission
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.errors import EngineError, NotReadyError, SaturatedError, UnsupportedRequestError
from stepalign_run.config import CriticServerSection
from stepalign_run.logging import get_logger

_PROBE_SECONDS = 2.0
_START_PROBE_SECONDS = 0.5

_log = get_logger(__name__)


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


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
        self._model = settings.model
        self._admission = Admission(section.max_batch, section.max_queue)
        self._reachable = False
        self._probing: asyncio.Task[None] | None = None
        headers: dict[str, str] = {}
        if settings.api_key_file is not None:
            headers["authorization"] = f"Bearer {read_secret('critic.openai.api_key_file', settings.api_key_file)}"
        self._http = httpx.AsyncClient(
            base_url=settings.base_url.rstrip("/") + "/",
            headers=headers,
            transport=_aiohttp_transport() if transport is None else transport,
            timeout=settings.timeout_seconds,
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

        Raises ConfigError when it refuses our key, does not serve the model, or never answers.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.timeout_seconds
        told = ""
        while True:
            try:
                served = await self._served_models()
                break
            except (httpx.HTTPError, ValueError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
                    raise ConfigError(
                        f"{self._settings.base_url} refuses the key: status {error.response.status_code}; "
                        "set critic.openai.api_key_file"
                    ) from None
                reason = _no_models(error)
                if loop.time() > deadline:
                    raise ConfigError(
                        f"{self._settings.base_url} gave no list of models in {self._settings.timeout_seconds:g} s: "
                        f"{reason}"
                    ) from None
                if reason != told:
                    told = reason
                    _log.warning("waiting for the model's server", base_url=self._settings.base_url, reason=reason)
                await asyncio.sleep(_START_PROBE_SECONDS)
        self._model = _choose(self._model, served, self._settings.base_url or "")
        self._reachable = True
        self._probing = asyncio.create_task(self._probe())

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        body = {
            "model": self._model,
            "messages": prompt.messages,
            "temperature": 0,
            "max_tokens": self._section.max_new_tokens,
        }
        if self._section.chat_template_options:
            body["chat_template_kwargs"] = self._section.chat_template_options
        async with self._admission.place():
            try:
                answer = await self._http.post("chat/completions", json=body)
            except httpx.HTTPError as error:
                raise EngineError(f"the model's server gave no answer: {type(error).__name__}: {error}") from error
        return _read(answer)

    def expected_wait_seconds(self) -> float | None:
        return self._admission.expected_wait_seconds()

    def healthy(self) -> bool:
        """Whether the server answered the latest look, one every two seconds."""
        return self._reachable

    async def stop(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self._http.aclose()

    async def _served_models(self) -> list[str]:
        answer = await self._http.get("models", timeout=min(10.0, self._settings.timeout_seconds))
        answer.raise_for_status()
        listed: Any = answer.json()
        try:
            return [str(model["id"]) for model in listed["data"]]
        except (TypeError, KeyError) as error:
            raise ValueError(f"no list of models: {error!r}") from None

    async def _probe(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            try:
                await self._served_models()
                reachable = True
            except (httpx.HTTPError, ValueError):
                reachable = False
            if reachable != self._reachable:
                _log.warning("the model's server " + ("answers again" if reachable else "does not answer"))
            self._reachable = reachable


def _aiohttp_transport() -> httpx.AsyncBaseTransport:
    # httpx's own transport carries a third of the requests at 32 connections (benchmarks/results/critic.json).
    from httpx_aiohttp import AiohttpTransport

    return AiohttpTransport()


def _no_models(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 404:
        return "there is no /models (404): critic.openai.base_url ends before it, mostly in /v1"
    return f"{type(error).__name__}: {error}"


def _choose(wanted: str | None, served: list[str], base_url: str) -> str:
    if wanted is None and len(served) == 1:
        return served[0]
    if wanted in served:
        return wanted
    raise ConfigError(f"critic.openai.model is {wanted!r}; {base_url} serves {', '.join(served) or 'no model'}")


def _read(answer: httpx.Response) -> Generation:
    status = answer.status_code
    if status in (429, 503):
        raise SaturatedError(f"the model's server takes no more requests now: status {status}")
    if status in (400, 413, 422):
        raise UnsupportedRequestError(f"the model's server refuses this request: {answer.text[:500]}")
    if status != 200:
        raise EngineError(f"the model's server answered with status {status}: {answer.text[:500]}")
    try:
        completion = _Completion.model_validate_json(answer.content)
        choice = completion.choices[0]
        finish_reason = FinishReason(choice.finish_reason)
    except (ValidationError, IndexError, ValueError) as error:
        raise EngineError(f"the model's server sent no finished chat completion: {error}") from None
    usage = completion.usage or _Usage()
    return Generation(choice.message.content or "", finish_reason, usage.prompt_tokens, usage.completion_tokens)
