"""What one anonymous connection may cost the critic's process, whichever of uvicorn's parsers reads it.

Sockets speak to the command itself. Its limits of time are cut short, those of size are its own.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepalign_critic.http.admission import MAX_HEADERS
from stepalign_critic.http.door import SPARE_CONNECTIONS, DoorSettings
from stepalign_critic.service import CriticService
from support.critic_processes import COMMAND, critic_command, critic_process, write_config
from support.critic_servers import CORRECT, HeldBackend, error_of, metric, serving, wait_until

pytestmark = pytest.mark.slow

HEAD_SECONDS = 1.5
HURRIED = f"""
import functools
from stepalign_critic import process
process.DoorSettings = functools.partial(process.DoorSettings, head_seconds={HEAD_SECONDS}, unread_seconds=2.0)
{COMMAND}
"""
# uvicorn takes h11 where httptools is not installed.
PARSERS = {"httptools": HURRIED, "h11": f"import sys\nsys.modules['httptools'] = None\n{HURRIED}"}
READY = b"GET /health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /v1/critiques HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
AWAITING = b"Expect: 100-continue\r\n\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LIMIT = DoorSettings().max_head_bytes


@pytest.fixture(scope="module", params=list(PARSERS))
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with critic_process(write_config(tmp_path_factory.mktemp("door")), PARSERS[request.param]) as (_, address):
        wait_until(lambda: httpx.get(f"{address}/health/ready").status_code == 200)
        yield address


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=20) as connection:
        yield connection


def rest(connection: socket.socket) -> bytes:
    """What comes until the service closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def status_of(connection: socket.socket) -> int:
    """The status of the next answer, all of which is read."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += connection.recv(65536)
        assert received, "the connection is closed"
    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(received) < end + 4 + length:
        received += connection.recv(65536)
    assert len(received) == end + 4 + length
    return int(received.split()[1])


def read(answer: bytes) -> tuple[int, httpx.Headers, dict[str, Any]]:
    """Status, headers and error of the one answer that these bytes must be."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = httpx.Headers([tuple(line.split(b": ", 1)) for line in lines[1:]])  # pyright: ignore[reportArgumentType]
    assert len(body) == int(headers["content-length"])
    response = httpx.Response(int(lines[0].split()[1]), headers=headers, content=body)
    return response.status_code, headers, error_of(response)


def refused(url: str, *sent: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the answer, after which the service must close."""
    with connected(url) as connection:
        for part in sent:
            connection.sendall(part)
        status, headers, error = read(rest(connection))
    assert headers["connection"] == "close" and headers["x-request-id"].startswith("req_")
    assert headers["content-type"] == "application/json"
    return status, error


def test_a_header_without_end_is_refused_at_its_limit(url: str) -> None:
    """The service must not take what it will never read: a client that sends on is cut off."""
    with connected(url) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nX-Big: ")
        sent = 0
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            while sent < 200 * 2**20:
                sent += connection.send(b"a" * 2**20)
    # As much as is thrown away behind an answer, and what the buffers of both ends hold.
    assert sent < 40 * 2**20
    assert httpx.get(f"{url}/health/ready").status_code == 200


@pytest.mark.parametrize(
    ("before", "piece", "status", "code", "said"),
    [
        (b"GET /version HTTP/1.1\r\nX-Big: ", b"a" * 4000, 431, "headers_too_large", "over the limit of 65536 bytes"),
        (b"GET /version HTTP/1.1\r\n", b"a: b\r\n" * 700, 431, "headers_too_large", "over the limit of 65536 bytes"),
        (b"GET /", b"a" * 4000, 414, "uri_too_long", "request line is over"),
        (CHUNKED + b"1;a=", b"b" * 4000, 431, "headers_too_large", "chunk extensions or trailers"),
        (CHUNKED + b"1\r\n{\r\n0\r\nX: ", b"b" * 4000, 431, "headers_too_large", "chunk extensions or trailers"),
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"a: b\r\n" * 700, 431, "headers_too_large", "chunk extensions or trailers"),
    ],
    ids=["header", "headers", "line", "chunk-extension", "trailer", "trailers"],
)
def test_what_is_no_body_has_a_limit(url: str, before: bytes, piece: bytes, status: int, code: str, said: str) -> None:
    got, error = refused(url, before, piece * (LIMIT // len(piece) + 3))
    assert (got, error["code"]) == (status, code)
    assert said in error["message"]


def test_a_head_is_measured_to_the_byte_however_it_comes(url: str) -> None:
    start, end = b"GET /version HTTP/1.1\r\nHost: x\r\nX-Big: ", b"\r\n\r\n"
    for size, status in ((LIMIT, 200), (LIMIT + 1, 431)):
        head = start + b"a" * (size - len(start) - len(end)) + end
        for pieces in ([head], [head[:30], head[30:]], [head[:-1], head[-1:]]):
            with connected(url) as connection:
                for piece in pieces:
                    connection.sendall(piece)
                assert status_of(connection) == status


@pytest.mark.parametrize(("count", "status"), [(MAX_HEADERS, 200), (MAX_HEADERS + 1, 431), (10_000, 431)])
def test_the_number_of_headers_has_a_limit(url: str, count: int, status: int) -> None:
    head = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"a:\r\n" * (count - 2) + b"\r\n"
    with connected(url) as connection:
        connection.sendall(head)
        answer = rest(connection)
    if status == 200:
        assert answer.startswith(b"HTTP/1.1 200")
    else:
        got, _, error = read(answer)
        assert (got, error["code"]) == (431, "headers_too_large")
        assert f"{count} headers are over the limit of {MAX_HEADERS}" == error["message"]


@pytest.mark.parametrize("sent", [b"G", b"GET /version HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_to_its_end_is_given_up(url: str, sent: bytes) -> None:
    status, error = refused(url, sent)
    assert (status, error["code"]) == (408, "headers_too_slow")
    assert error["message"] == f"the headers were not complete after {HEAD_SECONDS:g} s"


def test_a_byte_now_and_then_gives_a_head_no_more_time(url: str) -> None:
    with connected(url) as connection:
        # The first request's connection is kept; its limit is that of each head.
        connection.sendall(READY)
        assert status_of(connection) == 200
        connection.settimeout(HEAD_SECONDS / 10)
        answer = b""
        for byte in b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100:
            try:
                connection.sendall(bytes([byte]))
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_connection_that_never_sends_anything_is_closed(url: str) -> None:
    with connected(url) as connection:
        assert rest(connection) == b""


def test_the_rest_of_a_body_that_no_answer_waited_for_has_a_limit_of_time(url: str) -> None:
    """The body of a GET means nothing, and an answer comes before it."""
    with connected(url) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert status_of(connection) == 200
        connection.settimeout(HEAD_SECONDS / 10)
        for _ in range(100):
            try:
                connection.sendall(b"a")
                assert connection.recv(65536) == b""
                return
            except TimeoutError:
                continue
            except OSError:
                return
    pytest.fail("the connection stays open")


def test_a_pipelining_client_is_answered_in_order_and_its_requests_wait_unparsed(url: str) -> None:
    paths = ["/health/live", "/nowhere", "/health/ready", "/version"] * 500
    sent = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths)
    with connected(url) as connection:
        connection.sendall(sent + b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = rest(connection)
    statuses = [part.split(b" ", 1)[0] for part in answers.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"404" if path == "/nowhere" else b"200" for path in paths] + [b"200"]


def test_head_and_body_of_an_answer_come_together(url: str) -> None:
    with connected(url) as connection:
        for _ in range(3):
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ") and json.loads(body)["version"]


def test_a_client_that_pipelines_and_never_reads_is_cut_off(url: str) -> None:
    document = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with connected(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            for _ in range(2000):
                connection.sendall(document * 1000)
    wait_until(lambda: metric(url, "stepalign_critic_connections") <= 1)


def test_who_hangs_up_with_requests_behind_another_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    backend = HeldBackend()
    body = json.dumps({**CORRECT, "attempt": "held"}).encode()
    with serving(CriticService(backend, "lab-v1")) as url:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        with connected(url) as connection:
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body + READY * 3)
            wait_until(lambda: "held" in backend.held)
        wait_until(lambda: backend.cancelled == ["held"])
    assert not [record for record in caplog.records if record.exc_info]


def test_who_pipelines_and_never_reads_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    document = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    service = CriticService(HeldBackend(), "lab-v1")
    with serving(service, door=DoorSettings(unread_seconds=0.3)) as url, connected(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with pytest.raises(OSError, match=r"reset|[Pp]ipe"):
            for _ in range(2000):
                connection.sendall(document * 1000)
        wait_until(lambda: metric(url, "stepalign_critic_connections") <= 1)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), "TLS handshake; use http://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/2; let the client use HTTP/1.1"),
        (b"hello\r\n\r\n", "no valid HTTP"),
        (b"GET / HTTP/1.1\r\nno header\r\n\r\n", "no valid HTTP"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n", "no valid HTTP"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "no valid HTTP"),
        (CHUNKED + b"zz\r\n", "no valid HTTP"),
    ],
    ids=["tls", "http2", "text", "header", "length", "long-length", "chunk"],
)
def test_what_is_no_http_gets_the_envelope_and_the_reason(url: str, sent: bytes, said: str) -> None:
    status, error = refused(url, sent)
    assert (status, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error")
    assert said in error["message"]


def test_garbage_behind_a_request_is_answered_after_it(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(READY + b"\x00garbage\r\n\r\n")
        answers = rest(connection)
    first, second = answers.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200 ") and b'"ready"' in first
    assert read(b"HTTP/1.1 " + second)[0] == 400


def test_trailers_are_no_headers(url: str) -> None:
    """They come after the checks that headers are for."""
    body = json.dumps(CORRECT).encode()
    with connected(url) as connection:
        connection.sendall(CHUNKED + b"%x\r\n%s\r\n0\r\nX-Request-Timeout-Ms: nonsense\r\n\r\n" % (len(body), body))
        assert status_of(connection) == 200


def test_an_upgrade_that_is_offered_is_passed_over(url: str) -> None:
    """As curl --http2 and Java's client offer it with each first request."""
    body = json.dumps(CORRECT).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    with connected(url) as connection:
        connection.sendall(POST + offer + length + body)
        assert status_of(connection) == 200
        connection.sendall(READY)
        assert status_of(connection) == 200


@pytest.mark.parametrize(("target", "status"), [(b"/health", 405), (b"/v1/critiques", 405), (b"x:443", 404)])
def test_connect_is_one_request_and_its_last(url: str, target: bytes, status: int) -> None:
    """A client that wants a tunnel speaks no HTTP behind it."""
    got, error = refused(url, b"CONNECT %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: req_1\r\n\r\n" % target)
    assert (got, error["code"]) == (status, "not_found" if status == 404 else "method_not_allowed")


def test_a_target_that_is_no_url_is_named(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"GET http://x:99999999/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = rest(connection)
    # h11 hands on any target, and there is nothing of that name.
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404")) and b"User callback" not in answer


def test_refusals_without_a_request_are_counted(url: str) -> None:
    line = 'stepalign_critic_requests_total{path="other",status="400"}'
    before = metric(url, line)
    refused(url, b"hello\r\n\r\n")
    assert metric(url, line) == before + 1


def test_idle_connections_lock_nobody_out(tmp_path: Path) -> None:
    """Over the limit the one that has waited longest makes room."""
    with critic_process(write_config(tmp_path, max_connections=4)) as (_, url), ExitStack() as stack:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        idle = [stack.enter_context(connected(url)) for _ in range(4)]
        idle[1].sendall(b"GET /version HTTP/1.1\r\nX-")
        idle[2].sendall(READY)
        assert status_of(idle[2]) == 200
        for _ in range(4):
            client = stack.enter_context(httpx.Client())
            assert client.get(f"{url}/health/ready").status_code == 200
            assert client.post(f"{url}/v1/critiques", json=CORRECT).status_code == 200
        for connection in idle:
            connection.settimeout(5)
            assert connection.recv(1) == b""


@pytest.mark.parametrize("parser", list(PARSERS))
def test_bodies_that_do_not_come_lock_nobody_out(tmp_path: Path, parser: str) -> None:
    """Whose body has not come is waited for, as whose head has not."""
    config = write_config(tmp_path, max_connections=4)
    with critic_process(config, PARSERS[parser]) as (_, url), ExitStack() as stack:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        for line in (b"POST /health", b"POST /v1/critiques"):
            for _ in range(4 + SPARE_CONNECTIONS):
                connection = stack.enter_context(connected(url))
                connection.sendall(line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n" + AWAITING)
                # The head has been read.
                assert connection.recv(4096)
            assert httpx.get(f"{url}/health/ready").status_code == 200
            assert httpx.post(f"{url}/v1/critiques", json=CORRECT).status_code == 200


def test_a_body_is_waited_for_from_its_head_on(tmp_path: Path) -> None:
    """Else a connection of a pool would lose its place amid a request for the time that it was idle before."""
    body = json.dumps(CORRECT).encode()
    with critic_process(write_config(tmp_path, max_connections=2)) as (_, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        with connected(url) as sending, connected(url) as idle:
            for connection in (sending, idle):
                connection.sendall(READY)
                assert status_of(connection) == 200
            sending.sendall(POST + b"Content-Length: %d\r\n" % len(body) + AWAITING)
            assert sending.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
            assert httpx.get(f"{url}/health/ready").status_code == 200
            assert rest(idle) == b""
            sending.sendall(body)
            assert status_of(sending) == 200


def test_where_all_connections_are_answered_only_health_is() -> None:
    backend = HeldBackend()
    attempts = [f"attempt {number}" for number in range(2)]
    with (
        serving(CriticService(backend, "lab-v1"), door=DoorSettings(max_connections=2)) as url,
        ExitStack() as stack,
    ):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        for attempt in attempts:
            body = json.dumps({**CORRECT, "attempt": attempt}).encode()
            connection = stack.enter_context(connected(url))
            connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_until(lambda attempt=attempt: attempt in backend.held)
        ready = httpx.get(f"{url}/health/ready")
        assert (ready.status_code, ready.headers["connection"]) == (200, "close")
        assert httpx.head(f"{url}/health/live").status_code == 200
        for asked in ("POST /v1/critiques", "GET /version", "POST /health", "OPTIONS /health"):
            method, path = asked.split()
            answer = httpx.request(method, url + path)
            assert (answer.status_code, error_of(answer)["code"]) == (503, "too_many_connections")
            assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
        # More than the spare ones, and none of them sends anything.
        for _ in range(2 * SPARE_CONNECTIONS):
            stack.enter_context(connected(url))
        assert httpx.get(f"{url}/health/live").status_code == 200
        for attempt in attempts:
            backend.release(attempt)
        wait_until(lambda: httpx.get(f"{url}/version").status_code == 200)


def test_more_connections_than_the_process_may_have_files_are_refused(tmp_path: Path) -> None:
    few = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n{COMMAND}"
    command = critic_command(write_config(tmp_path), code=few)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "critic.max_connections is 768, which takes 912 open files, and this process may have 200" in done.stderr


def test_an_idle_connection_of_a_pool_is_kept_as_long_as_is_set(tmp_path: Path) -> None:
    with critic_process(write_config(tmp_path, keep_alive_seconds=7)) as (_, url), connected(url) as connection:
        connection.sendall(READY)
        status_of(connection)
        # uvicorn's own default is 5 s.
        connection.settimeout(6)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)
        connection.sendall(READY)
        assert status_of(connection) == 200
        assert rest(connection) == b""
