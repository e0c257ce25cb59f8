"""Files and folders that a command writes where its user says. What is there already, and is not ours, stays.

A result that took long or that nobody could tell from a user's own file (problems) needs a new name. A file that says
itself that it is ours (a report, an address) is replaced by the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stepalign_run.folder.files import make_folder, replace_text
from stepalign_run.folder.ownership import NotOursError


def prepare_new_file(path: Path) -> None:
    """Make the folder of a file, before the work that fills it.

    Raises NotOursError when anything but an empty file is there, and ConfigError when the folder cannot be made.
    """
    if os.path.lexists(path) and not (_is_plain_file(path) and path.stat().st_size == 0):
        raise NotOursError(f"{path} is there already, and is left as it is: give the name of a new file")
    make_folder(path.parent)


def write_new_file(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises as :func:`prepare_new_file`."""
    prepare_new_file(path)
    replace_text(path, text)


def prepare_new_folder(path: Path) -> None:
    """Make a folder, before the work that fills it.

    Raises NotOursError when anything but an empty folder is there, and ConfigError when it cannot be made.
    """
    if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise NotOursError(f"{path} is not empty, and is left as it is: give a new folder")
    make_folder(path)


def require_own_file(path: Path, is_ours: Callable[[str], bool], remedy: str) -> None:
    """Raises NotOursError, which ends with ``remedy``, when a file is there that is not ours by its text."""
    if not os.path.lexists(path):
        return
    if not _is_plain_file(path) or not ((text := _text(path)) == "" or is_ours(text)):
        raise NotOursError(f"{path} is there already and was not made by stepalign; it is left as it is: {remedy}")


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _text(path: Path) -> str:
    """The text of a file, with a sign in the place of all that is no UTF-8."""
    return path.read_text(encoding="utf-8", errors="replace")
