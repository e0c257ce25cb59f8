"""``stepalign run`` on the lab as a process of its own, and the files it leaves.

A run costs about twenty seconds of CPU, most of it for the imports of three workers. An undisturbed one is therefore
made once for several tests, and shared by the workers of pytest-xdist.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

REPO = Path(__file__).parents[2]
LAB = REPO / "configs" / "lab.toml"
EXACT_CRITIC = ["--critic.backend", "program", "--critic.checker", "lab"]
SMALL = ["--trainer.batch", "8", "--evaluation.samples", "2"]
UNDISTURBED = ["--trainer.steps", "8", "--evaluation.every", "4", "--critic.port", "0", *SMALL, *EXACT_CRITIC]
"""Options of the run that several tests compare theirs with."""


def without_evaluation(folder: Path) -> Path:
    """The lab's configuration without the problems that the evaluation needs: one worker fewer starts."""
    assets = LAB.resolve().parent
    lines = [line for line in LAB.read_text().splitlines() if not line.startswith(("validation = ", "test = "))]
    file = folder / "without-evaluation.toml"
    file.write_text(re.sub(r'^(path|train) = "', rf'\1 = "{assets}/', "\n".join(lines), flags=re.MULTILINE) + "\n")
    return file


def stepalign(*words: str) -> list[str]:
    return [sys.executable, "-m", "stepalign.cli", *words]


def default_sigint() -> None:
    """For ``preexec_fn``: a shell that starts the tests in its background lets them inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ignored_sigint() -> None:
    """For ``preexec_fn``: as a shell starts a command in its background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def report_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())


def losses_of(run_dir: Path) -> list[float]:
    """Of each whole row of the metrics so far."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


class Stack:
    """``stepalign run CONFIG OPTIONS`` in a folder of its own below ``folder``."""

    def __init__(self, folder: Path, name: str, *options: str, config: Path = LAB) -> None:
        # Processes of other tests have other names.
        self.dir = folder / f"stack-{os.getpid()}-{name}"
        self.command = stepalign("run", str(config), "--run.dir", str(folder), "--run.name", self.dir.name, *options)
        self._stdout, self._stderr = (folder / f"{name}.{stream}" for stream in ("stdout", "stderr"))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str, at_start: Callable[[], None] = default_sigint) -> Stack:
        with self._stdout.open("w") as stdout, self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                [*self.command, *more], stdout=stdout, stderr=stderr, cwd=self.dir.parent, preexec_fn=at_start
            )
        return self

    def finished(self, *more: str) -> Stack:
        """Run it from its start to its end."""
        assert self.start(*more).ended() == 0, self.printed + self.said
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "it has not been started"
        return self._process

    @property
    def printed(self) -> str:
        return self._stdout.read_text()

    @property
    def said(self) -> str:
        """Its stderr."""
        return self._stderr.read_text()

    def log(self, process: str) -> str:
        path = self.dir / "logs" / f"{process}.log"
        return path.read_text() if path.exists() else ""

    def read(self, file: str) -> str:
        wait_for((self.dir / file).exists, file)
        return (self.dir / file).read_text().strip()

    def report(self) -> dict[str, Any]:
        return report_of(self.dir)

    def losses(self) -> list[float]:
        return losses_of(self.dir)

    def await_updates(self, count: int) -> None:
        self.wait(lambda: len(self.losses()) >= count, f"{count} updates")

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Wait for something that happens while the run goes on."""

        def holds() -> Any:
            assert self.process.poll() is None, self.printed + self.said
            return condition()

        wait_for(holds, what)

    def processes(self) -> dict[str, int]:
        """Process ids by name, the server of the wrapper ``redis`` as ``server``: all that name the run."""
        found: dict[str, int] = {}
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            own = self._process is not None and process.pid == self._process.pid
            if not own and any(self.dir.name in word for word in words):
                found[_name(words)] = process.pid
        return found

    def kill(self, name: str) -> None:
        """Kill a process and wait for the one that takes its place."""
        victim = self.processes()[name]
        os.kill(victim, signal.SIGKILL)
        self.wait(lambda: self.processes().get(name, victim) != victim, f"another {name}")

    def ended(self, seconds: float = 240) -> int:
        """The exit code. Nothing of the run is left but its files."""
        code = self.process.wait(seconds)
        assert self.processes() == {}
        return code

    def refusal(self) -> str:
        """Its message when it is started, which it must refuse."""
        done = subprocess.run(self.command, capture_output=True, text=True, timeout=60, cwd=self.dir.parent)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr

    def stop(self) -> None:
        """End it in any state."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)


def _name(words: Sequence[str]) -> str:
    if "stepalign_launcher.redis_server" in words:
        return "redis"
    return words[words.index("stepalign_launcher.child") + 1] if "stepalign_launcher.child" in words else "server"


@contextmanager
def alone(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that all workers of pytest-xdist share, while the others wait for ``name``."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield shared


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, the same one for all workers: one makes it, the others wait."""
    with alone(factory, name) as shared:
        folder = shared / name
        if not folder.exists():
            scratch = shared / f".{name}"
            scratch.mkdir(exist_ok=True)
            make(scratch)
            scratch.rename(folder)
    return folder
