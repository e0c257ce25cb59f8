"""A run whose processes are killed, or that is told to end: it changes no figure and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis

from support.stacks import (
    EXACT_CRITIC,
    LAB,
    REPO,
    UNDISTURBED,
    Stack,
    ignored_sigint,
    losses_of,
    report_of,
    wait_for,
    without_evaluation,
)

MakeStack = Callable[..., Stack]

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def server_port(run: Stack) -> int:
    port = urlsplit(run.read("redis/redis.url")).port
    assert port is not None
    return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_run_survives_the_kill_of_each_process_and_computes_the_same(stack: MakeStack, undisturbed: Path) -> None:
    run = stack("killed", *UNDISTURBED).start()
    run.await_updates(1)
    redis_url, critic_url = run.read("redis/redis.url"), run.read("critic.url")
    ledger = f"stepalign:{{{run.dir.name}}}:ledger"
    for updates, victim in enumerate(["server", "redis"], start=2):
        with Redis.from_url(redis_url) as client:
            published = int(client.hget(ledger, "published") or 0)
        assert published >= 8
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
    assert run.ended() == 0, run.said

    for name in ("redis", "critic", "trainer", "solver", "evaluate"):
        assert f"the {name} process crashed and is started again in 0.5 s" in run.said
    assert run.losses() == losses_of(undisturbed)
    disturbed, whole = run.report(), report_of(undisturbed)
    for report in (disturbed, whole):
        assert report.pop("wall_seconds") > 0
        report.pop("run")
        report["config"].pop("run")
    assert disturbed == whole


# A run that trains only has one worker fewer to start.
@pytest.mark.parametrize(
    ("how", "evaluates"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGKILL, True)]
)
def test_no_process_outlives_its_run_and_resume_finishes_it(
    stack: MakeStack, undisturbed: Path, tmp_path: Path, how: signal.Signals, evaluates: bool
) -> None:
    config = LAB if evaluates else without_evaluation(tmp_path)
    run = stack(how.name, *UNDISTURBED, config=config).start()
    run.await_updates(2)
    port = server_port(run)
    if how is signal.SIGKILL:
        run.process.kill()
        run.process.wait()
    else:
        os.kill(run.processes()["trainer"], signal.SIGKILL)
        wait_for(lambda: "the trainer process crashed" in run.said, "the warning", 30)
        run.process.send_signal(how)
        assert run.process.wait(30) == 130 and "continue with --resume" in run.printed
        assert run.said.count("is started again") == 1
    wait_for(lambda: run.processes() == {} and not listens(port), "the end of all processes", 30)
    assert not (run.dir / "report.json").exists()

    assert "--resume" in run.refusal()
    run.finished("--resume")
    report = run.report()
    rollouts = report["rollouts"]
    assert report["steps"] == 8
    assert (rollouts["published"], rollouts["trained"], rollouts["pending"]) == (64, 64, 0)
    assert run.losses() == losses_of(undisturbed)


def test_a_run_that_was_started_with_sigint_ignored_ends_by_sigterm_alone(stack: MakeStack, tmp_path: Path) -> None:
    """A shell without job control ignores SIGINT for what it starts in the background, so that Ctrl-C spares it."""
    run = stack("background", *EXACT_CRITIC, config=without_evaluation(tmp_path)).start(at_start=ignored_sigint)
    run.await_updates(1)
    port, before = server_port(run), run.processes()
    run.process.send_signal(signal.SIGINT)
    run.await_updates(len(run.losses()) + 2)
    assert run.processes() == before
    run.process.terminate()
    assert run.ended(30) == 130 and "continue with --resume" in run.printed
    assert not listens(port)


def test_a_server_that_does_not_get_its_port_back_ends_the_run(stack: MakeStack, tmp_path: Path) -> None:
    run = stack("homeless", *EXACT_CRITIC, config=without_evaluation(tmp_path)).start()
    run.wait(lambda: "trainer" in run.processes(), "the trainer")
    port = server_port(run)
    wrapper = run.processes()["redis"]
    # Held up, it does not start the server again before somebody else has taken its port.
    os.kill(wrapper, signal.SIGSTOP)
    os.kill(run.processes()["server"], signal.SIGKILL)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        wait_for(lambda: taken(thief, port), "the port")
        thief.listen()
        os.kill(wrapper, signal.SIGCONT)
        assert run.ended() == 1
    assert "the redis process was started again and serves at another address" in run.said
    assert "Traceback" not in run.said


def taken(thief: socket.socket, port: int) -> bool:
    try:
        thief.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_a_process_that_refuses_ends_the_run_at_once_with_its_last_lines(stack: MakeStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        run = stack("refused", *EXACT_CRITIC, "--critic.port", str(port))
        assert run.start().ended() == 1
    assert run.said.startswith("stepalign: the critic process ended with code 1; its last lines")
    assert f"cannot listen on critic.host:port 127.0.0.1:{port}" in run.said and "Traceback" not in run.said


def test_a_run_that_has_trained_nothing_is_a_failure_unless_it_is_allowed(stack: MakeStack, tmp_path: Path) -> None:
    """Three tokens hold no critique. The second session adds an update, and its lines to the logs."""
    options = ["--trainer.steps", "1", "--trainer.batch", "4", "--trainer.micro_batch", "4"]
    run = stack("untrained", *options, "--critic.max_new_tokens", "3", config=without_evaluation(tmp_path))
    assert run.start().ended() == 1
    assert run.said.startswith(
        f"stepalign: run '{run.dir.name}' has trained nothing: all of its 4 rollouts were skipped"
    )
    assert (
        "(critic_refused_budget_too_small 4)" in run.said
        and "--allow-untrained" in run.said
        and run.said.count("\n") == 1
    )
    assert run.report()["rollouts"]["trained"] == 0
    assert run.start("--resume", "--trainer.steps", "2", "--allow-untrained").ended() == 0
    assert run.report()["rollouts"]["published"] == 8
    for process in ("redis", "critic", "trainer", "solver", "report"):
        lines = run.log(process).splitlines()
        starts = [at for at, line in enumerate(lines) if f"════ the {process} process is started ════" in line]
        assert starts[0] == 0 and len(starts) == 2, process
        first, second = (json.loads(lines[at])["timestamp"] for at in starts)
        assert first < second


def test_a_damaged_model_is_refused_before_anything_is_started(stack: MakeStack, tmp_path: Path) -> None:
    model = tmp_path / "torn-model"
    shutil.copytree(REPO / "lab" / "stepalign_lab" / "assets" / "solver", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    run = stack("torn", "--model.path", str(model))
    assert run.refusal().startswith(f"stepalign: model.path: {weights} cannot be read")
    assert not run.dir.exists()
