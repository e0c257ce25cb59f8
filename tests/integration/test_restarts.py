"""A run whose processes are killed one after the other: it goes on, changes no figure, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from redis import Redis

REPO = Path(__file__).parents[2]
LAB = REPO / "configs" / "lab.toml"
OPTIONS = [
    *("--trainer.steps", "10", "--evaluation.samples", "2", "--evaluation.every", "5"),
    # Any free port, which is the critic's for the rest of the run.
    *("--critic.backend", "program", "--critic.checker", "lab", "--critic.port", "0"),
]

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Run:
    """``stepalign run`` as a process of its own."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        self.dir = folder / f"restarts-{os.getpid()}-{name}"
        self.said = folder / f"{name}.stderr"
        command = [sys.executable, "-m", "stepalign.cli", "run", str(LAB), *OPTIONS]
        with self.said.open("w") as stderr:
            self.process = subprocess.Popen(
                [*command, *options, "--run.dir", str(folder), "--run.name", self.dir.name],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=folder,
            )

    def losses(self) -> list[float]:
        metrics = self.dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]

    def report(self) -> dict[str, Any]:
        return json.loads((self.dir / "report.json").read_text())

    def await_updates(self, count: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.said.read_text()
            return len(self.losses()) >= count

        wait_for(there, f"{count} updates")

    def processes(self) -> dict[str, int]:
        """Process ids by name, the server of the wrapper ``redis`` as ``server``: all that name the run."""
        found: dict[str, int] = {}
        for process in psutil.process_iter(["pid", "cmdline"]):
            words = process.info["cmdline"] or []
            if process.pid == self.process.pid or not any(self.dir.name in word for word in words):
                continue
            found[self._name(words)] = process.pid
        return found

    @staticmethod
    def _name(words: list[str]) -> str:
        if "stepalign_launcher.redis_server" in words:
            return "redis"
        return words[words.index("stepalign_launcher.child") + 1] if "stepalign_launcher.child" in words else "server"

    def kill(self, name: str) -> None:
        """Kill a process and wait for the one that takes its place."""
        victim = self.processes()[name]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: self.processes().get(name, victim) != victim, f"another {name}")

    def read(self, file: str) -> str:
        wait_for((self.dir / file).exists, file)
        return (self.dir / file).read_text().strip()

    def ended(self) -> int:
        """The exit code. Nothing of the run is left but its files."""
        code = self.process.wait(240)
        assert self.processes() == {}
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(name: str, *options: str) -> Run:
        runs.append(Run(tmp_path, name, *options))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.terminate()
        run.process.wait(30)


def test_a_run_survives_the_kill_of_each_of_its_processes_and_computes_the_same(start: Callable[..., Run]) -> None:
    whole = start("whole")
    assert whole.ended() == 0, whole.said.read_text()

    run = start("killed")
    run.await_updates(1)
    redis_url, critic_url = run.read("redis/redis.url"), run.read("critic.url")
    ledger = f"stepalign:{{{run.dir.name}}}:ledger"
    for updates, victim in enumerate(["server", "redis"], start=2):
        with Redis.from_url(redis_url) as client:
            published = int(client.hget(ledger, "published") or 0)
        assert published >= 32
        run.kill(victim)
        assert run.read("redis/redis.url") == redis_url
        with Redis.from_url(redis_url) as client:
            assert int(client.hget(ledger, "published") or 0) >= published
        run.await_updates(updates)
    run.kill("critic")
    assert run.read("critic.url") == critic_url
    for updates, victim in enumerate(["trainer", "solver", "evaluate"], start=4):
        run.await_updates(updates)
        run.kill(victim)
    assert run.ended() == 0, run.said.read_text()

    said = run.said.read_text()
    for name in ("redis", "critic", "trainer", "solver", "evaluate"):
        assert f"the {name} process crashed and is started again in 0.5 s" in said
    assert run.losses() == whole.losses()
    undisturbed, disturbed = whole.report(), run.report()
    assert disturbed["arms"] == undisturbed["arms"]
    assert disturbed["rollouts"] == undisturbed["rollouts"]


def test_a_server_that_does_not_get_its_port_back_ends_the_run(start: Callable[..., Run]) -> None:
    run = start("homeless")
    run.await_updates(1)
    port = urlsplit(run.read("redis/redis.url")).port
    assert port is not None
    os.kill(run.processes()["server"], signal.SIGKILL)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: taken(thief, port), "the port")
        thief.listen()
        assert run.ended() == 1
    said = run.said.read_text()
    assert "the redis process was started again and serves at another address" in said and "Traceback" not in said


def taken(thief: socket.socket, port: int) -> bool:
    try:
        thief.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_starts_nothing_again(start: Callable[..., Run], how: signal.Signals) -> None:
    run = start(how.name)
    run.await_updates(1)
    trainer = run.processes()["trainer"]
    os.kill(trainer, signal.SIGKILL)
    wait_for(lambda: "the trainer process crashed" in run.said.read_text(), "the warning", 30)
    run.process.send_signal(how)
    assert run.ended() == 130
    assert run.said.read_text().count("is started again") == 1


def test_a_process_that_refuses_ends_the_run_at_once_with_its_last_lines(start: Callable[..., Run]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = start("refused", "--critic.port", str(port))
        assert run.ended() == 1
    said = run.said.read_text()
    assert said.startswith("stepalign: the critic process ended with code 1; its last lines")
    assert f"cannot listen on critic.host:port 127.0.0.1:{port}" in said and "Traceback" not in said


def test_a_damaged_model_is_refused_before_anything_is_started(start: Callable[..., Run], tmp_path: Path) -> None:
    model = tmp_path / "torn-model"
    shutil.copytree(REPO / "lab" / "stepalign_lab" / "assets" / "solver", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    run = start("torn", "--model.path", str(model))
    assert run.ended() == 1
    assert run.said.read_text().startswith(f"stepalign: model.path: {weights} cannot be read")
    assert not run.dir.exists()
