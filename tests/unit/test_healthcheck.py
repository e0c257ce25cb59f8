"""The images' health check, run as Docker runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


def check(cwd: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=cwd,
        env=environment,
    )


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/hanging":
            self.server.released.wait(20)  # type: ignore[attr-defined]
            return
        status = int(self.path.rpartition("/")[2])
        body = b'{"error": {"code": "draining"}}'
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/200")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers ``/503`` with 503 and ``/hanging`` never; ``asked`` holds the paths that were answered."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads = True
        server.asked = []  # type: ignore[attr-defined]
        server.released = threading.Event()  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.released.set()  # type: ignore[attr-defined]
        server.shutdown()


@pytest.fixture
def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


def test_an_address_that_answers_200_is_healthy(tmp_path: Path, address: str) -> None:
    done = check(tmp_path, f"{address}/200")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("status", [401, 404, 500, 503])
def test_any_other_answer_is_shown(tmp_path: Path, address: str, status: int) -> None:
    done = check(tmp_path, f"{address}/{status}")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout == f'{address}/{status} answers {status}: {{"error": {{"code": "draining"}}}}\n'


def test_a_port_where_nobody_listens_is_unhealthy(tmp_path: Path, closed: str) -> None:
    done = check(tmp_path, f"{closed}/health/ready")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{closed}/health/ready does not answer: ") and "refused" in done.stdout


@pytest.mark.slow
def test_a_process_that_hangs_is_unhealthy_before_dockers_own_limit(tmp_path: Path, address: str) -> None:
    began = time.monotonic()
    done = check(tmp_path, f"{address}/hanging")
    assert time.monotonic() - began < 5  # --timeout=5s in the Dockerfile: a slower check leaves no message
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith(f"{address}/hanging does not answer: ") and "timed out" in done.stdout


@pytest.mark.parametrize("banner", [b"garbage\r\n\r\n", b"HTTP/1.1 many\r\n\r\n", b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_what_speaks_no_http_is_unhealthy(tmp_path: Path, banner: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(banner)

        threading.Thread(target=answer, daemon=True).start()
        done = check(tmp_path, f"http://127.0.0.1:{listening.getsockname()[1]}/health/ready")
    assert done.returncode == 1
    assert done.stdout + done.stderr != ""


def test_a_proxy_of_the_environment_is_not_asked(
    tmp_path: Path, server: ThreadingHTTPServer, address: str, closed: str
) -> None:
    proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"), closed)
    done = check(tmp_path, f"{address}/200", **proxies)
    assert (done.returncode, done.stdout) == (0, "")
    assert server.asked == ["/200"]  # type: ignore[attr-defined]


def test_a_file_that_was_touched_lately_is_healthy(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").touch()
    for path in (tmp_path / "heartbeat", "heartbeat"):
        done = check(tmp_path, path, "60")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_past_its_age_is_unhealthy(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    path.touch()
    old = time.time() - 100
    os.utime(path, (time.time(), old))
    done = check(tmp_path, path, "60")
    age = round(time.time() - old)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout in {f"the last sign of life is {seconds} s old\n" for seconds in (age - 1, age, age + 1)}
    assert check(tmp_path, path, "200").returncode == 0


def test_no_file_is_no_sign_of_life(tmp_path: Path) -> None:
    done = check(tmp_path, tmp_path / "heartbeat", "60")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("no sign of life yet: ") and "heartbeat" in done.stdout
