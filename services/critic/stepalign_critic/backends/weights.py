"""The revision of a model folder: a digest of its content, which does not depend on its origin."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stepalign.errors import ConfigError

_CHUNK_BYTES = 2**20
# Configuration, tokenizer and chat template shape an answer as the weights do.
_SHAPING = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def weights_revision(folder: Path) -> str:
    """First 16 hex digits of the SHA-256 over the folder's safetensors, configuration and tokenizer files, by name.

    Raises ConfigError when there are no weights: other weight formats are refused, they can carry code.
    """
    files = sorted({path for pattern in _SHAPING for path in folder.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        problem = "there must be at least one .safetensors file in it" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"critic.path is {folder}; {problem}")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]
