"""Files that other processes use at the same time."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from typing import IO

from stepalign.errors import ConfigError


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 so that a reader sees all of it or the one before, after a power cut too."""
    # A new file: one of that name may be somebody else's.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with scratch.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def make_folder(path: Path) -> None:
    """Make a folder that a user has named, if it is missing. Raises ConfigError when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        # Has a line of its own at the command line, with the user who may not.
        raise
    except OSError as error:
        raise ConfigError(f"the folder {path} cannot be made ({error.strerror}): choose another place") from error


def lock_file(path: Path, in_use: str) -> IO[str]:
    """A lock that is held until the file or this process ends, however it ends.

    Raises ConfigError with the text ``in_use`` when another process holds it, and when its folder cannot be made.
    """
    make_folder(path.parent)
    # Not "w": a file of that name may be somebody else's, and keeps its text.
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(in_use) from None
    return lock
