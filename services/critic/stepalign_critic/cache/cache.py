"""Equal requests get one critique. It is found by content, and made once for all who ask at the same time.

A key is the SHA-256 of everything that shapes an answer: the request, the critic (model, weights, prompts, backend),
the configuration of its decoding and this package's version. The caller's API key is part of it, so that no caller can
find out the requests of another one. Failures of the model are answers and are kept too; errors are not.

The cache looks for an answer in this process, then in the shared store, and makes it last. Requests for an answer in
the making wait for it; it is cancelled when all of them have hung up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from stepalign.types import CritiqueRequest, CritiqueResponse
from stepalign.validation import explain
from stepalign_critic.cache.store import CritiqueStore, StorePausedError, StoreUnavailableError
from stepalign_critic.tenant import caller
from stepalign_run.logging import get_logger

_log = get_logger(__name__)

Make = Callable[[], Awaitable[CritiqueResponse]]


class Source(StrEnum):
    """The source of an answer."""

    MISS = "miss"
    """It was made for this request."""
    HIT = "hit"
    """It was in this process."""
    SHARED = "shared"
    """Another replica, or this one before a restart, had put it into the store."""
    JOINED = "joined"
    """Another request was waiting for it already."""


class Found(NamedTuple):
    """An answer and its source. ``text`` is its JSON, where that is at hand."""

    response: CritiqueResponse
    source: Source
    text: str | None = None


class _Entry(BaseModel):
    """An entry of the shared store."""

    key: str
    response: CritiqueResponse


@dataclass
class _Flight:
    task: asyncio.Task[Found]
    waiting: int = 0


class CritiqueCache:
    """Keeps the ``entries`` newest answers of this process, and more in ``store``. 0 entries keep none here.

    ``decoding`` holds the parameters of decoding, which are part of every key. ``on_store_error`` is called when the
    store was of no use.
    """

    def __init__(
        self, entries: int, store: CritiqueStore | None = None, decoding: Mapping[str, Any] | None = None
    ) -> None:
        self._entries = entries
        self._store = store
        # Read here, once: finding out a distribution's version is reading and parsing a file.
        self._of_all_keys = json.dumps(
            {"decoding": dict(decoding or {}), "version": version("stepalign")}, sort_keys=True
        )
        # As JSON: an answer is a hundred objects, which the garbage collector would go through again and again.
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._flights: dict[str, _Flight] = {}
        self.on_store_error: Callable[[], None] = lambda: None

    def key_of(self, request: CritiqueRequest, critic: str) -> str:
        """The content address of an answer to the caller whose request this task answers.

        ``critic`` is the digest of the critic's identity and prompts (``CriticService.shaping``).
        """
        # No part holds a bare line break.
        parts = (self._of_all_keys, critic, caller() or "", request.model_dump_json())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def holds(self, key: str) -> bool:
        """Whether the answer is kept in this process or being made."""
        return key in self._kept or key in self._flights

    async def get_or_make(self, key: str, make: Make) -> Found:
        """The answer of this key. Errors of ``make`` are raised to all who wait for it."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return Found(CritiqueResponse.model_validate_json(kept), Source.HIT)
        flight = self._flights.get(key)
        joined = flight is not None
        if flight is None:
            flight = _Flight(asyncio.create_task(self._find_or_make(key, make)))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _, flight=flight: self._land(key, flight))
        flight.waiting += 1
        try:
            found = await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if flight.waiting == 0 and not flight.task.done():
                # Nobody waits any more. A new request must not join a task that is being cancelled.
                self._land(key, flight)
                flight.task.cancel()
                await asyncio.wait({flight.task})
            if flight.task.done() and not flight.task.cancelled():
                # Nobody may be left to raise a failure that comes while it is being cancelled.
                flight.task.exception()
        return found._replace(source=Source.JOINED) if joined else found

    def _land(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _find_or_make(self, key: str, make: Make) -> Found:
        found = await self.shared(key)
        if found is not None:
            return Found(found, Source.SHARED)
        made = await make()
        text = self._keep(key, made)
        if self._store is not None:
            try:
                await self._store.set(key, _Entry(key=key, response=made).model_dump_json())
            except StorePausedError:
                pass
            except StoreUnavailableError as error:
                self._note(str(error))
        return Found(made, Source.MISS, text)

    async def shared(self, key: str) -> CritiqueResponse | None:
        """The answer that stands in the store, which this process keeps from now on; None without one."""
        found = None if self._store is None else await self._look_up(self._store, key)
        if found is not None:
            self._keep(key, found)
        return found

    async def _look_up(self, store: CritiqueStore, key: str) -> CritiqueResponse | None:
        try:
            text = await store.get(key)
            if text is None:
                return None
            entry = _Entry.model_validate_json(text)
            if entry.key == key:
                return entry.response
            self._note("the shared cache has another request's answer at this key")
        except StorePausedError:
            pass
        except StoreUnavailableError as error:
            self._note(str(error))
        except ValidationError as error:
            # The entry is no answer of ours: a new one is made and replaces it.
            self._note(explain(error))
        return None

    def _note(self, error: str) -> None:
        self.on_store_error()
        _log.warning("the shared cache was of no use", error=error)

    def _keep(self, key: str, response: CritiqueResponse) -> str | None:
        """Keep an answer; gives its JSON where any are kept."""
        if not self._entries:
            return None
        text = self._kept[key] = response.model_dump_json()
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)
        return text

    async def close(self) -> None:
        """Close the store's connections."""
        if self._store is not None:
            await self._store.close()
