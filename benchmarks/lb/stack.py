"""The stack that is measured: a Compose project of its own, made for one measurement and removed after it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.errors import BenchError
from benchmarks.lb.haproxy import backend_state
from benchmarks.wire import fetch

ROOT = Path(__file__).resolve().parents[2]
HAPROXY_CFG = ROOT / "services" / "lb" / "haproxy.cfg"
_COMPOSE_FILE = ROOT / "benchmarks" / "lb-compose.yml"
_PROJECT = "stepalign-bench"
_UP_SECONDS = 90.0
# The balancer takes a replica for up from the moment it has an address, until a check says otherwise: only a state
# that outlasts the interval of its checks is true.
_CHECK_SECONDS = 1.5


@dataclass(frozen=True)
class Capacity:
    """The capacity of one replica: ``slots`` requests at once, each in ``seconds``."""

    slots: int
    seconds: float
    load_seconds: float = 0.0

    @property
    def per_second(self) -> float:
        return self.slots / self.seconds


@dataclass(frozen=True)
class Container:
    id: str
    address: str


class Stack:
    """The balancer with critics behind it, from ``with`` on. On Linux the containers are called by their addresses.

    Both paths, through the balancer and past it, then cross the same bridge; a published port would put a proxy of the
    engine into one of them.
    """

    def __init__(self, capacity: Capacity, replicas: int, haproxy_cfg: Path = HAPROXY_CFG) -> None:
        self._capacity = capacity
        self._replicas = replicas
        self._haproxy_cfg = haproxy_cfg.resolve()
        self.api_key = f"sk-{secrets.token_hex(16)}"

    def __enter__(self) -> Self:
        self._lock = _only_one()
        self._folder = tempfile.TemporaryDirectory(prefix="stepalign-bench-")
        key_file = Path(self._folder.name) / "key"
        key_file.write_text(self.api_key, encoding="utf-8")
        key_file.chmod(0o644)  # The critic runs under another user; the folder keeps others of this machine out.
        self._environment = {
            **os.environ,
            "BENCH_API_KEY_FILE": str(key_file),
            "BENCH_HAPROXY_CFG": str(self._haproxy_cfg),
            "BENCH_SLOTS": str(self._capacity.slots),
            "BENCH_SECONDS": str(self._capacity.seconds),
            "BENCH_LOAD_SECONDS": str(self._capacity.load_seconds),
        }
        try:
            self._down()  # Remains of a killed run.
            self.scale(self._replicas)
            self.balancer = self._find_balancer().address
            self.wait_until_up(self._replicas)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def scale(self, replicas: int) -> None:
        """Start or drain critics until there are ``replicas``. Returns when those that had to go are gone."""
        self._compose("up", "--detach", "--no-recreate", "--scale", f"critic={replicas}")

    def critics(self) -> list[Container]:
        """The critics that run."""
        return self._containers("critic")

    def kill(self, container: Container) -> None:
        """End a container as ``kill -9`` does, without a word to anybody."""
        _docker("kill", "--signal", "KILL", container.id)

    def wait_until_up(self, replicas: int) -> None:
        """Return once ``replicas`` critics are ready and the balancer has found that out."""
        deadline = time.monotonic() + _UP_SECONDS
        since: float | None = None
        while time.monotonic() < deadline:
            if not self._all_up(replicas):
                since = None
            elif since is None:
                since = time.monotonic()
            elif time.monotonic() > since + _CHECK_SECONDS:
                return
            time.sleep(0.1)
        log = self._compose("logs", "--tail", "20", "critic")
        raise BenchError(
            f"there are no {replicas} critics behind the balancer after {_UP_SECONDS:g} s. The containers' addresses "
            f"must be reachable from here, as they are on Linux. Log of the critics:\n{log}"
        )

    def _all_up(self, replicas: int) -> bool:
        ready = [self.is_ready(critic) for critic in self.critics()]
        try:
            return ready == [True] * replicas and backend_state(self.balancer).up == replicas
        except OSError:
            return False

    def is_ready(self, container: Container) -> bool:
        """Whether this critic says so itself."""
        try:
            return fetch(container.address, "/health/ready").status == 200
        except OSError:
            return False

    def _find_balancer(self) -> Container:
        balancers = self._containers("lb")
        if not balancers:
            raise BenchError(f"the balancer ended at once:\n{self._compose('logs', '--tail', '20', 'lb')}")
        return balancers[0]

    def _containers(self, service: str) -> list[Container]:
        ids = self._compose("ps", "--quiet", service).split()
        described = json.loads(_docker("inspect", *ids)) if ids else []
        return [Container(item["Id"], _address(item)) for item in described]

    def _remove(self) -> None:
        try:
            self._down()
        finally:
            self._folder.cleanup()
            os.close(self._lock)

    def _down(self) -> None:
        self._compose("down", "--volumes", "--remove-orphans", "--timeout", "1")

    def _compose(self, *arguments: str) -> str:
        command = ("compose", "--project-name", _PROJECT, "--file", str(_COMPOSE_FILE), *arguments)
        return _docker(*command, environment=self._environment)


def engine_version() -> str:
    """The version of the Docker engine."""
    return _docker("version", "--format", "{{.Server.Version}}").strip()


def critic_image() -> str:
    """The id of the image that the replicas run, so that figures are never taken for those of another."""
    name = f"stepalign-critic:{os.environ.get('VERSION', '0.1.0')}"
    return f"{name} {_docker('image', 'inspect', '--format', '{{.Id}}', name).strip()}"


def _only_one() -> int:
    """A lock, held until it is closed. Raises BenchError while another run has it: they would measure each other."""
    lock = os.open(Path(tempfile.gettempdir()) / f"{_PROJECT}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BenchError("another run of this benchmark is under way on this machine") from None
    return lock


def _address(described: dict[str, Any]) -> str:
    (network,) = described["NetworkSettings"]["Networks"].values()
    return str(network["IPAddress"])


def _docker(*arguments: str, environment: dict[str, str] | None = None) -> str:
    # In a session of its own: a Ctrl-C is for this program, which then has to clean up with the same command.
    command = ["docker", *arguments]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, start_new_session=True, check=False
        )
    except FileNotFoundError:
        raise BenchError("there is no docker command on this machine") from None
    if done.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
