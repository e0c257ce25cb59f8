"""The service over HTTP beside its peers, with an engine of fixed latency: no model takes part.

Answers come from the engine and never from the cache, which looks for every one of them: the requests differ and
outnumber its places, and every answer is checked to say ``miss``. Log lines are written as ``stepalign critic``
writes them, to a file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.critic.engine import PATH
from benchmarks.critic.load import LoadSettings, Rounds, Target, measure_by_turns
from benchmarks.critic.overhead import Overhead, OverheadSettings, measure_overhead
from benchmarks.critic.processes import Server, serving
from benchmarks.critic.workload import requests
from benchmarks.wire import request_bytes


@dataclass(frozen=True)
class Http:
    """Overhead with an engine that takes its time, throughput with one that takes none."""

    overhead: Overhead
    bare_overhead: Overhead
    throughput: Rounds
    bare_throughput: Rounds


@dataclass(frozen=True)
class Transports:
    """Throughput of the service before an OpenAI-compatible server that answers at once, by its HTTP client's."""

    httpx: Rounds
    aiohttp: Rounds


def measure_http(overhead: OverheadSettings, load: LoadSettings) -> Http:
    """The service and a bare FastAPI route over the same engine, by turns."""
    seconds = ("--seconds", str(overhead.engine_seconds))
    with serving("critic", *seconds) as critic, serving("bare", *seconds) as bare:
        of_service, of_bare = measure_overhead(service(critic), route(bare), overhead)
    through = measure_throughput(load)
    return Http(of_service, of_bare, through["service"], through["bare"])


def measure_throughput(load: LoadSettings) -> dict[str, Rounds]:
    """Requests a second of the ``service`` and of the ``bare`` route over an engine that answers at once."""
    with serving("critic") as critic, serving("bare") as bare:
        return measure_by_turns({"service": service(critic), "bare": route(bare)}, load)


def measure_transports(load: LoadSettings) -> Transports:
    """The backend ``openai`` over httpx's own transport and over aiohttp's, before the same server, by turns."""
    with (
        serving("model") as model,
        serving("critic-over", model.url, "httpx") as over_httpx,
        serving("critic-over", model.url, "aiohttp") as over_aiohttp,
    ):
        targets = {"httpx": service(over_httpx), "aiohttp": service(over_aiohttp)}
        return Transports(**measure_by_turns(targets, load))


def endless_requests() -> Iterator[bytes]:
    """Requests that are ready to be sent."""
    bodies = [request.model_dump_json().encode() for request in requests()]
    return itertools.cycle([request_bytes("POST", PATH, body=body) for body in bodies])


def service(server: Server) -> Target:
    """The critic service, which has to make a critique for each request."""
    return Target(server, (b"x-stepalign-cache: miss", b'"failure":null'), endless_requests())


def route(server: Server) -> Target:
    """The bare route."""
    return Target(server, (), endless_requests())
