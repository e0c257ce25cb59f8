"""Addresses of Redis servers, with the password in a file of its own."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from stepalign.errors import ConfigError
from stepalign.secret_files import read_secret


def with_password(url: str, url_names: str, password_key: str, password_file: Path) -> str:
    """``url`` with the password of the file in it.

    ``url_names`` and ``password_key`` are the configuration's names of both, for messages, which never hold a password.
    Raises ConfigError when the file cannot be read, when ``url`` is no address, and when it has another password.
    """
    password = read_secret(password_key, password_file)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{url_names} is no Redis address: {error}") from None
    if parts.password and unquote(parts.password) != password:
        raise ConfigError(f"the Redis address has another password than {password_key}; keep one of the two")
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{host}"))
