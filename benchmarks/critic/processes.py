"""The servers that are measured, as processes: started, waited for until they answer, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.errors import BenchError
from benchmarks.wire import fetch

ROOT = Path(__file__).resolve().parents[2]
LOG = "log"
URL_FILE = "critic.url"
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_SHOWN_OF_A_LOG = 4000


@dataclass(frozen=True)
class Server:
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def serving(kind: str, *options: str) -> Iterator[Server]:
    """A server of :mod:`benchmarks.critic.serve`; ``kind`` is its command there. Raises BenchError without one."""
    with temporary_folder(kind) as folder:
        command = [sys.executable, "-m", "benchmarks.critic.serve", kind, str(folder), *options]
        with started(command, folder, _START_SECONDS) as server:
            yield server


@contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder of this name, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="stepalign-bench-") as parent:
        folder = Path(parent) / name
        folder.mkdir()
        yield folder


@contextmanager
def started(
    command: Sequence[str], folder: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """The server that ``command`` starts, which puts its address and gets its log into ``folder``.

    Raises BenchError when it is not ready within ``seconds``.
    """
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield _wait_until_ready(process, folder, seconds)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Tell a process to end, and see that it does, with those that it has started: vLLM's engine is one of its own."""
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def end_of_log(folder: Path) -> str:
    """The last log lines of a process."""
    return (folder / LOG).read_text(encoding="utf-8", errors="replace")[-_SHOWN_OF_A_LOG:]


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path, seconds: float) -> Server:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        server = _announced(folder / URL_FILE)
        if server is not None and _answers(server):
            return server
        time.sleep(0.05)
    raise BenchError(f"{folder.name} was not ready within {seconds:g} s:\n{end_of_log(folder)}")


def _announced(url_file: Path) -> Server | None:
    if not url_file.exists():
        return None
    url = urlsplit(url_file.read_text(encoding="utf-8"))
    assert url.hostname is not None and url.port is not None
    return Server(url.hostname, url.port)


def _answers(server: Server) -> bool:
    """Whether it is ready; one that knows nothing of readiness is ready as soon as it answers."""
    try:
        return fetch(server.host, "/health/ready", port=server.port).status != 503
    except OSError:
        return False
