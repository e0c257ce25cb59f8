from __future__ import annotations

import asyncio
import os
import signal
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

from stepalign import embedded_redis
from stepalign.config import QueueSection
from stepalign.embedded_redis import EmbeddedRedis, EmbeddedRedisError, find_server
from stepalign.queue import RedisRolloutQueue

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
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


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


def test_work_survives_a_restart_and_the_password_does_not(tmp_path: Path, make_rollout) -> None:
    with EmbeddedRedis(tmp_path) as first:
        assert claim_one(first, [make_rollout(rollout_id="r0"), make_rollout(rollout_id="r1")]) == "r0"
    with EmbeddedRedis(tmp_path) as second:
        assert claim_one(second) == "r0"
    assert urlsplit(first).password != urlsplit(second).password


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
    with (
        EmbeddedRedis(tmp_path) as url,
        pytest.raises(EmbeddedRedisError, match="a server still runs in"),
    ):
        EmbeddedRedis(tmp_path).start()
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
    with pytest.raises(EmbeddedRedisError, match=r"stepalign\[embedded\].*REDIS_URL"):
        find_server()
    program(tmp_path, "redis-server", "echo 'Redis server v=6.0.16'")
    with pytest.raises(EmbeddedRedisError, match=r"version 6\.0\.16"):
        find_server()


def starts(directory: Path) -> bool:
    try:
        with EmbeddedRedis(directory):
            return True
    except EmbeddedRedisError:
        return False


@contextmanager
def served(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """The process form: the process, the server's address and the server's process id."""
    command = [sys.executable, "-m", "stepalign.embedded_redis", str(directory)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            url_file = directory / "redis.url"
            assert wait_until(url_file.exists), "no redis.url within 10 s"
            assert stat.S_IMODE(url_file.stat().st_mode) == 0o600
            url = url_file.read_text(encoding="utf-8").strip()
            yield process, url, server_pid(url)
        finally:
            process.kill()


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


def test_the_process_fails_when_its_server_dies(tmp_path: Path) -> None:
    with served(tmp_path) as (process, _, server):
        os.kill(server, signal.SIGKILL)
        assert process.wait(10) == 1
        assert process.stderr is not None
        assert b"error: the server ended with code -9" in process.stderr.read()


def test_a_server_whose_process_was_killed_still_guards_its_directory(tmp_path: Path) -> None:
    with served(tmp_path) as (process, _, server):
        process.kill()
        process.wait()
        try:
            with pytest.raises(EmbeddedRedisError, match="still runs"):
                EmbeddedRedis(tmp_path).start()
        finally:
            os.kill(server, signal.SIGTERM)
    assert wait_until(lambda: starts(tmp_path)), "the lock outlives the server"
