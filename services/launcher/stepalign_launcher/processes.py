"""Facts about other processes, and a request to one's own, that the standard library has no call for."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def ending_with_its_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` after which Linux sends the new process SIGTERM once this one is gone, by kill -9 too.

    None elsewhere, and in any thread but the main one: the kernel watches the thread that started the process, which
    may end long before its own process does.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def watch_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It was gone before the kernel was asked.
            os._exit(1)

    return watch_parent


def command_line(pid: int) -> str:
    """Program and arguments, joined by blanks; empty when there is no such process."""
    if sys.platform == "linux":
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return words.replace(b"\0", b" ").decode(errors="replace").strip()
    shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip()
