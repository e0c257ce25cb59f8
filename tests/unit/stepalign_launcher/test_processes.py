"""What is asked of other processes. That a server ends with its process: test_redis_server.py."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from stepalign_launcher.processes import command_line, ending_with_its_parent

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")


@pytest.mark.parametrize("platform", [pytest.param("linux", marks=ON_LINUX), "darwin"])
def test_a_process_has_its_command_line_and_none_once_it_is_gone(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macOS is asked in a way that Linux knows too."""
    monkeypatch.setattr(sys, "platform", platform)
    with subprocess.Popen(["cat", "-u", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        try:
            assert cat.stdin is not None and cat.stdout is not None
            cat.stdin.write(b"it runs\n")
            cat.stdin.flush()
            assert cat.stdout.readline() == b"it runs\n"
            assert command_line(cat.pid) == "cat -u -"
        finally:
            cat.kill()
    assert command_line(cat.pid) == ""


@ON_LINUX
def test_only_the_main_thread_may_bind_a_process_to_its_own_life() -> None:
    assert ending_with_its_parent() is not None
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(ending_with_its_parent()))
    thread.start()
    thread.join()
    assert found == [None]


def test_no_other_system_is_asked_for_what_only_linux_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert ending_with_its_parent() is None


@ON_LINUX
def test_a_process_whose_parent_is_gone_already_does_not_start() -> None:
    """The parent's id is taken here, and the function runs in a process that is no child of ours."""
    code = (
        "import os, sys\n"
        "from stepalign_launcher.processes import ending_with_its_parent\n"
        "check = ending_with_its_parent()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        check()\n"
        "        print('it runs', flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
