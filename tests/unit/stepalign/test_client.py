"""The critic client over a scripted transport and a fake clock: retries, pauses, deadlines, typed errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from stepalign.client import CriticClient, SyncCriticClient
from stepalign.errors import ConfigError, CriticError, CriticRequestError, CriticUnavailableError
from stepalign.types import CritiqueRequest, CritiqueResponse

REQUEST = CritiqueRequest(question="3 + 4", attempt="<step_1> 3 + 4 = 7 </step_1>")
RESPONSE = {
    "id": "crq_1",
    "attempt": {"rule": "tags", "steps": [[0, 28]], "answer": None, "answer_rule": None, "tagged": None},
    "critique": None,
    "failure": {"reason": "unparseable", "detail": "d", "text": "t"},
    "context": None,
    "critic": {"model": "m", "weights_revision": "w", "prompt_version": "p", "backend": "b"},
    "usage": {"prompt_tokens": 1, "completion_tokens": 2},
}
Reply = httpx.Response | Exception


def ok() -> httpx.Response:
    return httpx.Response(200, json=RESPONSE)


def refused(status: int, code: str = "saturated", **headers: str) -> httpx.Response:
    body = {"error": {"message": "no", "type": "server_error", "code": code, "param": None}}
    return httpx.Response(status, json=body, headers={key.replace("_", "-"): value for key, value in headers.items()})


class World:
    """Replies in order (the last one for ever), a clock that only pauses move, and a record of both."""

    def __init__(self, *replies: Reply, latency: float = 0.0) -> None:
        self.replies = list(replies)
        self.latency = latency
        self.requests: list[httpx.Request] = []
        self.pauses: list[float] = []
        self.now = 1000.0

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.now += self.latency
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def call(self, act: Callable[[CriticClient], Any], **options: Any) -> Any:
        settings = {"timeout": 60.0, "backoff": 1.0, "max_backoff": 8.0, "uniform": lambda: 0.5, **options}

        async def main() -> Any:
            transport = httpx.MockTransport(self.handle)
            async with CriticClient(
                "http://critic", transport=transport, sleep=self.sleep, clock=lambda: self.now, **settings
            ) as client:
                return await act(client)

        return asyncio.run(main())

    def critique(self, **options: Any) -> CritiqueResponse:
        return self.call(lambda client: client.critique(REQUEST), **options)


def test_a_request_is_sent_as_it_is_and_the_answer_read() -> None:
    world = World(ok())
    assert world.critique() == CritiqueResponse.model_validate(RESPONSE)
    (sent,) = world.requests
    assert (sent.method, sent.url.path) == ("POST", "/v1/critiques")
    assert CritiqueRequest.model_validate_json(sent.content) == REQUEST
    assert world.pauses == []


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_trouble_is_retried(status: int) -> None:
    world = World(refused(status), ok())
    assert world.critique().id == "crq_1"
    assert len(world.requests) == 2


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("x"), httpx.ReadError("x"), httpx.RemoteProtocolError("x"), httpx.ReadTimeout("x")]
)
def test_a_failed_connection_is_retried(error: Exception) -> None:
    world = World(error, ok())
    assert world.critique().id == "crq_1"
    assert len(world.requests) == 2


@pytest.mark.parametrize(("code", "level"), [("loading", "INFO"), ("saturated", "WARNING")])
def test_a_critic_that_loads_is_no_warning(code: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="stepalign.client")
    World(refused(503, code), ok()).critique()
    assert [record.levelname for record in caplog.records if record.name == "stepalign.client"] == [level]


def test_pauses_double_up_to_their_limit_with_jitter() -> None:
    world = World(*[refused(503)] * 6, ok())
    world.critique()
    assert world.pauses == [0.75, 1.5, 3.0, 6.0, 6.0, 6.0]


@pytest.mark.parametrize(("draw", "pause"), [(0.0, 0.5), (0.999, 0.9995)])
def test_jitter_spans_half_to_whole_of_a_pause(draw: float, pause: float) -> None:
    world = World(refused(503), ok())
    world.critique(uniform=lambda: draw)
    assert world.pauses == [pytest.approx(pause)]


def test_a_pause_is_never_shorter_than_retry_after() -> None:
    world = World(refused(503, retry_after="7"), ok())
    world.critique()
    assert world.pauses == [7.75]


def test_retry_after_may_be_a_date() -> None:
    world = World(refused(429, retry_after=format_datetime(datetime.now(UTC) + timedelta(seconds=20))), ok())
    world.critique()
    assert 18 <= world.pauses[0] <= 21


@pytest.mark.parametrize("value", ["soon", "Mon, 01 Jan 99999999999 00:00:00 GMT"])
def test_a_retry_after_that_is_neither_is_ignored(value: str) -> None:
    world = World(refused(503, retry_after=value), ok())
    world.critique()
    assert world.pauses == [0.75]


@pytest.mark.parametrize("value", ["9" * 400, "86400"])
def test_a_retry_after_is_an_hour_at_most(value: str) -> None:
    with pytest.raises(CriticUnavailableError) as unavailable:
        World(refused(503, retry_after=value)).critique()
    assert unavailable.value.retry_after in (None, 3600.0)


def test_what_takes_longer_than_the_engine_may_is_not_asked_again_in_the_same_call() -> None:
    world = World(refused(504, code="engine_timeout", retry_after="7"), ok())
    with pytest.raises(CriticUnavailableError, match="504 engine_timeout") as unavailable:
        world.critique()
    assert (unavailable.value.code, unavailable.value.retry_after, world.pauses) == ("engine_timeout", 7.0, [])


def test_an_answer_that_is_no_critique_is_told_without_links() -> None:
    with pytest.raises(CriticError, match=r"no critique response: id: Field required; .*; and \d more") as error:
        World(httpx.Response(200, json={"x": 1})).critique()
    assert "://" not in str(error.value)


def test_the_deadline_ends_the_tries_with_the_last_reason() -> None:
    world = World(refused(503, code="loading"))
    with pytest.raises(CriticUnavailableError, match=r"gave up after 4 tries in 6 s \(timeout\); last: 503 loading"):
        world.critique(timeout=6.0)
    assert world.now - 1000 < 6.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    world = World(refused(503, retry_after="100"))
    with pytest.raises(CriticUnavailableError) as unavailable:
        world.critique(timeout=60.0)
    assert unavailable.value.retry_after == 100
    assert world.pauses == []


def test_the_time_of_the_calls_counts_towards_the_deadline() -> None:
    world = World(httpx.ReadTimeout("slow"), latency=10.0)
    with pytest.raises(CriticUnavailableError, match="ReadTimeout"):
        world.critique(timeout=9.0)
    assert len(world.requests) == 1


def test_a_call_that_never_ends_is_given_up_at_the_deadline() -> None:
    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(30)
        raise AssertionError("not reached")

    async def main() -> None:
        async with CriticClient("http://critic", timeout=0.1, transport=httpx.MockTransport(hang)) as client:
            await client.critique(REQUEST)

    with pytest.raises(CriticUnavailableError, match="TimeoutError"):
        asyncio.run(main())


@pytest.mark.parametrize(("status", "code"), [(422, "prompt_too_long"), (413, "body_too_large"), (404, "not_found")])
def test_a_refused_request_is_not_retried(status: int, code: str) -> None:
    world = World(refused(status, code))
    with pytest.raises(CriticRequestError) as request_error:
        world.critique()
    assert (request_error.value.status, request_error.value.code) == (status, code)
    assert len(world.requests) == 1


def test_a_refusal_in_foreign_words_is_quoted() -> None:
    with pytest.raises(CriticRequestError, match="403: no answer of a critic: '<html>forbidden") as request_error:
        World(httpx.Response(403, text="<html>forbidden</html>")).critique()
    assert request_error.value.code is None


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, text="hello"),
        httpx.Response(200, json={"id": "crq_1"}),
        httpx.Response(200, json={**RESPONSE, "failure": None}),
        httpx.Response(204),
        refused(500, "internal_error"),
        httpx.Response(302, headers={"location": "/elsewhere"}),
    ],
)
def test_an_answer_that_is_no_critique_is_an_error_and_not_retried(reply: httpx.Response) -> None:
    world = World(reply)
    with pytest.raises(CriticError) as error:
        world.critique()
    assert type(error.value) is CriticError
    assert len(world.requests) == 1


def test_all_tries_of_a_call_share_a_request_id_and_calls_do_not() -> None:
    world = World(refused(503), ok())
    world.call(lambda client: client.critique(REQUEST, request_id="rollout-7"))
    world.critique()
    ids = [request.headers["x-request-id"] for request in world.requests]
    assert ids[:2] == ["rollout-7", "rollout-7"]
    assert ids[2].startswith("req_")


def test_every_try_says_how_many_milliseconds_remain() -> None:
    world = World(refused(503), refused(503, retry_after="7"), ok(), latency=0.25)
    world.critique(timeout=20.0)
    assert world.pauses == [0.75, 8.5]
    assert [request.headers["x-request-timeout-ms"] for request in world.requests] == ["20000", "19000", "10250"]


def test_a_deadline_that_no_header_may_say_is_not_sent_before_it_is_near() -> None:
    world = World(refused(503, retry_after="100"), ok())
    world.critique(timeout=3_650.0)
    assert [request.headers.get("x-request-timeout-ms") for request in world.requests] == [None, "3549250"]


def numbered(count: int) -> list[CritiqueRequest]:
    return [REQUEST.model_copy(update={"question": str(i)}) for i in range(count)]


def question_of(request: httpx.Request) -> int:
    return int(CritiqueRequest.model_validate_json(request.content).question)


class Turns:
    """Answers the fourth question with a 422, and of the others those first that came last. Notes how many are open."""

    def __init__(self, together: int) -> None:
        self._together = together
        self._waiting: list[asyncio.Event] = []
        self.most = 0

    async def handle(self, request: httpx.Request) -> httpx.Response:
        turn = asyncio.Event()
        self._waiting.append(turn)
        self.most = max(self.most, len(self._waiting))
        if len(self._waiting) == self._together:
            self._waiting.pop().set()
        await turn.wait()
        # Let calls that may be made now be made, before the next answer is given.
        for _ in range(50):
            await asyncio.sleep(0)
        if self._waiting:
            self._waiting.pop().set()
        number = question_of(request)
        return (
            refused(422, "prompt_too_long") if number == 3 else httpx.Response(200, json=RESPONSE | {"id": f"{number}"})
        )


@pytest.mark.parametrize("concurrency", [1, 4])
def test_many_critiques_come_in_order_with_errors_in_their_places(concurrency: int) -> None:
    turns = Turns(concurrency)

    async def main() -> list[CritiqueResponse | CriticError]:
        async with CriticClient("http://critic", transport=httpx.MockTransport(turns.handle)) as client:
            return await client.critique_many(iter(numbered(8)), concurrency=concurrency)

    outcomes = asyncio.run(main())
    refusal = outcomes.pop(3)
    assert [outcome.id for outcome in outcomes if isinstance(outcome, CritiqueResponse)] == list("0124567")
    assert isinstance(refusal, CriticRequestError) and refusal.code == "prompt_too_long"
    assert turns.most == concurrency


def test_each_of_many_calls_has_a_deadline_and_tries_of_its_own() -> None:
    world = World(refused(503), ok(), refused(503), refused(503), ok(), refused(503))
    first, second, third = world.call(lambda client: client.critique_many(numbered(3), concurrency=1), timeout=5.0)
    assert (first.id, second.id) == ("crq_1", "crq_1")
    assert isinstance(third, CriticUnavailableError)
    assert [question_of(request) for request in world.requests[:5]] == [0, 0, 1, 1, 1]
    assert world.now - 1000 > 5.0


def test_many_critiques_at_no_call_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="concurrency is 0"):
        World(ok()).call(lambda client: client.critique_many([REQUEST], concurrency=0))
    assert World(ok()).call(lambda client: client.critique_many([])) == []


def test_a_synchronous_client_answers_and_raises_as_the_other_does() -> None:
    replies = [ok(), refused(422, "prompt_too_long"), ok(), refused(422), httpx.Response(200)]
    with SyncCriticClient("http://critic", transport=httpx.MockTransport(lambda _: replies.pop(0))) as client:
        assert client.critique(REQUEST).id == "crq_1"
        with pytest.raises(CriticRequestError, match="prompt_too_long"):
            client.critique(REQUEST)
        good, bad = client.critique_many([REQUEST] * 2, concurrency=1)
        client.wait_ready()
    assert isinstance(good, CritiqueResponse) and isinstance(bad, CriticRequestError)


def test_an_interrupted_call_of_a_synchronous_client_is_given_up() -> None:
    begun, given_up = threading.Event(), threading.Event()

    async def handle(request: httpx.Request) -> httpx.Response:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()
        raise AssertionError("not reached")

    def interrupted_wait() -> None:
        assert begun.wait(10)
        raise KeyboardInterrupt

    with SyncCriticClient("http://critic", transport=httpx.MockTransport(handle)) as client:
        start = client._portal.start_task_soon

        def start_and_be_interrupted(act: Callable[[], Any]) -> Future[Any]:
            running = start(act)
            running.result = interrupted_wait
            return running

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(client._portal, "start_task_soon", start_and_be_interrupted)
            client.critique(REQUEST)
        assert given_up.wait(10)


def test_a_process_ends_though_its_synchronous_client_was_never_closed() -> None:
    code = "from stepalign.client import SyncCriticClient; client = SyncCriticClient('http://critic')"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_synchronous_client_at_a_wrong_address_starts_nothing() -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match="the critic's address"):
        SyncCriticClient("ftp://critic")
    assert threading.active_count() == before


def test_the_served_critics_are_listed_in_one_try() -> None:
    model = {"id": "m", "created": 0, "weights_revision": "w", "prompt_version": "p", "backend": "b"}
    (found,) = World(httpx.Response(200, json={"data": [model]})).call(lambda client: client.models()).data
    assert (found.id, found.weights_revision) == ("m", "w")
    busy = World(refused(503, "loading"))
    with pytest.raises(CriticUnavailableError, match="loading"):
        busy.call(lambda client: client.models())
    assert len(busy.requests) == 1 and busy.requests[0].url.path == "/v1/models"
    with pytest.raises(CriticError, match="no list of models"):
        World(httpx.Response(200, json={})).call(lambda client: client.models())
    transport = httpx.MockTransport(lambda _: refused(401))
    with SyncCriticClient("http://critic", transport=transport) as client, pytest.raises(CriticRequestError):
        client.models()


def test_wait_ready_polls_until_the_critic_is_ready() -> None:
    world = World(httpx.ConnectError("x"), refused(503, "loading"), httpx.Response(200, json={"status": "ready"}))
    world.call(lambda client: client.wait_ready(timeout=5, poll=0.5))
    assert world.pauses == [0.5, 0.5]
    assert {request.url.path for request in world.requests} == {"/health/ready"}


def test_wait_ready_gives_up_with_the_last_reason() -> None:
    world = World(refused(503, "loading"))
    with pytest.raises(CriticUnavailableError, match=r"not ready after 2 s: 503 loading"):
        world.call(lambda client: client.wait_ready(timeout=2, poll=0.5))
    assert world.now - 1000 <= 2


def test_wait_ready_refuses_something_else_than_a_critic() -> None:
    with pytest.raises(CriticError, match="is no critic"):
        World(httpx.Response(404)).call(lambda client: client.wait_ready(timeout=2))


@pytest.mark.parametrize("url", ["127.0.0.1:8300", "ftp://critic", "http://", "http://[::1"])
def test_an_address_that_is_no_http_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="the critic's address"):
        CriticClient(url)


@pytest.mark.parametrize("key", ["", "sk-secret\n", "sk secret", " sk-secret", "sk-sécret", "sk-secret\x00"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="the API key") as refused:
        CriticClient("http://critic", api_key=key)
    assert "cret" not in str(refused.value)


class ThenSilent(httpx.AsyncBaseTransport):
    """Answers the first try with ``first``, or fails with it, and no other one."""

    def __init__(self, first: httpx.Response | Exception) -> None:
        self._first: httpx.Response | Exception | None = first

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        first, self._first = self._first, None
        if isinstance(first, Exception):
            raise first
        if first is None:
            await asyncio.sleep(60)
            raise AssertionError("cut short")
        return first


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (
            httpx.ConnectError("refused"),
            r"2 tries.*critic:1: TimeoutError.*; before it: .*critic:1: ConnectError: refused",
        ),
        (refused(502, "engine_error"), r"2 tries.*TimeoutError.*; before it: 502 engine_error"),
    ],
)
def test_a_last_try_that_the_deadline_cut_short_does_not_hide_the_reason(
    first: httpx.Response | Exception, said: str
) -> None:
    """Nor is it one: an engine that failed once has not failed every time."""

    async def main() -> None:
        async with CriticClient("http://critic:1", timeout=0.3, backoff=0.01, transport=ThenSilent(first)) as client:
            await client.critique(REQUEST)

    with pytest.raises(CriticUnavailableError, match=said):
        asyncio.run(main())


def test_a_try_without_an_answer_says_how_long_it_waited_and_for_whom() -> None:
    class Silent(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(60)
            raise AssertionError("cut short")

    async def main() -> None:
        async with CriticClient("http://critic:1", timeout=0.2, transport=Silent()) as client:
            await client.critique(REQUEST)

    with pytest.raises(CriticUnavailableError, match=r"after 1 try in 0\.2 s .*critic:1: TimeoutError after 0\.2 s"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda client: client.critique({"question": "q"}), "not dict"),
        (lambda client: client.critique_many(REQUEST), "not one request"),
        (lambda client: client.critique_many([{"question": "q"}]), "not dict"),
    ],
)
def test_what_is_no_request_is_refused_by_its_type(call: Any, said: str) -> None:
    async def main() -> None:
        async with CriticClient("http://critic:1") as client:
            await call(client)

    with pytest.raises(TypeError, match=said):
        asyncio.run(main())


def test_an_address_with_a_path_is_named_at_a_404() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            404, json={"error": {"message": "Not Found", "type": "t", "code": "not_found", "param": None}}
        )

    async def main() -> None:
        async with CriticClient("http://critic:1/v1", transport=httpx.MockTransport(answer)) as client:
            await client.critique(REQUEST)

    with pytest.raises(
        CriticRequestError, match=r"is http://critic:1/v1/v1/critiques the critic's address, which has no path"
    ):
        asyncio.run(main())


def test_a_closed_client_says_so() -> None:
    client = SyncCriticClient("http://critic:1")
    client.close()
    with pytest.raises(RuntimeError, match="this client is closed"):
        client.critique(REQUEST)
