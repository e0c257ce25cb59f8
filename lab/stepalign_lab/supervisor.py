"""Starts the processes of a run, watches them, and ends every one of them. Restarts nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stepalign.errors import ProcessFailedError

STOP_GRACE_SECONDS = 10.0
SHOWN_LOG_LINES = 15


@dataclass
class Child:
    """A supervised process. Its output goes to ``log``; its stdin is the lifeline that ends it with us.

    ``ends`` tells a worker, which is done some day, from a service, which must not end before the run does.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    ends: bool

    def last_lines(self, count: int = SHOWN_LOG_LINES) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


class Supervisor:
    """Context manager over a set of child processes: on leaving it none of them lives."""

    def __init__(self, log_dir: Path) -> None:
        self.log_dir = log_dir
        self.children: list[Child] = []
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self, name: str, module: str, arguments: Sequence[str], environment: dict[str, str], *, ends: bool
    ) -> Child:
        """Start ``python -m MODULE ARGUMENTS`` in a session of its own, so that Ctrl-C reaches only us."""
        log = self.log_dir / f"{name}.log"
        output: IO[Any]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        child = Child(name, process, log, ends)
        self.children.append(child)
        return child

    def check(self) -> None:
        """Raise ProcessFailedError, with the last log lines, when a child has ended that should not."""
        for child in self.children:
            code = child.process.poll()
            if code or (code == 0 and not child.ends):
                raise ProcessFailedError(
                    f"the {child.name} process ended with code {code}; its last lines ({child.log}):\n"
                    f"{child.last_lines()}"
                )

    def stop(self) -> None:
        """SIGTERM in reverse order of starting, SIGKILL for what is left after the grace period."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        for child in reversed(self.children):
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            if child.process.stdin is not None:
                child.process.stdin.close()
