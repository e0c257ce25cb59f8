"""Which folders are ours. Only such a folder is written to, and only such a one gives way to a new one.

The first file in a folder of ours is its marker, so that even a run that was killed at once is known. Where a copy has
lost that hidden file, the trainer's record (``run.json`` with its keys) tells as well. A folder with anything in it and
neither of the two is somebody else's: it is refused, and stays as it is.

The name of a folder may come from a command line. It is one component of a path, whatever the configuration allows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError
from stepalign_run.folder.files import lock_file, make_folder
from stepalign_run.folder.layout import COMPARISON_MARKER, RECORD_KEYS, RUN_MARKER, RunFolder
from stepalign_run.folder.replaced import move_into_room

_LONGEST_NAME = 200
"""In bytes. File systems take 255, and our own files beside a folder have longer names."""


class NotOursError(ConfigError):
    """A file or folder that this software has not made. It is left as it is."""


class Kind(Enum):
    """Folders of ours, by their markers."""

    RUN = RUN_MARKER
    """A run's, or a probe's."""
    COMPARISON = COMPARISON_MARKER
    """Several runs, a folder each, and the comparison of them."""

    @property
    def noun(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class OwnFolder:
    """The folder ``parent/name`` of ours, there already or not. Raises ConfigError for a name that is none."""

    parent: Path
    name: str
    kind: Kind = Kind.RUN

    def __post_init__(self) -> None:
        fits = self.name.isprintable() and 0 < len(self.name.encode()) <= _LONGEST_NAME
        if not fits or self.name.startswith(".") or "/" in self.name or "\\" in self.name:
            raise ConfigError(
                f"run.name is {self.name!r}, which names no folder of its own in {self.parent}: choose a name without "
                f"slashes, control characters and a dot at its start, of {_LONGEST_NAME} bytes at most"
            )

    @property
    def path(self) -> Path:
        return self.parent / self.name

    def require_place(self) -> None:
        """Raises ConfigError where no folder can be: below a file, or with a name that is too long."""
        try:
            self.path.lstat()
        except (FileNotFoundError, PermissionError):
            return
        except OSError as error:
            raise ConfigError(f"{self.path} can be no folder ({error.strerror}): {self._remedy}") from error

    def require(self) -> None:
        """Raises NotOursError unless the folder is missing, empty or ours; ConfigError as :meth:`require_place`."""
        self.require_place()
        path = self.path
        if os.path.lexists(path) and not path.is_dir():
            raise NotOursError(f"{path} is no folder, and is left alone: {self._remedy}")
        # In this order: what is not empty any more has its marker.
        if RunFolder(path).is_empty or self._is_ours():
            return
        raise NotOursError(
            f"{path} is no folder of a {self.kind.noun} that stepalign has made, and is left as it is: {self._remedy}"
        )

    def claim(self) -> None:
        """Make the folder if it is missing, and mark it. Several processes may do so at once.

        Raises NotOursError as :meth:`require`, ConfigError when it cannot be made.
        """
        self.require()
        make_folder(self.path)
        with suppress(FileExistsError), (self.path / self.kind.value).open("x", encoding="utf-8") as marker:
            marker.write(
                f"stepalign keeps a {self.kind.noun} here. This file tells it that the folder is its own, which "
                "--overwrite may move aside.\n"
            )

    def move_aside(self, needed: Iterable[Path] = ()) -> Path | None:
        """Move an earlier folder out of the way, and return its new place; None where there is nothing in it.

        ``needed`` are files that are still to be read. Raises NotOursError as :meth:`require`, and for a link or a
        mount; ConfigError while a process works in the folder, and when it cannot be moved. It then stays as it is.
        """
        self.require()
        if RunFolder(self.path).is_empty:
            return None
        self._require_movable(needed)
        with _undisturbed(self.path):
            # A copy that has lost its marker gets one, by which it is known later on.
            self.claim()
            return move_into_room(self.path)

    def _require_movable(self, needed: Iterable[Path]) -> None:
        path, real = self.path, self.path.resolve()
        if path.is_symlink():
            raise NotOursError(f"{path} is a link, which is not replaced: {self._remedy}")
        if os.path.ismount(path):
            raise NotOursError(f"{path} is a mount, which is not replaced: empty it, or {self._remedy}")
        inside = [other for other in (Path.cwd(), *needed) if other.resolve().is_relative_to(real)]
        if inside:
            raise ConfigError(f"{path} cannot be replaced, {inside[0]} is needed and lies in it: {self._remedy}")

    def _is_ours(self) -> bool:
        if _is_marked(self.path, self.kind):
            return True
        unmarked = not any(_is_marked(self.path, kind) for kind in Kind)
        return unmarked and self.kind is Kind.RUN and _is_record(RunFolder(self.path).record)

    @property
    def _remedy(self) -> str:
        if self.kind is Kind.COMPARISON:
            return "move it away yourself"
        return "choose another run.name or run.dir, or move it away yourself"


def _is_marked(path: Path, kind: Kind) -> bool:
    marker = path / kind.value
    return marker.is_file() and not marker.is_symlink()


def _is_record(path: Path) -> bool:
    """Whether the file is a trainer's, and not another program's of the same name."""
    try:
        record: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() >= RECORD_KEYS


@contextmanager
def _undisturbed(path: Path) -> Generator[None]:
    """Hold every lock in the folder and in the runs in it. Raises ConfigError when a process has one of them."""
    with ExitStack() as held:
        for lock in sorted([*path.glob(".*.lock"), *path.glob("*/.*.lock")]):
            held.enter_context(lock_file(lock, f"{path} is in use: the lock {lock} is held; end that process first"))
        yield
