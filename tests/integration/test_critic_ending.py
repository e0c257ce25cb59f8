"""How the critic's process ends: told to, with work in hand, and when its backend has died."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from stepalign.types import CritiqueRequest
from stepalign_critic.app import AppSettings
from stepalign_critic.backends import create_backend
from stepalign_critic.service import CriticService
from stepalign_run.config import CriticServerSection
from support.critic_processes import COMMAND, address_file, critic_process, ended_with_0, write_config
from support.critic_servers import CORRECT, ask, error_of, metric, serving, wait_until

pytestmark = pytest.mark.slow

# Answers when the file GATE is there, and then as its checker does.
HELD_COMMAND = f"""
import asyncio, sys
from pathlib import Path
from stepalign_critic import process
from stepalign_critic.backends.program import ProgramBackend
generate = ProgramBackend.generate
async def held(self, prompt):
    while not Path(sys.argv[1]).with_name("gate").exists():
        await asyncio.sleep(0.02)
    return await generate(self, prompt)
ProgramBackend.generate = held
{COMMAND}
"""
SLOW_COMMAND = f"""
import time
import stepalign_critic.process as process
from stepalign_critic.backends.program import ProgramBackend
from stepalign_lab.checker import exact_critique
def slow(question, attempt):
    time.sleep(0.7)
    return exact_critique(question, attempt)
process.create_backend = lambda section: ProgramBackend("slow", slow, "r")
{COMMAND}
"""


def test_the_command_announces_its_address_serves_and_ends_with_0(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with critic_process(config) as (process, url):
        response = ask(url, CritiqueRequest(**CORRECT))
        assert response.critique is not None
        process.send_signal(signal.SIGTERM)
        log = ended_with_0(process, config)
    lines = [json.loads(line) for line in log.splitlines()]
    assert any("loopback only" in line["event"] for line in lines)
    (line,) = [line for line in lines if line["event"] == "critique"]
    assert (line["critique_id"], line["outcome"], line["process"]) == (response.id, "correct", "critic")
    assert line["request_id"].startswith("req_")


def test_a_request_that_is_in_work_when_the_signal_comes_is_finished(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with critic_process(config, SLOW_COMMAND) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        with ThreadPoolExecutor() as threads:
            running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT)
            wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 1)
            process.send_signal(signal.SIGTERM)
            assert running.result(10).json()["critique"]["verdict"] == "correct"
        ended_with_0(process, config)


def test_the_command_serves_a_public_host_with_keys_and_drains_at_its_end(tmp_path: Path) -> None:
    """From SIGTERM on: not ready, serving for the grace, then gone, with exit code 0."""
    keys = tmp_path / "keys"
    keys.write_text("# team a\nsk-a\n\nsk-b\n")
    grace = 1.5
    config = write_config(tmp_path, host="0.0.0.0", api_keys_file=str(keys), drain_grace_seconds=grace, metrics_port=0)
    with critic_process(config) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        assert httpx.post(f"{url}/v1/critiques", json=CORRECT).status_code == 401
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        served = 0
        while process.poll() is None and time.monotonic() < signalled + 0.8 * grace:
            answer = httpx.post(f"{url}/v1/critiques", json=CORRECT, headers={"authorization": "Bearer sk-b"})
            assert answer.status_code == 200
            served += 1
        log = ended_with_0(process, config)
        lasted = time.monotonic() - signalled
    assert served > 0 and lasted >= grace
    assert "sk-a" not in log and "sk-b" not in log


def test_a_critic_that_is_still_loading_ends_at_once(tmp_path: Path) -> None:
    """The thread that loads a model cannot be interrupted; the process leaves it."""
    loading = SLOW_COMMAND.replace(
        "process.create_backend",
        "ProgramBackend.start = lambda self: asyncio.to_thread(time.sleep, 60)\nprocess.create_backend",
    ).replace("import time", "import asyncio, time")
    config = write_config(tmp_path, drain_grace_seconds=600)
    with critic_process(config, loading) as (process, url):
        answer = httpx.get(f"{url}/health/ready")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "loading")
        process.send_signal(signal.SIGTERM)
        ended_with_0(process, config)


def test_a_critic_with_a_dead_backend_ends_as_one_to_be_started_again(tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    dying = f"""
import sys
from pathlib import Path
from stepalign.cli import main
from stepalign_critic.backends.program import ProgramBackend
ProgramBackend.recovers = False
ProgramBackend.healthy = lambda self: not Path({str(dead)!r}).exists()
sys.argv.insert(1, "critic")
main()
"""
    config = write_config(tmp_path)
    with critic_process(config, dying) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        dead.touch()
        _, log = process.communicate(timeout=15)
    assert process.returncode == os.EX_TEMPFAIL
    assert log.splitlines()[-1] == "stepalign: the backend program has stopped working for good"
    assert not address_file(config).exists()


def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    config = write_config(tmp_path, drain_grace_seconds=600)
    with critic_process(config) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 503)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        ended_with_0(process, config)


def test_past_its_grace_a_critic_refuses_new_requests_and_answers_its_own(tmp_path: Path) -> None:
    config = write_config(tmp_path, drain_grace_seconds=0.2)
    with critic_process(config, HELD_COMMAND) as (process, url), ThreadPoolExecutor() as threads:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=60)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 1)
        process.send_signal(signal.SIGTERM)
        ready = lambda: error_of(httpx.get(f"{url}/health/ready"))["code"]  # noqa: E731
        wait_until(lambda: ready() == "stopping")
        refused = httpx.post(f"{url}/v1/critiques", json={**CORRECT, "answer": "8"})
        assert (refused.status_code, error_of(refused)["code"]) == (503, "stopping")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert process.poll() is None and not running.done()
        (tmp_path / "gate").touch()
        assert running.result(10).json()["critique"]["verdict"] == "correct"
        ended_with_0(process, config)


def test_what_is_not_answered_in_time_is_given_up_and_its_client_told_so(tmp_path: Path) -> None:
    config = write_config(tmp_path, finish_seconds=0.3)
    with critic_process(config, HELD_COMMAND) as (process, url), ThreadPoolExecutor() as threads:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        batch = {"items": [CORRECT, {**CORRECT, "answer": "8"}]}
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=60)
        both = threads.submit(httpx.post, f"{url}/v1/critiques/batch", json=batch, timeout=60)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 3)
        process.send_signal(signal.SIGTERM)
        for answer in (running.result(10), both.result(10)):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "stopping")
            assert answer.headers["retry-after"] == "1" and "given this request up" in answer.text
        log = [json.loads(line) for line in ended_with_0(process, config).splitlines()]
    (warning,) = [line for line in log if line["event"] == "requests are given up"]
    assert warning["count"] == 3


def test_a_client_that_never_reads_its_answer_keeps_no_process_from_ending(tmp_path: Path) -> None:
    impatient = COMMAND.replace(
        "app()\n", "from stepalign_critic import process\nprocess._LAST_ANSWERS_SECONDS = 1\napp()\n"
    )
    config = write_config(tmp_path, max_body_bytes=20_000_000)
    # Its answer holds the attempts again, which is more than the buffers of both ends of a connection take.
    items = [{**CORRECT, "attempt": f"<step_1>{'x' * 300_000}{i}</step_1>"} for i in range(50)]
    body = json.dumps({"items": items}).encode()
    headers = f"host: c\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    head = f"POST /v1/critiques/batch HTTP/1.1\r\n{headers}"
    with critic_process(config, impatient) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=30) as connection:
            connection.sendall(head.encode() + body)
            assert connection.recv(12) == b"HTTP/1.1 200"
            process.send_signal(signal.SIGTERM)
            ended_with_0(process, config)


def test_a_thread_that_does_not_end_keeps_no_process_from_ending(tmp_path: Path) -> None:
    hanging = SLOW_COMMAND.replace("time.sleep(0.7)", "time.sleep(600)").replace(
        "import time", "import time\nfrom stepalign_critic import process\nprocess._LAST_ANSWERS_SECONDS = 1"
    )
    config = write_config(tmp_path, finish_seconds=0.3)
    with critic_process(config, hanging) as (process, url), ThreadPoolExecutor() as threads:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=60)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 1)
        process.send_signal(signal.SIGTERM)
        assert running.result(10).status_code == 503
        log = ended_with_0(process, config)
    assert "ending without waiting for threads" in log.splitlines()[-1]


def test_a_body_that_does_not_come_is_answered_while_the_process_ends(tmp_path: Path) -> None:
    hurried = f"""
import functools
from stepalign_critic import process
process.AppSettings = functools.partial(process.AppSettings, body_seconds=1.0)
process._LAST_ANSWERS_SECONDS = 3
{COMMAND}
"""
    config = write_config(tmp_path)
    with critic_process(config, hurried) as (process, url):
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=30) as connection:
            connection.sendall(b"POST /v1/critiques HTTP/1.1\r\nhost: c\r\ncontent-length: 10\r\n\r\n{")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert connection.recv(12) == b"HTTP/1.1 408"
            log = ended_with_0(process, config)
    assert "Traceback" not in log


def test_a_second_signal_without_a_grace_gives_nothing_up(tmp_path: Path) -> None:
    """As of Ctrl-C, which a supervisor gets too and passes on."""
    config = write_config(tmp_path)
    with critic_process(config, HELD_COMMAND) as (process, url), ThreadPoolExecutor() as threads:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=60)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 1)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
            wait_until(lambda: error_of(httpx.get(f"{url}/health/ready"))["code"] == "stopping")
        time.sleep(0.2)
        (tmp_path / "gate").touch()
        assert running.result(10).status_code == 200
        ended_with_0(process, config)


def test_a_third_signal_gives_up_what_is_being_answered(tmp_path: Path) -> None:
    config = write_config(tmp_path, drain_grace_seconds=600, finish_seconds=600)
    with critic_process(config, HELD_COMMAND) as (process, url), ThreadPoolExecutor() as threads:
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = threads.submit(httpx.post, f"{url}/v1/critiques", json=CORRECT, timeout=60)
        wait_until(lambda: metric(url, "stepalign_critic_in_flight") == 1)
        for code in ("draining", "stopping"):
            process.send_signal(signal.SIGTERM)
            wait_until(lambda code=code: error_of(httpx.get(f"{url}/health/ready"))["code"] == code)
        process.send_signal(signal.SIGTERM)
        assert running.result(10).status_code == 503
        ended_with_0(process, config)


def test_a_body_of_a_health_check_is_not_waited_for() -> None:
    service = CriticService(create_backend(CriticServerSection(backend="program", checker="lab")), "lab-v1")
    with (
        serving(service, AppSettings(body_seconds=5)) as address,
        socket.create_connection(("127.0.0.1", httpx.URL(address).port or 0), timeout=2) as connection,
    ):
        connection.sendall(b"GET /health/live HTTP/1.1\r\nhost: c\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(12) == b"HTTP/1.1 200"
