"""Which files are read, how they are opened, and their digest."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stepalign.errors import ProblemFileError, RefusedRow

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
"""Names of the files that are read in a folder. A file that is named itself may be called anything."""

_GZIP = b"\x1f\x8b"
_CHUNK = 2**20
_BUFFER = 2**16
_LISTED = 8


@dataclass(frozen=True)
class ProblemFile:
    path: Path
    shown: str
    """Its name in messages that name the folder already; empty where the file was named itself."""


def problem_files(path: Path) -> list[ProblemFile]:
    """The file, or the problem files that lie in the folder itself, in the order of their names.

    Names that begin with a dot are passed over. Raises ValueError, with what to change, where there is nothing to read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISDIR(mode):
            _check_regular(mode)
            return [ProblemFile(path, "")]
        entries = sorted(path.iterdir())
        found = [entry for entry in entries if _is_named_like_problems(entry.name) and not entry.is_dir()]
        for entry in found:
            _check_regular(entry.stat().st_mode, f"{entry.name} ")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not found:
        names = ", ".join(repr(entry.name) for entry in entries[:_LISTED]) or "nothing"
        more = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
        raise ValueError(
            f"the folder holds no problem file ({', '.join(SUFFIXES)}), but {names}{more}; subfolders are not read"
        )
    return [ProblemFile(entry, ascii(entry.name)[1:-1]) for entry in found]


def _is_named_like_problems(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def _check_regular(mode: int, name: str = "") -> None:
    """A pipe can be read once, and several processes read; a device may never end."""
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name}is no regular file, but a pipe or a device; write the problems to a file")


@contextmanager
def opened(path: Path) -> Generator[io.BufferedReader]:
    """The file's content, unpacked where it is packed by gzip. Raises ValueError where it cannot be read."""
    try:
        with path.open("rb") as plain:
            if plain.peek(2)[:2] != _GZIP:
                yield plain
                return
            packed: io.BufferedReader = io.BufferedReader(gzip.GzipFile(fileobj=plain), _BUFFER)
            with packed as unpacked:
                yield unpacked
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"the gzip file is cut off or damaged ({error}); copy it again") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None


def is_packed(path: Path) -> bool:
    """Whether the file is packed by gzip. Raises ValueError where it cannot be read."""
    try:
        with path.open("rb") as plain:
            return plain.read(2) == _GZIP
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def digest(files: Sequence[ProblemFile], *, is_folder: bool) -> str:
    """The SHA-256 of the only file's content, or of the listing of a folder's. Raises ProblemFileError."""
    listing = [(_content_digest(file), file.path.name) for file in files]
    if not is_folder:
        return listing[0][0]
    lines = "".join(f"{content}  {name}\n" for content, name in listing)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _content_digest(file: ProblemFile) -> str:
    content = hashlib.sha256()
    try:
        with opened(file.path) as stream:
            while chunk := stream.read(_CHUNK):
                content.update(chunk)
    except ValueError as error:
        raise ProblemFileError(str(file.path), [RefusedRow(0, str(error))]) from None
    return content.hexdigest()
