"""Where folders go that gave way to new ones: ``.replaced/<time>/<name>`` beside their place.

A folder keeps its name, by which its server knows the run: an audit of it works there, and it is put back by moving it.
The newest :data:`KEPT` of each name stay, and as many that came to no figure: attempts that failed at once push out no
run. Older ones are deleted, so that a command that is repeated every day does not fill the disk; but not one that is in
use, or that has a file in it that stepalign does not write.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from stepalign.errors import ConfigError
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.layout import COMPARISON_MARKER, RUN_MARKER, RunFolder

ROOM = ".replaced"
KEPT = 3


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
    _clear(room, path.name)
    return shelf / path.name


def _new_shelf(room: Path) -> Path:
    """A new folder, named by the time so that names sort by it."""
    while True:
        shelf = room / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        with suppress(FileExistsError):
            shelf.mkdir()
            return shelf


def _clear(room: Path, name: str) -> None:
    """Delete all folders of this name but the newest ones with figures and the newest ones without."""
    shelves = sorted(shelf for shelf in room.iterdir() if (shelf / name).is_dir())
    for figures in (True, False):
        older = [shelf for shelf in shelves if _has_figures(shelf / name) is figures][:-KEPT]
        for shelf in older:
            if _is_disposable(shelf / name):
                _delete(shelf, name)


def _has_figures(folder: Path) -> bool:
    """Whether an update was made in it, or a probe."""
    names = (RunFolder(folder).metrics.name, RunFolder(folder).probe.name)
    return any(any(folder.glob(pattern)) for name in names for pattern in (name, f"*/{name}"))


def _delete(shelf: Path, name: str) -> None:
    shutil.rmtree(shelf / name)
    # An audit of the folder has left its lock; anything else beside it stays.
    RunFolder(shelf / name).lock.unlink(missing_ok=True)
    with suppress(OSError):
        shelf.rmdir()


def _is_disposable(folder: Path) -> bool:
    """Whether nobody would miss it: all of it is ours, no process holds it, and no other disk is mounted in it."""
    mounted = any(os.path.ismount(parent) for parent, _, _ in os.walk(folder))
    return not mounted and holds_nothing_else(folder) and _is_free(folder)


def _is_free(folder: Path) -> bool:
    locks = [RunFolder(folder).lock, *folder.glob(".*.lock"), *folder.glob("*/.*.lock")]
    try:
        for lock in locks:
            if lock.exists():
                lock_file(lock, "in use").close()
    except ConfigError:
        return False
    return True


def holds_nothing_else(folder: Path) -> bool:
    """Whether all that lies in the folder, which has a marker, has a name that a run or a comparison gives."""
    if folder.is_symlink():
        return False
    if (folder / COMPARISON_MARKER).is_file():
        return all(_is_part_of_comparison(child) for child in folder.iterdir())
    names = {path.name for path in RunFolder(folder).files}
    return (folder / RUN_MARKER).is_file() and all(
        child.name in names or _is_own_aid(child) for child in folder.iterdir()
    )


def _is_own_aid(child: Path) -> bool:
    """Whether it is a lock, or a file that a kill has kept from its place (:func:`replace_text`)."""
    return child.name.startswith(".") and child.suffix in (".lock", ".tmp")


def _is_part_of_comparison(child: Path) -> bool:
    """Whether it belongs to a comparison: a run of it, one that gave way to that, or a file of all of them."""
    whole = RunFolder(child.parent)
    if child.name in (COMPARISON_MARKER, whole.comparison.name, whole.page.name):
        return True
    if child.name == ROOM:
        return all(holds_nothing_else(run) for run in child.glob("*/*"))
    return _is_own_aid(child) or holds_nothing_else(child)
