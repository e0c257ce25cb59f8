"""Secrets come from files: a command line is seen by every user of a machine, an environment by every child process."""

from __future__ import annotations

from pathlib import Path

from stepalign.errors import ConfigError


def read_secrets(key: str, path: Path) -> list[str]:
    """The lines of a file that are neither empty nor comments (``#``).

    ``key`` is the configuration's name of the file, for the message. Raises ConfigError when it cannot be read, holds
    none, or holds one that is not printable ASCII without spaces, which no header can carry.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines()]
    secrets = [line for line in lines if line and not line.startswith("#")]
    if not secrets:
        raise ConfigError(f"{key}: there is nothing in {path}")
    if not all(secret.isascii() and secret.isprintable() and " " not in secret for secret in secrets):
        raise ConfigError(f"{key}: {path} holds something else than printable ASCII without spaces, one secret a line")
    return secrets


def read_secret(key: str, path: Path) -> str:
    """The only secret of a file. Raises ConfigError as :func:`read_secrets`, and when there is more than one."""
    secrets = read_secrets(key, path)
    if len(secrets) > 1:
        raise ConfigError(f"{key}: {path} holds {len(secrets)} lines; it must hold one")
    return secrets[0]
