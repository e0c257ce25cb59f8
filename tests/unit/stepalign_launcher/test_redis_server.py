from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from stepalign_launcher import redis_server as embedded_redis
from stepalign_launcher.redis_server import EmbeddedRedis, EmbeddedRedisError, ServerDiedError, find_server
from stepalign_run.config import QueueSection
from stepalign_run.queue import RedisRolloutQueue

pytestmark = pytest.mark.redis
NO_RETRY = Retry(NoBackoff(), 0)


def program(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def claim_one(url: str, publish: list | None = None) -> str:
    async def body() -> str:
        queue = RedisRolloutQueue(url, "run", "c", QueueSection())
        await queue.start()
        if publish:
            await queue.publish(publish)
        (delivery,) = await queue.claim(1, 0)
        await queue.close()
        return delivery.rollout.rollout_id

    return asyncio.run(body())


def server_pid(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return client.info("server")["process_id"]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_server_answers_with_its_password_only(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url:
        port = urlsplit(url).port
        assert port
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            settings = client.config_get("*")
        assert settings["bind"] == "127.0.0.1"
        assert (settings["appendonly"], settings["appendfsync"], settings["save"]) == ("yes", "everysec", "")
        assert settings["maxmemory-policy"] == "noeviction"
        with redis.Redis(port=port, retry=NO_RETRY) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_the_password_is_in_private_files_only(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url:
        password = urlsplit(url).password
        assert password
        command = subprocess.check_output(["ps", "-ww", "-o", "command=", "-p", str(server_pid(url))], text=True)
        assert password not in command
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
        assert [path.name for path in holders] == ["redis.conf"]
        assert stat.S_IMODE(holders[0].stat().st_mode) == 0o600


def test_work_and_address_survive_a_restart(tmp_path: Path, make_rollout) -> None:
    with EmbeddedRedis(tmp_path) as first:
        assert claim_one(first, [make_rollout(rollout_id="r0"), make_rollout(rollout_id="r1")]) == "r0"
    with EmbeddedRedis(tmp_path) as second:
        assert claim_one(second) == "r0"
    assert second == first


def test_another_directory_has_another_password(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "a") as first, EmbeddedRedis(tmp_path / "b") as second:
        assert urlsplit(first).password != urlsplit(second).password


def test_an_address_that_was_taken_meanwhile_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as first, redis.Redis.from_url(first) as client:
        client.set("kept", 1)
    with socket.create_server(("127.0.0.1", urlsplit(first).port)), EmbeddedRedis(tmp_path) as second:
        assert urlsplit(second).port != urlsplit(first).port
        assert urlsplit(second).password != urlsplit(first).password
        with redis.Redis.from_url(second) as client:
            assert client.get("kept") == b"1"
    with EmbeddedRedis(tmp_path) as third:
        assert third == second


def test_stopping_ends_the_server(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    pid = server_pid(server.start())
    assert alive(pid)
    server.stop()
    assert not alive(pid)
    server.stop()


def test_a_folder_with_a_quote_and_a_blank_in_its_name_will_do(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / 'my "runs" \\ here') as url, redis.Redis.from_url(url) as client:
        assert client.ping()
    assert (tmp_path / 'my "runs" \\ here' / "appendonlydir").is_dir()


def test_one_directory_has_one_server(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as url, redis.Redis.from_url(url, retry=NO_RETRY) as client:
        with pytest.raises(EmbeddedRedisError, match="a server still runs in"):
            EmbeddedRedis(tmp_path).start()
        assert client.ping()
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(url, retry=NO_RETRY).ping()


def test_a_server_that_ends_at_once_leaves_its_last_words_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = program(tmp_path, "broken-server", "echo 'Can not load the AOF'; exit 3")
    with monkeypatch.context() as patch:
        patch.setattr(embedded_redis, "find_server", lambda: broken)
        with pytest.raises(EmbeddedRedisError, match=r"code 3(.|\n)*Can not load the AOF"):
            EmbeddedRedis(tmp_path).start()
    with EmbeddedRedis(tmp_path) as url:
        assert url


def test_a_server_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = program(tmp_path, "mute-server", f"echo $$ > '{tmp_path}/pid'; echo thinking; exec sleep 60")
    monkeypatch.setattr(embedded_redis, "find_server", lambda: mute)
    monkeypatch.setattr(embedded_redis, "_START_SECONDS", 0.5)
    with pytest.raises(EmbeddedRedisError, match=r"no answer(.|\n)*thinking"):
        EmbeddedRedis(tmp_path).start()
    assert not alive(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_another_port_is_tried_when_the_first_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedRedis(tmp_path / "first") as first:
        ports = iter([urlsplit(first).port, embedded_redis._free_port()])
        monkeypatch.setattr(embedded_redis, "_free_port", lambda: next(ports))
        with EmbeddedRedis(tmp_path / "second") as second:
            assert urlsplit(second).port != urlsplit(first).port


def test_a_server_on_the_path_is_preferred_if_it_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    old = program(tmp_path, "redis-server", "echo 'Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1'")
    assert find_server() != old
    valkey = program(tmp_path, "valkey-server", "echo 'Valkey server v=8.0.1 sha=00000000:0'")
    assert find_server() == valkey
    recent = program(tmp_path, "redis-server", "echo 'Redis server v=7.0.15 sha=00000000:0'")
    assert find_server() == recent


def test_without_any_server_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedRedisError, match=r"extra 'embedded'.*REDIS_URL"):
        find_server()
    program(tmp_path, "redis-server", "echo 'Redis server v=6.0.16'")
    with pytest.raises(EmbeddedRedisError, match=r"version 6\.0\.16"):
        find_server()


@contextmanager
def served(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """The process form: the process, the server's address and the server's process id."""
    command = [sys.executable, "-m", "stepalign_launcher.redis_server", str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            url_file = directory / "redis.url"
            assert wait_until(url_file.exists), "no redis.url within 10 s"
            assert stat.S_IMODE(url_file.stat().st_mode) == 0o600
            url = url_file.read_text(encoding="utf-8").strip()
            yield process, url, server_pid(url)
        finally:
            # A kill would leave the server running where the kernel does not end it.
            process.terminate()
            process.wait(20)


def test_the_process_ends_with_its_lifeline_and_leaves_no_orphan(tmp_path: Path) -> None:
    with served(tmp_path) as (process, _, server):
        assert process.stdin is not None
        process.stdin.write(b"noise is no end\n")
        process.stdin.flush()
        time.sleep(0.3)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(10) == 0
        assert not alive(server)
    assert not (tmp_path / "redis.url").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_ends_by_signal_and_leaves_no_orphan(tmp_path: Path, number: signal.Signals) -> None:
    with served(tmp_path) as (process, _, server):
        process.send_signal(number)
        assert process.wait(10) == 0
        assert not alive(server)
    assert not (tmp_path / "redis.url").exists()


def test_a_process_whose_server_died_says_so_and_the_next_serves_the_same(tmp_path: Path, make_rollout) -> None:
    with served(tmp_path) as (process, url, server):
        assert claim_one(url, [make_rollout(rollout_id="r0")]) == "r0"
        os.kill(server, signal.SIGKILL)
        assert process.wait(10) == os.EX_TEMPFAIL
        assert process.stderr is not None
        assert b"error: the server ended with code -9" in process.stderr.read()
    assert not (tmp_path / "redis.url").exists()
    with served(tmp_path) as (_, again, _):
        assert again == url
        assert claim_one(url) == "r0"


def test_a_server_that_is_killed_while_it_starts_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = program(tmp_path, "killed-server", "kill -9 $$")
    monkeypatch.setattr(embedded_redis, "find_server", lambda: killed)
    with pytest.raises(ServerDiedError, match="code -9"):
        EmbeddedRedis(tmp_path).start()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends what its parent leaves behind on Linux only")
def test_killing_the_process_ends_its_server(tmp_path: Path, make_rollout) -> None:
    with served(tmp_path) as (process, url, server):
        assert claim_one(url, [make_rollout(rollout_id="r0")]) == "r0"
        process.kill()
        process.wait()
        try:
            assert wait_until(lambda: not alive(server)), "the server outlives its process"
        finally:
            if alive(server):
                os.kill(server, signal.SIGKILL)
    with EmbeddedRedis(tmp_path) as again:
        assert again == url
        assert claim_one(again) == "r0"


# The kernel's promise is about the thread that started the server, so this one outlives its process on Linux too.
ORPHANING = """
import sys, threading
from pathlib import Path
from stepalign_launcher.redis_server import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1]))
thread = threading.Thread(target=lambda: print(server.start(), flush=True))
thread.start()
thread.join()
sys.stdin.read()
"""


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a server in ``tmp_path`` whose process was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            server = server_pid(url)
        finally:
            process.kill()
    try:
        yield url, server
    finally:
        if alive(server):
            os.kill(server, signal.SIGKILL)


def test_a_server_outlives_its_starting_thread_not_the_next_owner(
    tmp_path: Path, orphan: tuple[str, int], make_rollout
) -> None:
    url, server = orphan
    assert claim_one(url, [make_rollout(rollout_id="r0")]) == "r0"
    with EmbeddedRedis(tmp_path) as again:
        assert wait_until(lambda: not alive(server))
        assert again == url
        assert claim_one(again) == "r0"


def test_an_orphan_that_does_not_react_is_killed(
    tmp_path: Path, orphan: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "_STOP_SECONDS", 0.5)
    url, server = orphan
    os.kill(server, signal.SIGSTOP)
    with EmbeddedRedis(tmp_path) as again:
        assert again == url
        assert wait_until(lambda: not alive(server))


def test_a_process_that_got_the_number_of_an_earlier_server_is_left_alone(
    tmp_path: Path, orphan: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "_STOP_SECONDS", 0.2)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        try:
            (tmp_path / "redis.pid").write_text(f"{stranger.pid}\n")
            with pytest.raises(EmbeddedRedisError, match="a server still runs in"):
                EmbeddedRedis(tmp_path).start()
            assert stranger.poll() is None
        finally:
            stranger.kill()
    assert alive(orphan[1])
