"""HAProxy with the product's configuration, unchanged, before replicas that fail: clients send each request once.

First between a replica that fails every request and one that answers, both ready, so that only repeating can help. Then
replicas come that do not listen yet, as all do while they load their model.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from stepalign_run.config import load_config

ROOT = Path(__file__).parents[2]
CLIENTS, NEW_REPLICAS, LOADING_SECONDS = 16, 6, 20
HAPROXY = (ROOT / "services" / "lb" / "haproxy.cfg").read_text(encoding="utf-8")
MAX_CONNECTIONS = max(map(int, re.findall(r"^ +maxconn (\d+)$", HAPROXY, re.MULTILINE)))
LARGEST = load_config(ROOT / "configs" / "lab.toml", [], {}).critic.max_body_bytes
REPLICA = """
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200)

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        if sys.argv[1] == "break off":
            self.close_connection = True
        else:
            time.sleep(0.1)
            self.answer(int(sys.argv[1]))

    def answer(self, status):
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

time.sleep(float(sys.argv[2]))
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("", 8300), Replica).serve_forever()
"""


class Stack(Protocol):
    """What conftest.py gives."""

    project: str
    version: str

    def run(self, *command: str, timeout: float = 300, check: bool = True) -> str: ...
    def wait_until_answering(self, url: str) -> None: ...


class Network:
    """The balancer and replicas in a network of their own."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._name = f"{stack.project}-balancer-{uuid.uuid4().hex[:8]}"
        self._containers: list[str] = []
        self.url = ""
        stack.run("docker", "network", "create", self._name)

    def start_replicas(self, does: str, number: int = 1, loading_seconds: float = 0) -> None:
        """Replicas that do this with every POST and listen only after a while. DNS gets their names together."""
        names = [self._named("replica") for _ in range(number)]
        for name in names:
            command = ["--no-healthcheck", "--entrypoint", "python", self._image, "-c", REPLICA]
            self._stack.run("docker", "run", "-d", "--init", "--name", name, *command, does, f"{loading_seconds}")
        join = f"for name in {' '.join(names)}; do docker network connect --alias critic {self._name} $name; done"
        self._stack.run("bash", "-euc", join)

    def start_balancer(self) -> None:
        name = self._named("lb")
        mount = f"{ROOT}/services/lb/haproxy.cfg:/usr/local/etc/haproxy/haproxy.cfg:ro"
        options = ["-d", "--name", name, "--network", self._name, "--network-alias", "lb", "-v", mount]
        self._stack.run("docker", "run", *options, "-p", "127.0.0.1::8300", "haproxy:3.0")
        port = self._stack.run("docker", "port", name, "8300").strip().rpartition(":")[2]
        self.url = f"http://127.0.0.1:{port}"
        self._stack.wait_until_answering(f"{self.url}/health/ready")

    def inside(self, program: str) -> str:
        """What a Python program prints that runs in the network."""
        options = ["--rm", "--network", self._name, "--entrypoint", "python"]
        return self._stack.run("docker", "run", *options, self._image, "-c", program)

    def remove(self) -> None:
        self._stack.run("docker", "rm", "-fv", *self._containers, check=False)
        self._stack.run("docker", "network", "rm", self._name)

    @property
    def _image(self) -> str:
        return f"stepalign-critic:{self._stack.version}"

    def _named(self, role: str) -> str:
        self._containers.append(f"{self._name}-{len(self._containers)}-{role}")
        return self._containers[-1]


@contextmanager
def network(stack: Stack, *replicas: str) -> Iterator[Network]:
    made = Network(stack)
    try:
        for does in replicas:
            made.start_replicas(does)
        made.start_balancer()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module", params=["break off", "503"])
def beside_a_failing_one(stack: Stack, request: pytest.FixtureRequest) -> Iterator[str]:
    with network(stack, request.param, "200") as made:
        yield made.url


@pytest.mark.parametrize("size", [500, 20_000, LARGEST - 1])
def test_what_a_replica_does_not_answer_is_repeated_on_another(beside_a_failing_one: str, size: int) -> None:
    body = json.dumps({"question": "x" * (size - 16)}).encode()
    with httpx.Client(base_url=beside_a_failing_one, timeout=30) as client:
        statuses = Counter(client.post("/v1/critiques", content=body).status_code for _ in range(20))
    assert statuses == {200: 20}


@pytest.fixture
def answering(stack: Stack) -> Iterator[Network]:
    with network(stack, "200") as made:
        yield made


def test_replicas_that_do_not_listen_yet_cost_no_request(answering: Network) -> None:
    """They come all at once, so that a request which one of them refuses may go to the next."""
    ending = threading.Event()

    def ask() -> Counter[int]:
        statuses: Counter[int] = Counter()
        with httpx.Client(base_url=answering.url, timeout=30) as client:
            while not ending.is_set():
                statuses[client.post("/v1/critiques", content=b"{}").status_code] += 1
        return statuses

    with ThreadPoolExecutor(CLIENTS) as threads:
        asked = [threads.submit(ask) for _ in range(CLIENTS)]
        try:
            answering.start_replicas("200", NEW_REPLICAS, LOADING_SECONDS)
            time.sleep(3)
        finally:
            ending.set()
        statuses = sum((one.result() for one in asked), Counter[int]())
    assert set(statuses) == {200} and statuses[200] > CLIENTS


def test_headers_without_an_end_are_refused(answering: Network) -> None:
    with socket.create_connection((httpx.URL(answering.url).host, httpx.URL(answering.url).port or 0), 30) as endless:
        endless.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nX-Big: ")
        with suppress(ConnectionError):
            for _ in range(400):
                endless.sendall(b"a" * 65_536)
        with suppress(ConnectionResetError):
            assert endless.recv(12) in (b"HTTP/1.1 400", b"")
    assert httpx.get(f"{answering.url}/health/ready").status_code == 200


def test_connections_held_open_leave_room_for_health_checks(answering: Network) -> None:
    address = httpx.URL(answering.url).host, httpx.URL(answering.url).port or 0
    with ExitStack() as held:
        for _ in range(MAX_CONNECTIONS + 50):
            held.enter_context(socket.create_connection(address, 30))
        ask = "import urllib.request as r; print(r.urlopen('http://lb:8405/live', timeout=10).read().decode())"
        assert answering.inside(ask).strip() == "live"
