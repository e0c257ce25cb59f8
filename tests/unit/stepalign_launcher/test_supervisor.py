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
from structlog.testing import capture_logs

from stepalign.errors import ProcessFailedError
from stepalign_launcher import supervisor as supervisor_module
from stepalign_launcher.supervisor import Child, RestartPolicy, Supervisor

SLEEPER = "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEPER
FAILING = "for i in range(40): print('line', i)\nraise SystemExit(3)\n"
BRIEF = "print('done')\n"
ENDING = "import sys\nprint('started', flush=True)\nsys.exit(int(sys.argv[1]))\n"
# Leaves a process of its own behind when it is killed.
PARENT = "import subprocess\nprint(subprocess.Popen(['sleep', '60']).pid, flush=True)\n" + SLEEPER
# Serves at each of its addresses in turn, a life for each; then it lives without one.
SERVICE = """
import sys, time
from pathlib import Path
file, lives, addresses = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
life = len(lives.read_text()) if lives.exists() else 0
lives.write_text("x" * (life + 1))
if life < len(addresses):
    file.write_text(addresses[life])
print("life", life, flush=True)
time.sleep(60)
"""

AT_ONCE = RestartPolicy(limit=3, first_delay_seconds=0)

# A process that supervises one of ours and one that never looks at its stdin's other end on its own account.
SUPERVISING = """
import sys, time
from pathlib import Path
from stepalign_launcher.supervisor import Supervisor
supervisor = Supervisor(Path(sys.argv[1]))
redis = supervisor.start("redis", "stepalign_launcher.redis_server", [sys.argv[1] + "/redis"], {}, ends=False)
critic = supervisor.start("critic", "stepalign_launcher.child", ["critic", sys.argv[2]], {}, ends=False)
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

    def make(
        supervisor: Supervisor,
        name: str,
        source: str,
        *arguments: object,
        ends: bool = True,
        address_file: Path | None = None,
    ) -> Child:
        (tmp_path / f"{name}_process.py").write_text(source)
        environment = {"PYTHONPATH": str(tmp_path)}
        words = [str(argument) for argument in arguments]
        return supervisor.start(name, f"{name}_process", words, environment, ends=ends, address_file=address_file)

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


def kill(child: Child) -> None:
    child.process.kill()
    child.process.wait(10)


def starts(child: Child) -> int:
    return child.last_lines(1000).splitlines().count("started")


def checked(supervisor: Supervisor, condition: Callable[[], bool]) -> None:
    """Watch the children until the condition holds."""

    def holds() -> bool:
        supervisor.check()
        return condition()

    until(holds)


def test_a_killed_child_is_started_again_and_the_others_go_on(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor, capture_logs() as logs:
        other = start(supervisor, "other", SLEEPER)
        child = start(supervisor, "sleeper", SLEEPER)
        until(lambda: ready(child))
        first = child.process.pid
        kill(child)
        checked(supervisor, lambda: child.last_lines().count("ready") == 2)
        assert child.process.pid != first and child.poll() is None and not child.done
        assert other.poll() is None
    assert [(line["log_level"], line["name"], line["code"], line["restart"]) for line in logs] == [
        ("warning", "sleeper", -signal.SIGKILL, 1)
    ]


@pytest.mark.parametrize("code", [1, 2, 3, 130])
def test_a_refusal_is_not_repeated(tmp_path: Path, start: Callable[..., Child], code: int) -> None:
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        child = start(supervisor, "refusing", ENDING, code)
        assert child.process.wait(10) == code
        with pytest.raises(ProcessFailedError, match=f"the refusing process ended with code {code}; its last lines"):
            supervisor.check()
        assert starts(child) == 1


@pytest.mark.parametrize("code", [os.EX_SOFTWARE, os.EX_TEMPFAIL])
def test_a_child_that_crashes_every_time_is_given_up_with_its_last_lines(
    tmp_path: Path, start: Callable[..., Child], code: int
) -> None:
    crashing = "for i in range(40): print('line', i)\n" + ENDING
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        child = start(supervisor, "crashing", crashing, code)
        with pytest.raises(ProcessFailedError) as failed:
            checked(supervisor, lambda: False)
        assert starts(child) == 1 + AT_ONCE.limit
    first, *rest = str(failed.value).splitlines()
    assert first.startswith(f"the crashing process ended with code {code} after 3 restarts; its last lines")
    assert rest == [f"line {i}" for i in range(26, 40)] + ["started"]


def test_a_long_life_is_forgiven_what_came_before_it(tmp_path: Path, start: Callable[..., Child]) -> None:
    """With no life too short to be healthy, the limit is never reached."""
    policy = RestartPolicy(limit=1, first_delay_seconds=0, healthy_seconds=0)
    with Supervisor(tmp_path / "logs", policy) as supervisor:
        child = start(supervisor, "crashing", ENDING, os.EX_SOFTWARE)
        checked(supervisor, lambda: starts(child) == 4)


def test_each_restart_waits_twice_as_long() -> None:
    assert [RestartPolicy().delay_seconds(earlier) for earlier in range(5)] == [0.5, 1, 2, 4, 8]


def test_a_child_that_waits_for_its_restart_holds_up_nothing(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs", RestartPolicy(first_delay_seconds=3600)) as supervisor:
        crashing = start(supervisor, "crashing", ENDING, os.EX_SOFTWARE)
        crashing.process.wait(10)
        ended = crashing.process
        supervisor.check()
        supervisor.check()
        assert crashing.process is ended and not crashing.done
        refusing = start(supervisor, "refusing", ENDING, 1)
        refusing.process.wait(10)
        with pytest.raises(ProcessFailedError, match="refusing"):
            supervisor.check()


def test_nothing_is_started_again_while_the_run_ends(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        due = start(supervisor, "due", ENDING, os.EX_SOFTWARE)
        due.process.wait(10)
        supervisor.check()
        assert due.due_at is not None
        crashed = start(supervisor, "crashed", ENDING, os.EX_SOFTWARE)
        crashed.process.wait(10)
    assert (starts(due), starts(crashed)) == (1, 1)
    assert due.poll() == crashed.poll() == os.EX_SOFTWARE


def test_a_worker_that_is_done_stays_done(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        worker = start(supervisor, "worker", ENDING, 0)
        worker.process.wait(10)
        supervisor.check()
        supervisor.check()
        assert worker.done and starts(worker) == 1


def test_what_a_killed_child_had_started_does_not_outlive_it(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs", RestartPolicy(first_delay_seconds=3600)) as supervisor:
        child = start(supervisor, "parent", PARENT)
        until(lambda: ready(child))
        grandchild = int(child.last_lines().splitlines()[1])
        assert lives(grandchild)
        kill(child)
        supervisor.check()
        until(lambda: not lives(grandchild))


def test_a_service_that_comes_back_at_its_address_is_used_again(tmp_path: Path, start: Callable[..., Child]) -> None:
    file, lived = tmp_path / "service.url", tmp_path / "lived"
    file.write_text("of an earlier run")
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        arguments = (file, lived, "http://a", "http://a")
        service = start(supervisor, "service", SERVICE, *arguments, ends=False, address_file=file)
        assert supervisor.await_address(service, 15) == "http://a"
        kill(service)
        assert service.announced() is None, "a dead service's address is none"
        assert supervisor.await_address(service, 15) == "http://a"
        assert lived.read_text() == "xx"
        kill(service)
        checked(supervisor, lambda: "life 2" in service.last_lines())
        assert service.poll() is None and service.announced() is None, "it does not serve yet"


def test_a_service_that_comes_back_elsewhere_ends_the_run(tmp_path: Path, start: Callable[..., Child]) -> None:
    file = tmp_path / "service.url"
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        arguments = (file, tmp_path / "lived", "redis://:secret@a", "redis://:secret@b")
        service = start(supervisor, "service", SERVICE, *arguments, ends=False, address_file=file)
        supervisor.await_address(service, 15)
        kill(service)
        with pytest.raises(ProcessFailedError, match=r"service process .* at another address") as failed:
            checked(supervisor, lambda: False)
    assert "secret" not in str(failed.value)


def test_a_service_that_never_serves_is_not_waited_for_for_ever(tmp_path: Path, start: Callable[..., Child]) -> None:
    file = tmp_path / "service.url"
    with Supervisor(tmp_path / "logs", AT_ONCE) as supervisor:
        service = start(supervisor, "service", SERVICE, file, tmp_path / "lived", ends=False, address_file=file)
        with pytest.raises(ProcessFailedError, match=r"service\.url did not appear within 0 s"):
            supervisor.await_address(service, 0.1)


def test_a_worker_may_end_and_a_service_may_not(tmp_path: Path, start: Callable[..., Child]) -> None:
    with Supervisor(tmp_path / "logs") as supervisor:
        start(supervisor, "worker", BRIEF, ends=True).process.wait(10)
        supervisor.check()
        start(supervisor, "service", BRIEF, ends=False).process.wait(10)
        with pytest.raises(ProcessFailedError, match="service"):
            supervisor.check()


def test_children_die_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    config = tmp_path / "critic.toml"
    address = tmp_path / "critic.url"
    config.write_text(
        f'[critic]\nbackend = "program"\nchecker = "lab"\nprompts = "lab-v1"\nport = 0\naddress_file = "{address}"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISING, str(tmp_path), str(config)], stdout=subprocess.PIPE, text=True
    )
    found: list[int] = []
    try:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        found += children
        until(lambda: (tmp_path / "redis" / "redis.url").exists() and address.exists())
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
