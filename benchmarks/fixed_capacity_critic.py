"""The critic service with a backend of known capacity: so many slots, each busy for a fixed time per request.

Everything around the backend is the product's: HTTP, API keys, readiness, drain. So a loss by the load
balancer can be told from one by a model. The answers are the lab's exact critiques.

    python -m benchmarks.fixed_capacity_critic configs/lab.toml --slots 4 --seconds 0.25
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import typer

from stepalign.prompts import Message
from stepalign.types import CriticIdentity, FinishReason
from stepalign_critic.backends.base import Generation, RenderedPrompt
from stepalign_critic.process import serve
from stepalign_lab.checker import exact_critique
from stepalign_run.config import load_critic_config
from stepalign_run.logging import configure_logging


class FixedCapacityBackend:
    """Answers ``slots`` requests at once, each after ``seconds``. Is ready ``load_seconds`` after its start."""

    name = "fixed-capacity"
    recovers = True

    def __init__(self, slots: int, seconds: float, load_seconds: float) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._seconds = seconds
        self._load_seconds = load_seconds

    def identity(self, prompt_version: str) -> CriticIdentity:
        return CriticIdentity(model="lab", weights_revision="exact", prompt_version=prompt_version, backend=self.name)

    async def start(self) -> None:
        await asyncio.sleep(self._load_seconds)

    def render(self, messages: list[Message]) -> None:
        return None

    async def generate(self, prompt: RenderedPrompt) -> Generation:
        async with self._slots:
            await asyncio.sleep(self._seconds)
        text = exact_critique(prompt.request.question, prompt.request.split().tagged)
        return Generation(text=text, finish_reason=FinishReason.STOP, prompt_tokens=0, completion_tokens=0)

    def expected_wait_seconds(self) -> None:
        return None

    def healthy(self) -> bool:
        return True

    async def stop(self) -> None:
        return


def main(
    config: Path = typer.Argument(help="TOML configuration; its backend is not used."),
    slots: int = typer.Option(4, min=1, help="Requests answered at once."),
    seconds: float = typer.Option(0.25, min=0, help="Time that each takes."),
    load_seconds: float = typer.Option(0.0, min=0, help="Time until the service is ready, as if a model were loaded."),
) -> None:
    """Serve a critic of fixed capacity."""
    # Its callers send one request many times, and each of them is to take its time.
    settings = load_critic_config(config, ["--critic.cache_entries", "0"])
    # A line for each critique would go through the engine, on the cores on which the balancer is measured.
    configure_logging("critic", logging.WARNING)
    serve(settings.critic, FixedCapacityBackend(slots, seconds, load_seconds))


if __name__ == "__main__":
    typer.run(main)
