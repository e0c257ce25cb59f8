"""The service's Prometheus metrics. Each app has a registry of its own, so that tests and processes never share.

Units are in the names; ``outcome`` is a verdict or a failure reason, ``path`` a route or ``other``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    make_wsgi_app,
    start_http_server,
)

from stepalign.types import Critique, CritiqueFailure, CritiqueResponse
from stepalign_critic.cache import Source
from stepalign_critic.service import ModelAnswer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_PREFIX = "stepalign_critic_"
_LATENCY_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The service's metrics, and those of its engine where ``engine`` collects them."""

    def __init__(self, engine: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry()
        if engine is not None:
            self.registry.register(engine)
        self.requests = Counter(
            f"{_PREFIX}requests", "HTTP requests by status; 499: hung up", ["path", "status"], registry=self.registry
        )
        self.critiques = Counter(
            f"{_PREFIX}critiques", "Answers of the critic by verdict or failure", ["outcome"], registry=self.registry
        )
        self.seconds = Histogram(
            f"{_PREFIX}critique_seconds",
            "Time from a critique's request to its answer",
            buckets=_LATENCY_BUCKETS_SECONDS,
            registry=self.registry,
        )
        self.connections = Gauge(f"{_PREFIX}connections", "Open connections", registry=self.registry)
        self.in_flight = Gauge(f"{_PREFIX}in_flight", "Critiques that are being made or wait", registry=self.registry)
        self.tokens = Counter(
            f"{_PREFIX}tokens", "Tokens read (prompt) and written (completion)", ["kind"], registry=self.registry
        )
        self.sources = Counter(f"{_PREFIX}cache", "Answers by where they came from", ["source"], registry=self.registry)
        self.answers = Counter(
            f"{_PREFIX}answers",
            "Answers of the model by the prompt that they answer and by verdict or failure",
            ["prompt", "outcome"],
            registry=self.registry,
        )
        self.forced = Counter(
            f"{_PREFIX}forced",
            "Parts of critiques that the known answer or a bound settled",
            ["forced"],
            registry=self.registry,
        )
        self.answers_unknown = Counter(
            f"{_PREFIX}answers_unknown",
            "Comparisons of final answers that the grader could not decide",
            registry=self.registry,
        )
        self.store_errors = Counter(
            f"{_PREFIX}cache_store_errors",
            "The shared cache was asked and was of no use",
            registry=self.registry,
        )
        # Their library looks for a series under a lock, which takes longer than to count. There are few.
        self._of_requests = cache(self.requests.labels)
        self._of_critiques = cache(self.critiques.labels)
        self._of_sources = cache(self.sources.labels)
        self._of_answers = cache(self.answers.labels)
        self._of_tokens = cache(self.tokens.labels)
        self._of_forced = cache(self.forced.labels)

    def count_request(self, path: str, status: int) -> None:
        """Count an HTTP request."""
        self._of_requests(path, str(status)).inc()

    def count_critique(self, response: CritiqueResponse, source: Source) -> None:
        """Count a response to a client."""
        self._of_critiques(outcome_of(response)).inc()
        self._of_sources(source).inc()

    def count_answer(self, answer: ModelAnswer) -> None:
        """Count an answer of the model, also one that no response holds."""
        self._of_answers(answer.prompt, _label(answer.outcome)).inc()
        self._of_tokens("prompt").inc(answer.prompt_tokens)
        self._of_tokens("completion").inc(answer.completion_tokens)
        for forced in answer.forced:
            self._of_forced(forced.value).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


@contextmanager
def exposed(metrics: Metrics, host: str, port: int) -> Iterator[str]:
    """Serve ``metrics`` from a thread; gives their address. Raises OSError when it is taken."""
    server, thread = start_http_server(port, host, metrics.registry)
    server.set_app(_with_head(make_wsgi_app(metrics.registry)))
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _with_head(app: WSGIApplication) -> WSGIApplication:
    """Answer a HEAD as the GET without its body; Prometheus' own server refuses it."""

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "HEAD":
            return app(environ, start_response)
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], _: Any = None) -> Callable[[bytes], object]:
            started.append((status, headers))
            return lambda _: None

        body = b"".join(app({**environ, "REQUEST_METHOD": "GET"}, start))
        ((status, headers),) = started
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        return []

    return answer


def outcome_of(response: CritiqueResponse) -> str:
    """The verdict, or the reason of the failure."""
    outcome = response.critique or response.failure
    assert outcome is not None
    return _label(outcome)


def _label(outcome: Critique | CritiqueFailure) -> str:
    return outcome.verdict.value if isinstance(outcome, Critique) else outcome.reason.value
