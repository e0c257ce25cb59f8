"""Starts the processes of a run, watches them, starts again what crashed, and ends every one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from stepalign.errors import ProcessFailedError
from stepalign_run.logging import get_logger

STOP_GRACE_SECONDS = 10.0
SHOWN_LOG_LINES = 15
POLL_SECONDS = 0.1

_log = get_logger(__name__)


@dataclass(frozen=True)
class RestartPolicy:
    """When a crashed child is started again, and when it is given up."""

    limit: int = 5
    """Most restarts without ``healthy_seconds`` of life between two of them."""
    first_delay_seconds: float = 0.5
    """Wait before the first restart; each further one waits twice as long."""
    healthy_seconds: float = 60.0

    def delay_seconds(self, earlier_restarts: int) -> float:
        return self.first_delay_seconds * 2**earlier_restarts


def crashed(code: int) -> bool:
    """Whether a process that ended so may do better the next time: killed, an unexpected error, or one that may pass.

    Anything else, 1 and 2 above all, is a refusal, which it would repeat.
    """
    return code < 0 or code in (os.EX_SOFTWARE, os.EX_TEMPFAIL)


class Child:
    """A supervised process. Its output goes to ``log``; its stdin is the lifeline that ends it with us.

    ``ends`` tells a worker, which is done some day, from a service, which must not end before the run does. A service
    writes its address to ``address_file`` once it serves. ``arguments`` may be changed for its next start. The standard
    output of a ``shown`` process is ours.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        ends: bool,
        address_file: Path | None = None,
        shown: bool = False,
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.log = log
        self.ends = ends
        self.address_file = address_file
        self.shown = shown
        self.address: str | None = None
        """The address of its first life, which the other processes have."""
        self.restarts = 0
        """How many since it last lived for long."""
        self.due_at: float | None = None
        """When it is started again, if it has crashed."""
        self._module = module
        self._environment = {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C reaches only us."""
        if self.address_file is not None:
            # What a killed predecessor left behind.
            self.address_file.unlink(missing_ok=True)
        output: IO[Any]
        with self.log.open("ab") as output:
            output.write(self._beginning())
            output.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=None if self.shown else output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
            )
        self.started_at = time.monotonic()
        self.due_at = None

    def _beginning(self) -> bytes:
        """The line that parts this life from those before it in the log, which a resumed run appends to."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = f"════ the {self.name} process is started ════"
        line = {"event": event, "process": self.name, "restart": self.restarts, "level": "info", "timestamp": now}
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()

    def poll(self) -> int | None:
        """Its exit code, None while it runs. What it started itself in its session does not outlive it."""
        code = self.process.poll()
        lifeline = self.process.stdin
        if code is not None and lifeline is not None and not lifeline.closed:
            lifeline.close()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return code

    @property
    def done(self) -> bool:
        """Whether it is a worker that has ended as it should."""
        return self.ends and self.poll() == 0

    def announced(self) -> str | None:
        """The address that it serves at, None while it does not."""
        if self.address_file is None or self.poll() is not None:
            return None
        try:
            return self.address_file.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def last_lines(self, count: int = SHOWN_LOG_LINES) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def await_end(self, seconds: float) -> None:
        """Wait for its end, and kill it when that does not come in time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.poll()


class Supervisor:
    """Context manager over a set of child processes: on leaving it none of them lives."""

    def __init__(self, log_dir: Path, policy: RestartPolicy | None = None) -> None:
        self.log_dir = log_dir
        self.policy = policy or RestartPolicy()
        self.children: list[Child] = []
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        ends: bool,
        address_file: Path | None = None,
        shown: bool = False,
    ) -> Child:
        """Start ``python -m MODULE ARGUMENTS``."""
        log = self.log_dir / f"{name}.log"
        child = Child(name, module, arguments, environment, log, ends=ends, address_file=address_file, shown=shown)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Start again what crashed and has waited for long enough. To be called several times a second; never waits.

        Raises ProcessFailedError, with the last log lines, for a child that has ended for good and should not have, and
        for a service that came back at an address that nobody knows.
        """
        for child in self.children:
            if child.due_at is not None:
                if time.monotonic() >= child.due_at:
                    child.start()
            elif (code := child.poll()) is None:
                self._compare_address(child)
            elif not child.done:
                self._plan_restart(child, code)

    def await_address(self, child: Child, seconds: float) -> str:
        """The address of a service, once it serves.

        Raises ProcessFailedError as :meth:`check`, and after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        while (address := child.announced()) is None:
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailedError(f"{child.address_file} did not appear within {seconds:.0f} s")
            time.sleep(POLL_SECONDS)
        self._compare_address(child)
        return address

    def _compare_address(self, child: Child) -> None:
        address = child.announced()
        child.address = child.address or address
        if address not in (None, child.address):
            raise ProcessFailedError(
                f"the {child.name} process was started again and serves at another address, which the other processes "
                "do not know: something else has taken its port; start the run again"
            )

    def _plan_restart(self, child: Child, code: int) -> None:
        """Raises ProcessFailedError when there is to be none."""
        if time.monotonic() - child.started_at >= self.policy.healthy_seconds:
            child.restarts = 0
        if not crashed(code) or child.restarts >= self.policy.limit:
            tries = f" after {child.restarts} restarts" if child.restarts else ""
            raise ProcessFailedError(
                f"the {child.name} process ended with code {code}{tries}; its last lines ({child.log}):\n"
                f"{child.last_lines()}"
            )
        delay = self.policy.delay_seconds(child.restarts)
        child.restarts += 1
        child.due_at = time.monotonic() + delay
        _log.warning(
            f"the {child.name} process crashed and is started again in {delay:g} s",
            name=child.name,
            code=code,
            restart=child.restarts,
        )

    def stop(self) -> None:
        """SIGTERM in reverse order of starting, SIGKILL for what is left after the grace period."""
        for child in reversed(self.children):
            child.terminate()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        for child in reversed(self.children):
            child.await_end(max(0.0, deadline - time.monotonic()))
