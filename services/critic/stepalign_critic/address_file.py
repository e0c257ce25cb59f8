"""The file that tells other processes where the critic listens."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from stepalign.errors import ConfigError
from stepalign_run.folder.files import replace_text


class AddressFile:
    """Holds the critic's address while it listens. Without a ``path`` nothing is written.

    Raises ConfigError when no file can be written there.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is None:
            return
        try:
            with TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}; set critic.address_file to a file in a folder that can be "
                "written"
            ) from None

    def write(self, url: str) -> None:
        """Write the address. A reader sees all of it or no file."""
        if self._path is not None:
            replace_text(self._path, url)

    def remove(self) -> None:
        """Remove the file, where there is one."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
