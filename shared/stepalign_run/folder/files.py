"""Files that other processes use at the same time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from stepalign.errors import ConfigError


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 so that a reader sees all of it or the one before, after a power cut too."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def lock_file(path: Path, in_use: str) -> IO[str]:
    """A lock that is held until the file or this process ends, however it ends.

    Raises ConfigError with the text ``in_use`` when another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(in_use) from None
    return lock
