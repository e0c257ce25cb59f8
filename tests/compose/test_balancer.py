"""HAProxy with the product's configuration, unchanged, between a replica that fails every request and one that answers.

Both are ready, so only repeating can help: the client sends each request once and must not see a failure.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from stepalign_run.config import load_config

ROOT = Path(__file__).parents[2]
LARGEST = load_config(ROOT / "configs" / "lab.toml", [], {}).critic.max_body_bytes
REPLICA = """
import sys
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
            self.answer(int(sys.argv[1]))

    def answer(self, status):
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("", 8300), Replica).serve_forever()
"""


class Stack(Protocol):
    """What conftest.py gives."""

    project: str
    version: str

    def run(self, *command: str, timeout: float = 300, check: bool = True) -> str: ...
    def wait_until_answering(self, url: str) -> None: ...


@pytest.fixture(scope="module", params=["break off", "503"])
def balancer(stack: Stack, request: pytest.FixtureRequest) -> Iterator[str]:
    network = f"{stack.project}-balancer"
    names = [f"{network}-{role}" for role in ("failing", "answering", "lb")]
    image = f"stepalign-critic:{stack.version}"
    stack.run("docker", "network", "create", network)
    try:
        for name, does in zip(names[:2], (request.param, "200"), strict=True):
            options = ["-d", "--name", name, "--network", network, "--network-alias", "critic", "--no-healthcheck"]
            stack.run("docker", "run", *options, "--entrypoint", "python", image, "-c", REPLICA, does)
        mount = f"{ROOT}/services/lb/haproxy.cfg:/usr/local/etc/haproxy/haproxy.cfg:ro"
        published = ["-p", "127.0.0.1::8300"]
        stack.run(
            "docker", "run", "-d", "--name", names[2], "--network", network, "-v", mount, *published, "haproxy:3.0"
        )
        port = stack.run("docker", "port", names[2], "8300").strip().rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        stack.wait_until_answering(f"{url}/health/ready")
        yield url
    finally:
        stack.run("docker", "rm", "-fv", *names, check=False)
        stack.run("docker", "network", "rm", network)


@pytest.mark.parametrize("size", [500, 20_000, LARGEST - 1])
def test_what_a_replica_does_not_answer_is_repeated_on_another(balancer: str, size: int) -> None:
    body = json.dumps({"question": "x" * (size - 16)}).encode()
    with httpx.Client(base_url=balancer, timeout=30) as client:
        statuses = Counter(client.post("/v1/critiques", content=body).status_code for _ in range(20))
    assert statuses == {200: 20}
