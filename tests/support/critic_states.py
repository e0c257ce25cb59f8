"""A critic service in a state, as a process of its own: ``python -m support.critic_states STATE``.

Writes one line of JSON, its address and the versions of its libraries, once it is in that state; it stays there
until its standard input ends.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import fastapi
import httpx
import starlette
import uvicorn

from stepalign.errors import ConfigError
from stepalign_critic.app import AppSettings
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.base import Backend, Generation, RenderedPrompt
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.cache import CritiqueCache
from stepalign_critic.errors import EngineError
from stepalign_critic.http.access import ApiKeys
from stepalign_critic.http.rate_limit import RateLimiter
from stepalign_critic.service import CriticService
from stepalign_lab.checker import exact_critique
from stepalign_run.config import CriticServerSection
from stepalign_run.logging import configure_logging
from support.critic_servers import CORRECT, QUESTION, GatedBackend, metric, serving, wait_until

KEY = "sk-one"
PROMPTS = "chat-v1"
# Longer than anybody looks at one state.
PATIENCE_SECONDS = 600.0


class Ready(ProgramBackend):
    """Critiques every attempt as one at ``QUESTION``."""

    def __init__(self) -> None:
        super().__init__("any", lambda _, attempt: exact_critique(QUESTION, attempt), "r")


class Unstartable(Ready):
    async def start(self) -> None:
        raise ConfigError("no space left")


class Dead(Ready):
    def healthy(self) -> bool:
        return False


class Broken(Ready):
    async def generate(self, prompt: RenderedPrompt) -> Generation:
        raise EngineError("the engine broke")


class Behind(Ready):
    """Expects a wait that outlasts every deadline."""

    def expected_wait_seconds(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 1e9


@contextmanager
def loading() -> Iterator[str]:
    backend = GatedBackend(PATIENCE_SECONDS)
    with serving(CriticService(backend, PROMPTS)) as url:
        yield url
        backend.load.set()


@contextmanager
def saturated() -> Iterator[str]:
    """One request is being generated for and one waits, which is all that may."""
    backend = GatedBackend(PATIENCE_SECONDS)
    backend.load.set()
    with serving(CriticService(backend, PROMPTS)) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        for count in (1, 2):
            asking = {"json": CORRECT, "timeout": PATIENCE_SECONDS}
            threading.Thread(target=httpx.post, args=(f"{url}/v1/critiques",), kwargs=asking, daemon=True).start()
            wait_until(lambda count=count: metric(url, "stepalign_critic_in_flight") == count and backend.attempts)
        yield url
        assert metric(url, "stepalign_critic_in_flight") == 2 and backend.attempts == [CORRECT["attempt"]]
        backend.gate.set()


@contextmanager
def started(
    backend: Backend, settings: AppSettings | None = None, then: Callable[[CriticService], object] = lambda _: None
) -> Iterator[str]:
    """A critic whose backend has started or failed to, after ``then``."""
    service = CriticService(backend, PROMPTS)
    with serving(service, settings) as url:
        wait_until(lambda: service.lifecycle.ready_since is not None or service.lifecycle.failure is not None)
        then(service)
        yield url


GUARDED = AppSettings(api_keys=ApiKeys([KEY]))
STATES = {
    "loading": loading,
    "ready": lambda: started(Ready(), AppSettings(cache=CritiqueCache(100, None, ()))),
    "saturated": saturated,
    "draining": lambda: started(Ready(), then=lambda service: service.lifecycle.drain()),
    "stopping": lambda: started(Ready(), then=lambda service: service.lifecycle.stop()),
    "failed": lambda: started(Unstartable()),
    "unhealthy": lambda: started(Dead()),
    "broken": lambda: started(Broken()),
    "behind": lambda: started(Behind()),
    "unsupported": lambda: started(
        create_backend(CriticServerSection(backend="program", checker="lab", prompts=PROMPTS))
    ),
    "guarded": lambda: started(Ready(), GUARDED),
    # With a clock that stands still: one critique, and never another.
    "limited": lambda: started(Ready(), replace(GUARDED, limiter=RateLimiter(1, clock=lambda: 0.0))),
}


def main(state: str) -> None:
    configure_logging("critic")
    with STATES[state]() as url:
        versions = {module.__name__: module.__version__ for module in (fastapi, starlette, uvicorn)}
        print(json.dumps({"url": url, "versions": versions}), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
