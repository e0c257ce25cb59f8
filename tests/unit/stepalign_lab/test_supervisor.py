"""The supervisor, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepalign.errors import ProcessFailedError
from stepalign_lab import supervisor as supervisor_module
from stepalign_lab.supervisor import Child, Supervisor

SLEEPER = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER
FAILING = "for i in range(40): print('line', i)\nraise SystemExit(3)\n"
BRIEF = "print('done')\n"

# A process that supervises one of ours and one that never looks at its stdin's other end on its own account.
SUPERVISING = """
import sys, time
from pathlib import Path
from stepalign_lab.supervisor import Supervisor
supervisor = Supervisor(Path(sys.argv[1]))
redis = supervisor.start("redis", "stepalign.embedded_redis", [sys.argv[1] + "/redis"], {}, ends=False)
critic = supervisor.start("critic", "stepalign.supervised", ["critic", sys.argv[2]], {}, ends=False)
print(redis.process.pid, critic.process.pid, flush=True)
time.sleep(60)
"""


def lives(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    return [int(child) for child, parent in map(str.split, listed.splitlines()) if int(parent) == pid]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Child]:
    """Write a module and start it under a supervisor."""

    def make(supervisor: Supervisor, name: str, source: str, *, ends: bool = True) -> Child:
        (tmp_path / f"{name}_process.py").write_text(source)
        environment = {"PYTHONPATH": str(tmp_path)}
        return supervisor.start(name, f"{name}_process", [], environment, ends=ends)

    return make


def ready(child: Child) -> bool:
    return "ready" in child.last_lines()


def test_leaving_the_supervisor_ends_every_child(
    tmp_path: Path, start: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "STOP_GRACE_SECONDS", 0.3)
    with pytest.raises(RuntimeError, match="of the run"), Supervisor(tmp_path / "logs") as supervisor:
        children = [start(supervisor, "sleeper", SLEEPER), start(supervisor, "stubborn", STUBBORN)]
        until(lambda: all(map(ready, children)))
        supervisor.check()
        raise RuntimeError("of the run")
    assert [child.process.returncode for child in children] == [-signal.SIGTERM, -signal.SIGKILL]
    assert not any(lives(child.process.pid) for child in children)
    supervisor.stop()  # once more does no harm


def test_a_failed_child_is_reported_with_its_last_lines(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        healthy = start(supervisor, "sleeper", SLEEPER)
        failing = start(supervisor, "failing", FAILING)
        assert failing.process.wait(10) == 3
        with pytest.raises(ProcessFailedError) as failed:
            supervisor.check()
        assert healthy.process.poll() is None
    message = str(failed.value)
    assert message.startswith("the failing process ended with code 3")
    assert str(tmp_path / "logs" / "failing.log") in message
    assert message.splitlines()[1:] == [f"line {i}" for i in range(25, 40)]


def test_a_killed_child_is_a_failed_one(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        child = start(supervisor, "sleeper", SLEEPER)
        child.process.kill()
        child.process.wait(10)
        with pytest.raises(ProcessFailedError, match="the sleeper process ended with code -9"):
            supervisor.check()


def test_a_worker_may_end_and_a_service_may_not(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        start(supervisor, "worker", BRIEF, ends=True).process.wait(10)
        supervisor.check()
        start(supervisor, "service", BRIEF, ends=False).process.wait(10)
        with pytest.raises(ProcessFailedError, match="service"):
            supervisor.check()


def test_children_die_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    config = tmp_path / "critic.toml"
    config.write_text(
        f"""
        run = {{ dir = "{tmp_path}/runs" }}
        model = {{ path = "unused" }}
        data = {{ train = "unused.jsonl" }}
        critic = {{ backend = "program", checker = "lab", prompts = "lab-v1", port = 0 }}
        """.replace("\n        ", "\n")
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(tmp_path), str(config)], stdout=subprocess.PIPE, text=True
    )
    found: list[int] = []
    try:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        found += children
        until(lambda: (tmp_path / "redis" / "redis.url").exists() and (tmp_path / "runs/run/critic.url").exists())
        servers = children_of(children[0])
        found += servers
        assert len(children) == 2 and servers and all(map(lives, found))
        process.kill()
        process.wait(10)
        until(lambda: not any(map(lives, found)))
    finally:
        process.kill()
        process.wait(10)
        for pid in filter(lives, found):
            os.kill(pid, signal.SIGKILL)
