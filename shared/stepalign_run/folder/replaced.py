"""Where folders go that gave way to new ones: ``.replaced/<time>/<name>`` beside their place.

A folder keeps its name, by which its server knows the run: an audit of it works there, and it is put back by moving it.
Nothing is ever deleted from there: whether a file in a run's folder is missed only its user can say.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from stepalign.errors import ConfigError

ROOM = ".replaced"


def move_into_room(path: Path) -> Path:
    """Move the folder, which is ours. Returns its new place. Raises ConfigError when it cannot be moved."""
    room = path.parent / ROOM
    if room.is_symlink():
        raise ConfigError(f"{room} is a link; {path} stays as it is: remove the link, or move the folder away yourself")
    try:
        room.mkdir(exist_ok=True)
        shelf = _new_shelf(room)
        try:
            os.rename(path, shelf / path.name)
        except OSError:
            shelf.rmdir()
            raise
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be moved to {room} ({error.strerror}) and stays as it is: move it away yourself, or choose "
            "another name"
        ) from error
    return shelf / path.name


def _new_shelf(room: Path) -> Path:
    """A new folder, named by the time so that names sort by it."""
    while True:
        shelf = room / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        with suppress(FileExistsError):
            shelf.mkdir()
            return shelf
