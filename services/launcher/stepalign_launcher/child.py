"""``python -m stepalign_launcher.child COMMAND …``: run a stepalign command that ends when its supervisor does.

The supervisor holds the other end of stdin. When that closes, for whatever reason (a kill -9 included), this process
gets SIGTERM from itself, and is ended for good after ``GRACE_SECONDS``. It works alike on Linux and macOS.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from stepalign.cli import main

GRACE_SECONDS = 10.0


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_watch, daemon=True, name="lifeline").start()
    main()
