"""A Docker engine, and the stack as a user starts it, under a project name, a port and an image tag of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
LOCAL_ENGINE = ROOT.parent / "shared" / "tools" / "local-docker"
BUILD_SECONDS, COMMAND_SECONDS = 1500, 300


def _engine_answers(environment: dict[str, str]) -> bool:
    if shutil.which("docker") is None:
        return False
    asked = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(asked, env=environment, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session")
def engine() -> Iterator[dict[str, str]]:
    """The environment in which ``docker`` reaches an engine: the user's, else one that is started for these tests."""
    environment = dict(os.environ)
    if _engine_answers(environment):
        yield environment
        return
    if not LOCAL_ENGINE.exists() or os.geteuid() != 0:
        reason = "no Docker engine answers; start one or set DOCKER_HOST"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    line = subprocess.run([LOCAL_ENGINE, "env"], capture_output=True, text=True, check=True).stdout
    environment["DOCKER_HOST"] = line.strip().partition("DOCKER_HOST=")[2]
    ran_before = _engine_answers(environment)
    subprocess.run([LOCAL_ENGINE, "up"], check=True, timeout=BUILD_SECONDS)
    try:
        subprocess.run([LOCAL_ENGINE, "images"], check=True, timeout=BUILD_SECONDS)
        yield environment
    finally:
        if not ran_before:
            subprocess.run([LOCAL_ENGINE, "down"], check=True, timeout=COMMAND_SECONDS)


class Stack:
    """Runs commands of the manual against a project of the tests' own."""

    def __init__(self, environment: dict[str, str]) -> None:
        unique = uuid.uuid4().hex[:8]
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self.port: int = reserved.getsockname()[1]
        self.project = f"stepalign-test-{unique}"
        self.version = f"test-{unique}"
        self.manual = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
        self.environment = environment | {
            "COMPOSE_PROJECT_NAME": self.project,
            "VERSION": self.version,
            "LB_PORT": str(self.port),
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *command: str, timeout: float = COMMAND_SECONDS, check: bool = True) -> str:
        """Standard output of a command in the repository's root."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def manual_says(self, command: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run a command that stands, word for word, on a line (or lines) of its own in docs/operations.md."""
        assert f"\n{command}\n" in self.manual, f"docs/operations.md does not say {command!r}"
        return self.run("bash", "-euc", command.replace("localhost:8300", f"localhost:{self.port}"), timeout=timeout)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """``docker inspect`` of a service's containers, in the order of their numbers."""
        labels = (("project", self.project), ("service", service), ("oneoff", "False"))
        filters = [f"--filter=label=com.docker.compose.{name}={value}" for name, value in labels]
        ids = self.run("docker", "ps", "-aq", *filters).split()
        found = json.loads(self.run("docker", "inspect", *ids)) if ids else []
        return sorted(found, key=lambda one: int(one["Config"]["Labels"]["com.docker.compose.container-number"]))

    def logs(self, service: str) -> str:
        ids = " ".join(container["Id"] for container in self.containers(service))
        return self.run("bash", "-c", f"for id in {ids}; do docker logs $id 2>&1; done")

    def events(self, service: str) -> list[dict[str, Any]]:
        """What the service's JSON log says, oldest first; other lines are left out."""
        return [json.loads(line) for line in self.logs(service).splitlines() if line.startswith('{"')]

    def volumes(self) -> set[str]:
        """Names of the volumes that the project's containers use, those that have a random one among them."""
        ids = self.run("docker", "ps", "-aq", f"--filter=label=com.docker.compose.project={self.project}").split()
        mounts = [mount for one in json.loads(self.run("docker", "inspect", *ids)) for mount in one["Mounts"]]
        return {mount["Name"] for mount in mounts if mount["Type"] == "volume"}

    def wait_until_answering(self, url: str) -> None:
        """Until ``url`` gives 200."""
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, f"{url} did not answer"
            time.sleep(0.2)

    def remains(self) -> list[str]:
        """What of the project is left in the engine."""
        label = f"label=com.docker.compose.project={self.project}"
        return [
            line
            for kind in (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"])
            for line in self.run("docker", *kind, "--filter", label).split()
        ]


@contextmanager
def _cleared(stack: Stack, *profile: str) -> Iterator[Stack]:
    """Whatever a test did, nothing of the stack is left behind."""
    try:
        yield stack
    finally:
        stack.run("docker", "compose", *profile, "down", "-v", "--remove-orphans", "--timeout", "10")
        images = stack.run("docker", "image", "ls", "-q", "--filter", f"reference=stepalign-*:{stack.version}").split()
        if images:
            stack.run("docker", "image", "rm", "-f", *images)


@pytest.fixture(scope="session")
def stack(engine: dict[str, str]) -> Iterator[Stack]:
    """The stack, built and up."""
    with _cleared(Stack(engine)) as stack:
        stack.manual_says("docker compose up -d --build", timeout=BUILD_SECONDS)
        yield stack


@pytest.fixture
def vllm_stack(engine: dict[str, str]) -> Iterator[Stack]:
    """A stack of its own, not up. Its images are as large as all others together."""
    # `make key` runs `init` under .env's profile, whose volumes `down` of another profile alone leaves behind.
    stack = Stack(engine)
    with _cleared(stack, "--profile", "*"):
        yield stack
    assert stack.remains() == []
