"""Which servers the queue accepts, how it finds them, and what it says when there is none."""

from __future__ import annotations

import asyncio
import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepalign import embedded_redis
from stepalign.config import QueueSection
from stepalign.embedded_redis import EmbeddedRedis
from stepalign.errors import ConfigError, QueueUnavailableError, UnsupportedServerError
from stepalign.queue import RedisRolloutQueue, open_queue, redis_url
from stepalign.queue.commands import queue as queue_app

CONFIG = """
[run]
name = "seen"
dir = "{runs}"
[model]
path = "model"
[data]
train = "train.jsonl"
[critic]
backend = "program"
checker = "lab"
"""


class _Answers(socketserver.StreamRequestHandler):
    """Speaks just enough RESP: INFO is answered with the server's text, all else with OK."""

    def handle(self) -> None:
        while header := self.rfile.readline():
            parts: list[bytes] = []
            for _ in range(int(header[1:])):
                size = int(self.rfile.readline()[1:])
                parts.append(self.rfile.read(size + 2)[:-2])
            if parts[0].upper() == b"INFO":
                text = self.server.info.encode()  # type: ignore[attr-defined]
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(text), text))
            else:
                self.wfile.write(b"+OK\r\n")


@contextmanager
def fake_server(info: str) -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Answers) as server:
        server.daemon_threads = True
        server.info = info  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"redis://:secret@127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()


def start(url: str) -> None:
    async def body() -> None:
        queue = RedisRolloutQueue(url, "run", "c", QueueSection())
        try:
            await queue.start()
        finally:
            await queue.close()

    asyncio.run(body())


@pytest.mark.parametrize("version", ["6.2.0", "5.0.14", "unknown"])
def test_an_old_server_is_refused_by_its_version(version: str) -> None:
    with (
        fake_server(f"redis_version:{version}\r\nmaxmemory_policy:noeviction\r\n") as url,
        pytest.raises(UnsupportedServerError, match=f"is Redis {version}; use Redis 7.0") as caught,
    ):
        start(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_may_evict_work_is_refused() -> None:
    with (
        fake_server("redis_version:8.0.1\r\nmaxmemory_policy:allkeys-lru\r\n") as url,
        pytest.raises(UnsupportedServerError, match=r"allkeys-lru.*set maxmemory-policy to noeviction"),
    ):
        start(url)


def test_redis_7_and_valkey_are_accepted() -> None:
    for first in ("redis_version:7.0.0", "server_name:valkey\r\nredis_version:7.2.4\r\nvalkey_version:9.1.2"):
        with fake_server(f"{first}\r\nmaxmemory_policy:noeviction\r\n") as url:
            start(url)


def test_an_unreachable_server_is_named_without_its_password() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        with pytest.raises(QueueUnavailableError, match=f"127.0.0.1:{port}") as caught:
            start(f"redis://:secret@127.0.0.1:{port}/0")
    assert "secret" not in str(caught.value)


def test_an_address_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"queue\.redis_url"):
        RedisRolloutQueue("localhost:6379", "run", "c", QueueSection())


@pytest.mark.redis
def test_a_refused_password_is_said_to_be_refused(redis_server: str) -> None:
    address = redis_server.rpartition("@")[2]
    with pytest.raises(QueueUnavailableError, match="refuses the password"):
        start(f"redis://:wrong@{address}")


@pytest.mark.redis
def test_a_brief_outage_is_ridden_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_rollout) -> None:
    """The server is restarted under a claim, which only takes longer; what was published is still there."""
    port = embedded_redis._free_port()
    monkeypatch.setattr(embedded_redis, "_free_port", lambda: port)
    monkeypatch.setattr("secrets.token_urlsafe", lambda size: "always-the-same")
    server = EmbeddedRedis(tmp_path)

    async def body(url: str) -> None:
        queue = RedisRolloutQueue(url, "run", "c", QueueSection())
        await queue.start()
        await queue.publish([make_rollout()])
        await asyncio.to_thread(server.stop)
        claim = asyncio.create_task(queue.claim(1, 0))
        await asyncio.sleep(0.2)
        assert not claim.done()
        await asyncio.to_thread(server.start)
        assert len(await claim) == 1
        await queue.close()

    with server as url:
        asyncio.run(body(url))


def test_the_configured_address_goes_before_the_environments() -> None:
    environ = {"REDIS_URL": "redis://environment"}
    assert redis_url(QueueSection(redis_url="redis://configured"), environ) == "redis://configured"
    assert redis_url(QueueSection(), environ) == "redis://environment"
    assert redis_url(QueueSection(), {}) is None
    assert redis_url(QueueSection(), {"REDIS_URL": ""}) is None


def test_a_queue_without_a_server_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"queue\.redis_url or REDIS_URL"):
        open_queue(QueueSection(), "run", "c")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("REDIS_URL", raising=False)
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(runs=tmp_path), encoding="utf-8")
    return path


@pytest.mark.redis
def test_the_status_command_finds_the_embedded_server_and_prints_the_counts(
    redis_server: str, config: Path, tmp_path: Path, make_rollout
) -> None:
    (tmp_path / "seen" / "redis").mkdir(parents=True)
    (tmp_path / "seen" / "redis" / "redis.url").write_text(f"{redis_server}\n", encoding="utf-8")

    async def fill() -> None:
        queue = open_queue(QueueSection(redis_url=redis_server), "seen", "c")
        await queue.start()
        await queue.publish([make_rollout(rollout_id=f"r{i}") for i in range(7)])
        (entry,) = await queue.claim(1, 0)
        await queue.acknowledge({entry.entry_id: "skipped:truncated"})
        await queue.claim(2, 0)
        await queue.close()

    asyncio.run(fill())
    result = CliRunner().invoke(queue_app, ["status", str(config), "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert (report["published"], report["length"], report["claimed"], report["waiting"]) == (7, 6, 2, 4)
    assert report["skipped"] == {"truncated": 1}
    assert report["balanced"] is True
    shown = CliRunner().invoke(queue_app, ["status", str(config)], catch_exceptions=False).stdout
    assert "skipped: truncated" in shown
    assert "the ledger is balanced" in shown


@pytest.mark.redis
def test_the_status_command_takes_overrides(redis_server: str, config: Path) -> None:
    arguments = ["status", str(config), "--queue.redis_url", redis_server, "--run.name", "empty", "--json"]
    report = json.loads(CliRunner().invoke(queue_app, arguments, catch_exceptions=False).stdout)
    assert report["published"] == 0


def test_the_status_command_without_a_server_says_what_to_do(config: Path) -> None:
    with pytest.raises(ConfigError, match="not in progress"):
        CliRunner().invoke(queue_app, ["status", str(config)], catch_exceptions=False)
