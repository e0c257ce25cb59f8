"""The file that tells other processes where the critic listens."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from stepalign.errors import ConfigError
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.outputs import require_own_file
from stepalign_run.folder.ownership import NotOursError


class AddressFile:
    """Holds the critic's address while it listens. Without a ``path`` nothing is written.

    Raises ConfigError when no file can be written there, NotOursError when one is there that holds no address.
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
        self._require_own(path)

    def write(self, url: str) -> None:
        """Write the address. A reader sees all of it or no file. Raises NotOursError as at the start."""
        if self._path is not None:
            self._require_own(self._path)
            replace_text(self._path, url)

    def remove(self) -> None:
        """Remove the file, where there is one with an address."""
        if self._path is not None:
            with suppress(NotOursError):
                self._require_own(self._path)
                self._path.unlink(missing_ok=True)

    @staticmethod
    def _require_own(path: Path) -> None:
        """What a killed predecessor has left holds an address."""
        require_own_file(path, _is_address, "set critic.address_file to another file, or remove it")


def _is_address(text: str) -> bool:
    return text.startswith("http://") and len(text.split()) == 1
