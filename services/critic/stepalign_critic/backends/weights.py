"""The revision of a model folder's weights: what they are, not where they came from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stepalign.errors import ConfigError

_CHUNK_BYTES = 2**20


def weights_revision(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the folder's safetensors files, in the order of their names.

    Raises ConfigError when there are none: other weight formats are refused, they can carry code.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"critic.path is {folder}; there must be at least one .safetensors file in that folder")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]
