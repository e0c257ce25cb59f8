"""Which servers the queue accepts, how it finds them, and what it says when there is none."""

from __future__ import annotations

import asyncio
import json
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.connection import parse_url
from typer.testing import CliRunner

from stepalign.errors import ConfigError, QueueUnavailableError, UnsupportedServerError
from stepalign_launcher import redis_server as embedded_redis
from stepalign_launcher.redis_server import EmbeddedRedis
from stepalign_run.commands.queue import queue as queue_app
from stepalign_run.config import QueueSection
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.ownership import OwnFolder
from stepalign_run.policy_store import PolicyVersion, open_policy_store
from stepalign_run.queue import RedisRolloutQueue, open_queue, redis_url
from stepalign_run.redis.connection import RedisConnection, run_key

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


def start(url: str, reconnect_seconds: float = 0) -> None:
    async def body() -> None:
        queue = RedisRolloutQueue(url, "run", "c", QueueSection(reconnect_seconds=reconnect_seconds))
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


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddedRedis:
    """Not started yet; it keeps its address when it is started again."""
    port = embedded_redis._free_port()
    monkeypatch.setattr(embedded_redis, "_free_port", lambda: port)
    monkeypatch.setattr("secrets.token_urlsafe", lambda size: "always-the-same")
    return EmbeddedRedis(tmp_path)


@pytest.mark.redis
def test_a_brief_outage_is_ridden_out(own_server: EmbeddedRedis, make_rollout) -> None:
    """The server is restarted under a claim, which only takes longer; what was published is still there."""
    server = own_server

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


@pytest.mark.redis
@pytest.mark.slow
def test_a_long_outage_is_ridden_out_by_who_has_the_patience(own_server: EmbeddedRedis, make_rollout) -> None:
    """Queue and policy store wait ``queue.reconnect_seconds`` for a server that is away for four seconds."""

    async def body(url: str) -> None:
        patient = QueueSection(redis_url=url, reconnect_seconds=15)
        hasty = QueueSection(redis_url=url, reconnect_seconds=0.3)
        queues = [open_queue(settings, "run", "c") for settings in (patient, hasty)]
        stores = [open_policy_store(settings, "run") for settings in (patient, hasty)]
        for queue in queues:
            await queue.start()
        await stores[0].publish(PolicyVersion(version=0, path="", sha256=""))
        claim = asyncio.create_task(queues[0].claim(1, 60))
        await asyncio.sleep(0.1)  # it waits for a rollout, on a connection of its own
        await asyncio.to_thread(own_server.stop)
        away_since = time.monotonic()
        status, latest = asyncio.create_task(queues[0].status()), asyncio.create_task(stores[0].latest())
        for call in (queues[1].status(), stores[1].latest()):
            with pytest.raises(QueueUnavailableError, match="no Redis server answers"):
                await call
        assert time.monotonic() - away_since < 3.5
        await asyncio.sleep(4 - (time.monotonic() - away_since))
        assert not any(waiting.done() for waiting in (claim, status, latest))
        await asyncio.to_thread(own_server.start)
        async with asyncio.timeout(10):
            assert (await status).published == 0
            assert await latest == PolicyVersion(version=0, path="", sha256="")
            await queues[0].publish([make_rollout()])
            assert [delivery.rollout.rollout_id for delivery in await claim] == ["r0"]
        for opened in (*queues, *stores):
            await opened.close()

    with own_server as url:
        asyncio.run(body(url))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a connection to nothing waits for, each wait as long as it is on average, instead of waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("redis.asyncio.retry.sleep", sleep)
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    return waited


def call_nobody(reconnect_seconds: float) -> None:
    async def body() -> None:
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            connection = RedisConnection(f"redis://127.0.0.1:{reserved.getsockname()[1]}", reconnect_seconds)
            with pytest.raises(QueueUnavailableError):
                await connection.command("PING")
            await connection.close()

    asyncio.run(body())


def test_without_patience_there_is_one_attempt(waits: list[float]) -> None:
    call_nobody(0)
    assert waits == []


@pytest.mark.parametrize("seconds", [0.05, 0.3, 3.0, 15.0, 60.0])
def test_an_outage_is_waited_out_for_as_long_as_configured(waits: list[float], seconds: float) -> None:
    call_nobody(seconds)
    assert sum(waits) >= seconds
    assert waits == sorted(waits) and max(waits) <= 1


@pytest.mark.parametrize("seconds", [0.3, 3.0, 15.0, 60.0])
def test_an_outage_is_waited_out_for_no_more_than_a_wait_longer(waits: list[float], seconds: float) -> None:
    call_nobody(seconds)
    assert sum(waits[:-1]) < seconds


@pytest.mark.redis
def test_a_refused_password_is_said_at_once(redis_server: str, waits: list[float]) -> None:
    with pytest.raises(QueueUnavailableError, match="refuses the password"):
        start(f"redis://:wrong@{redis_server.rpartition('@')[2]}", reconnect_seconds=3)
    assert waits == []


def test_the_configured_address_goes_before_the_environments() -> None:
    environ = {"REDIS_URL": "redis://environment"}
    assert redis_url(QueueSection(redis_url="redis://configured"), environ) == "redis://configured"
    assert redis_url(QueueSection(), environ) == "redis://environment"
    assert redis_url(QueueSection(), {}) is None
    assert redis_url(QueueSection(), {"REDIS_URL": ""}) is None


# Printable ASCII, and each of its characters would end or change some part of an address.
AWKWARD = "p@ss:w/o?r#d%41&[x]+!"


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(f"{AWKWARD}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("address", "username"),
    [
        ("redis://host:6380/3", None),
        ("redis://worker@host:6380/3", "worker"),
        ("redis://w%40rker@host:6380/3", "w@rker"),
        ("redis://worker:@host:6380/3", "worker"),
        ("rediss://host:6380/3?socket_timeout=5", None),
    ],
)
def test_the_password_of_the_file_is_put_into_the_address(
    password_file: Path, address: str, username: str | None
) -> None:
    settings = QueueSection(redis_password_file=password_file)
    found = redis_url(settings.model_copy(update={"redis_url": address}), {})
    assert found == redis_url(settings, {"REDIS_URL": address})
    assert found is not None
    parsed = parse_url(found)
    assert (parsed["password"], parsed.get("username")) == (AWKWARD, username)
    assert (parsed["host"], parsed["port"], parsed["db"]) == ("host", 6380, 3)
    assert urlsplit(found).scheme == urlsplit(address).scheme and urlsplit(found).query == urlsplit(address).query


def test_a_socket_gets_the_password_too(password_file: Path) -> None:
    settings = QueueSection(redis_url="unix:///run/redis.sock?db=2", redis_password_file=password_file)
    parsed = parse_url(redis_url(settings, {}) or "")
    assert (parsed["path"], parsed["password"], parsed["db"]) == ("/run/redis.sock", AWKWARD, 2)


def test_a_password_file_names_no_server(password_file: Path) -> None:
    assert redis_url(QueueSection(redis_password_file=password_file), {}) is None


def test_the_same_password_in_both_places_is_fine(password_file: Path) -> None:
    settings = QueueSection(redis_url="redis://worker@host:6380/3", redis_password_file=password_file)
    once = redis_url(settings, {})
    assert redis_url(settings.model_copy(update={"redis_url": once}), {}) == once


def test_the_same_password_may_be_quoted_in_another_way(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a!b/c")
    settings = QueueSection(redis_url="redis://:a!b%2fc@host", redis_password_file=tmp_path / "password")
    assert parse_url(redis_url(settings, {}) or "")["password"] == "a!b/c"


@pytest.mark.parametrize("where", ["configured", "environment"])
def test_another_password_in_the_address_is_refused_and_none_is_shown(tmp_path: Path, where: str) -> None:
    (tmp_path / "password").write_text("of-the-file")
    address = "redis://:of-the-address@host"
    settings = QueueSection(
        redis_url=address if where == "configured" else None, redis_password_file=tmp_path / "password"
    )
    with pytest.raises(ConfigError, match=r"another password than queue\.redis_password_file") as caught:
        redis_url(settings, {"REDIS_URL": address})
    assert "of-the" not in str(caught.value)


def test_a_password_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    settings = QueueSection(redis_url="redis://host", redis_password_file=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"queue\.redis_password_file: .*none cannot be read"):
        redis_url(settings, {})


def test_a_bad_address_is_a_configuration_error_with_a_password_file_too(password_file: Path) -> None:
    settings = QueueSection(redis_url="redis://[::1", redis_password_file=password_file)
    with pytest.raises(ConfigError, match=r"queue\.redis_url") as caught:
        open_queue(settings, "run", "c")
    assert AWKWARD not in str(caught.value)


async def published_with(settings: QueueSection, run: str, rollouts: list) -> int:
    queue = open_queue(settings, run, "c")
    await queue.start()
    await queue.publish(rollouts)
    count = (await queue.status()).published
    await queue.close()
    return count


@pytest.mark.redis
def test_a_queue_opens_with_its_password_in_a_file(redis_server: str, tmp_path: Path, make_rollout) -> None:
    parts = urlsplit(redis_server)
    bare = f"redis://127.0.0.1:{parts.port}{parts.path}"
    (tmp_path / "password").write_text(f"# of the embedded server\n{parts.password}\n")
    settings = QueueSection(redis_url=bare, redis_password_file=tmp_path / "password", reconnect_seconds=0)
    assert asyncio.run(published_with(settings, "password-file", [make_rollout()])) == 1
    (tmp_path / "password").write_text("another\n")
    with pytest.raises(QueueUnavailableError, match="refuses the password"):
        asyncio.run(published_with(settings, "password-file", [make_rollout()]))


@pytest.mark.redis
def test_an_awkward_password_and_a_user_of_its_own_open_the_queue(
    redis_server: str, password_file: Path, make_rollout
) -> None:
    with redis.Redis.from_url(redis_server) as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", f">{AWKWARD}", "~stepalign:*", "+@all")
    try:
        address = redis_server.rpartition("@")[2]
        section = QueueSection(redis_password_file=password_file, reconnect_seconds=0)
        worker = section.model_copy(update={"redis_url": f"redis://worker@{address}"})
        assert asyncio.run(published_with(worker, "awkward", [make_rollout()])) == 1
        nobody = section.model_copy(update={"redis_url": f"redis://{address}"})
        with pytest.raises(QueueUnavailableError, match="refuses the password"):
            asyncio.run(published_with(nobody, "awkward", [make_rollout()]))
    finally:
        with redis.Redis.from_url(redis_server) as client:
            client.execute_command("ACL", "DELUSER", "worker")


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
def test_the_status_command_finds_the_embedded_server_and_prints_counts(
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


@pytest.mark.redis
def test_dead_letters_are_listed_put_back_and_what_is_left_is_drained(
    redis_server: str, config: Path, tmp_path: Path, make_rollout
) -> None:
    options = ["--queue.redis_url", redis_server, "--run.name", "letters", "--run.dir", str(tmp_path)]

    def command(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(queue_app, [*arguments, *options])
        return result.exit_code, result.stdout

    async def fill() -> list[str]:
        queue = open_queue(QueueSection(redis_url=redis_server), "letters", "c")
        await queue.start()
        await queue.publish([make_rollout(rollout_id=f"r{i}") for i in range(3)])
        with redis.Redis.from_url(redis_server) as stranger:
            stranger.xadd(run_key("letters", "rollouts"), {"rollout": "{"})
            stranger.hincrby(run_key("letters", "ledger"), "published", 1)
        first, _, _ = await queue.claim(4, 0.0)
        await queue.dead_letter(first.entry_id, "no critique in five tries")
        entries = [letter.entry_id for letter in await queue.dead_letters(10)]
        await queue.close()
        return entries

    OwnFolder(tmp_path, "letters").claim()
    poison, given_up = asyncio.run(fill())
    code, shown = command("dlq", "list", str(config), "--json")
    rows = json.loads(shown)
    assert code == 0 and [(row["entry_id"], row["rollout_id"]) for row in rows] == [(poison, None), (given_up, "r0")]
    assert rows[0]["bytes"] == 1 and rows[1]["reason"] == "no critique in five tries"
    assert "no critique in five tries" in command("dlq", "list", str(config))[1]

    assert command("dlq", "replay", str(config))[0] == 2
    code, shown = command("dlq", "replay", str(config), "--all")
    assert code == 1
    assert f"{given_up}: replayed" in shown and f"{poison}: stays, it would come back at once: not JSON" in shown
    code, shown = command("dlq", "replay", str(config), "--entry", given_up)
    assert (code, shown) == (1, f"{given_up}: there is no such dead letter\n")

    assert command("drain", str(config))[0] == 1  # nobody says yes
    with lock_file(tmp_path / "letters" / ".trainer.lock", "taken"):
        result = CliRunner().invoke(queue_app, ["drain", str(config), "--yes", *options])
        assert isinstance(result.exception, ConfigError) and "a trainer works on" in str(result.exception)
    with redis.Redis.from_url(redis_server) as stranger:
        stranger.xadd(run_key("letters", "rollouts"), {"rollout": "{"})
        stranger.hincrby(run_key("letters", "ledger"), "published", 1)
    said = "3 rollouts skipped as drained; buried, as they do not decode: 1\n"
    assert command("drain", str(config), "--yes") == (0, said)
    report = json.loads(command("status", str(config), "--json")[1])
    assert (report["length"], report["dead"], report["skipped"], report["balanced"]) == (0, 2, {"drained": 3}, True)
    (row,) = [json.loads(line) for line in (tmp_path / "letters" / "outcomes.jsonl").read_text().splitlines()]
    assert row == {"step": 0, "outcomes": dict.fromkeys(["r1", "r2", "r0"], "skipped:drained")}
