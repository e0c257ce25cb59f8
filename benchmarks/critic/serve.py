"""The servers that are measured, each in a process of its own: uvicorn with one worker and the critic's settings.

    python -m benchmarks.critic.serve critic FOLDER --seconds 0.005

The address goes to ``FOLDER/critic.url``, once the process listens.
"""

from __future__ import annotations

import socket
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx
import typer
import uvicorn

from benchmarks.critic.engine import FixedLatencyBackend, FixedLatencyEngine, ModelServer, bare_app
from benchmarks.critic.processes import ROOT, URL_FILE
from benchmarks.critic.workload import WRONG_STEP, correction, is_wrong_step
from stepalign_critic.backends import create_backend
from stepalign_critic.backends.openai import OpenAIBackend
from stepalign_critic.process import freeze, serve
from stepalign_run.config import CriticServerSection, load_critic_config
from stepalign_run.folder.files import replace_text
from stepalign_run.logging import configure_logging

_KEPT_CONNECTIONS = 100

program = typer.Typer()
SECONDS = typer.Option(0.0, min=0, help="Time that the engine takes for an answer.")


class Transport(StrEnum):
    HTTPX = "httpx"
    AIOHTTP = "aiohttp"


@program.command()
def critic(folder: Path, seconds: float = SECONDS) -> None:
    """The critic service over the engine."""
    serve(_section(folder), FixedLatencyBackend(FixedLatencyEngine(correction(), seconds), WRONG_STEP))


@program.command()
def bare(folder: Path, seconds: float = SECONDS) -> None:
    """A bare FastAPI route over the engine."""
    _serve_app(bare_app(FixedLatencyEngine(correction(), seconds)), folder, lifespan="on")


@program.command()
def model(folder: Path) -> None:
    """An OpenAI-compatible server that answers at once."""
    _serve_app(ModelServer(is_wrong_step, correction()), folder, lifespan="off")


@program.command()
def critic_over(folder: Path, url: str, transport: Transport) -> None:
    """The critic service before an OpenAI-compatible server at ``url``."""
    section = _section(folder, "--critic.openai.base_url", f"{url}/v1")
    if transport is Transport.AIOHTTP:
        serve(section, create_backend(section))
    else:
        # By its default httpx keeps 20 connections and would open the others anew for each request.
        kept = httpx.Limits(max_connections=_KEPT_CONNECTIONS, max_keepalive_connections=_KEPT_CONNECTIONS)
        serve(section, OpenAIBackend(section, httpx.AsyncHTTPTransport(limits=kept)))


def _section(folder: Path, *critic: str) -> CriticServerSection:
    """The shipped defaults of a critic alone: prompt set, aligned decoding, grader, cache and log lines."""
    configure_logging("critic")
    own = ["--critic.address_file", str(folder / URL_FILE), "--critic.port", "0"]
    # Of the known attempts, which are asked before the first request, the engines here know nothing.
    checked = ["--critic.check_known_attempts", "false"]
    return load_critic_config(ROOT / "configs" / "critic.toml", [*own, *checked, *critic]).critic


def _serve_app(app: Any, folder: Path, lifespan: Any) -> None:
    """With the service's own settings of socket and garbage collector."""
    freeze()
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    replace_text(folder / URL_FILE, f"http://127.0.0.1:{listening.getsockname()[1]}")
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan=lifespan)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    program()
