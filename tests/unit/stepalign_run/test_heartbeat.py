"""The sign of life: a file whose age tells whether the process works."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_run import heartbeat
from stepalign_run.heartbeat import Heartbeat


def touched(path: Path) -> int:
    return path.stat().st_mtime_ns


async def until_touched_after(path: Path, moment: int) -> int:
    async with asyncio.timeout(10):
        while not path.exists() or touched(path) <= moment:
            await asyncio.sleep(0.002)
    return touched(path)


def test_without_a_file_nothing_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.001)

    async def body() -> None:
        async with Heartbeat(None).beating():
            await asyncio.sleep(0.02)

    Heartbeat(None).beat()
    asyncio.run(body())
    assert list(tmp_path.iterdir()) == []


def test_a_beat_makes_the_file_young(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    Heartbeat(path).beat()
    assert time.time() - path.stat().st_mtime < 5
    os.utime(path, (1, 1))
    Heartbeat(path).beat()
    assert time.time() - path.stat().st_mtime < 5


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / parent / "heartbeat"
    with pytest.raises(ConfigError, match=rf"^run\.heartbeat_file: .*{parent}/heartbeat cannot be touched: \w"):
        Heartbeat(path).beat()


def test_work_does_not_begin_without_a_first_beat(tmp_path: Path) -> None:
    worked: list[int] = []

    async def body() -> None:
        async with Heartbeat(tmp_path / "missing" / "heartbeat").beating():
            worked.append(1)

    with pytest.raises(ConfigError, match=r"run\.heartbeat_file"):
        asyncio.run(body())
    assert worked == []


def test_it_beats_at_once_again_and_again_and_no_longer_than_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "heartbeat"

    async def body() -> None:
        async with Heartbeat(path).beating():
            first = touched(path)
            await asyncio.sleep(0.03)
            assert touched(path) == first  # not before the interval has passed
        monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.005)
        async with Heartbeat(path).beating():
            last = touched(path)
            assert last > first
            for _ in range(3):
                last = await until_touched_after(path, last)
        assert len(asyncio.all_tasks()) == 1
        last = touched(path)
        await asyncio.sleep(0.05)
        assert touched(path) == last

    asyncio.run(body())


def test_an_event_loop_that_is_stuck_gives_no_sign_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.005)
    path = tmp_path / "heartbeat"

    async def body() -> None:
        async with Heartbeat(path).beating():
            last = await until_touched_after(path, touched(path))
            time.sleep(0.05)
            assert touched(path) == last
            await until_touched_after(path, last)

    asyncio.run(body())


def test_an_error_of_the_work_ends_the_beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.005)
    path = tmp_path / "heartbeat"

    async def body() -> None:
        with pytest.raises(RuntimeError, match="of the work"):
            async with Heartbeat(path).beating():
                raise RuntimeError("of the work")
        path.unlink()
        await asyncio.sleep(0.03)
        assert not path.exists()

    asyncio.run(body())


def test_a_beat_that_fails_later_does_not_end_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is worth more than its sign of life; the health check sees the file grow old."""
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.005)
    path = tmp_path / "folder" / "heartbeat"
    path.parent.mkdir()

    async def body() -> str:
        async with Heartbeat(path).beating():
            await until_touched_after(path, touched(path))
            shutil.rmtree(path.parent)
            await asyncio.sleep(0.05)
            return "done"

    assert asyncio.run(body()) == "done"
    assert not path.exists()


def test_a_beat_that_fails_later_is_logged_and_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_SECONDS", 0.005)
    path = tmp_path / "folder" / "heartbeat"
    path.parent.mkdir()

    async def body() -> None:
        async with Heartbeat(path).beating():
            shutil.rmtree(path.parent)
            await asyncio.sleep(0.05)
            path.parent.mkdir()
            async with asyncio.timeout(1):
                while not path.exists():
                    await asyncio.sleep(0.005)

    asyncio.run(body())
    assert "run.heartbeat_file" in caplog.text + "".join(capsys.readouterr())
