"""The processes of a run: the real commands, forked from a server that has done the slow imports.

Only the import is saved: each is a process of its own, with the command's own ``main``, and can be killed like one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from benchmarks.errors import BenchError
from benchmarks.faults.injection import Fault
from stepalign_launcher.redis_server import find_server

_PRELOADED = ["benchmarks.faults.preload"]
_START_SECONDS = 20.0
_SHOWN_OF_A_LOG = 3000
_REDIS = """\
bind 127.0.0.1
port {port}
daemonize no
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_command(arguments: Sequence[str], environment: Mapping[str, str], log: str, fault: Fault | None) -> None:
    """``stepalign ARGUMENTS`` in this process, with a fault inside."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.environ.update(environment)
    sys.argv = ["stepalign", *arguments]
    if fault is not None:
        fault.arm()
    from stepalign.cli import main

    main()


@dataclass
class Command:
    """A process and how to start it again. Its fault is that of the first start only."""

    name: str
    target: Callable[..., None]
    arguments: tuple[Any, ...]
    log: Path
    process: BaseProcess
    starts: int = 1
    exit_codes: list[int] = field(default_factory=list)

    @property
    def exit_code(self) -> int | None:
        return self.process.exitcode

    def last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-_SHOWN_OF_A_LOG:] if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal to the process, if it runs, and wait for its end."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(_START_SECONDS)

    def start_again(self) -> None:
        assert self.process.exitcode is not None
        self.exit_codes.append(self.process.exitcode)
        self.process = _start(self.target, self.arguments)
        self.starts += 1


def _start(target: Callable[..., None], arguments: tuple[Any, ...]) -> BaseProcess:
    process = _context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def command(folder: Path, name: str, options: Sequence[str], fault: Fault | None) -> Command:
    """Start ``stepalign NAME OPTIONS``, its output going to a log in ``folder``."""
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    log = folder / f"{name}.log"
    arguments = ([name, *options], environment, str(log))
    process = _start(run_command, (*arguments, fault))
    return Command(name, run_command, (*arguments, None), log, process)


def function(folder: Path, name: str, target: Callable[..., None], *arguments: Any) -> Command:
    """Start ``target`` in a process of its own."""
    return Command(name, target, arguments, folder / f"{name}.log", _start(target, arguments))


class RedisServer:
    """A server with an append-only file synced every second, at an address that outlives it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self._folder = folder
        self._config = folder / "redis.conf"
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(_REDIS.format(port=port, folder=folder), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises BenchError when it does not answer."""
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([find_server(), self._config], stdout=log, stderr=log)
        with self.client() as client:
            deadline = time.monotonic() + _START_SECONDS
            while time.monotonic() < deadline:
                try:
                    client.ping()  # pyright: ignore[reportUnknownMemberType]
                    return
                except RedisError:
                    time.sleep(0.02)
        raise BenchError(f"the Redis server at {self.url} does not answer")

    def client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=5.0, retry=Retry(NoBackoff(), 0))  # pyright: ignore[reportUnknownMemberType]

    def used_memory(self) -> int:
        """Bytes."""
        with self.client() as client:
            found: Any = client.info("memory")  # pyright: ignore[reportUnknownMemberType]
        return int(found["used_memory"])

    def written(self) -> int:
        """Bytes in the newest part of the append-only file."""
        return self._newest_part().stat().st_size

    def cut(self, size: int) -> None:
        """Leave the first ``size`` bytes of that part, while the server is down, as a power cut may."""
        os.truncate(self._newest_part(), size)

    def _newest_part(self) -> Path:
        return max((self._folder / "appendonlydir").glob("*.incr.aof"), key=lambda path: path.stat().st_mtime)

    def end(self, number: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None
