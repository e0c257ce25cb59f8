from __future__ import annotations

from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_run.folder.files import lock_file, replace_text


def test_a_replaced_file_holds_the_new_text_alone(tmp_path: Path) -> None:
    for text in ("a long first text\n", "né\n"):
        replace_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with lock_file(path, "taken"), pytest.raises(ConfigError, match="taken"):
        lock_file(path, "taken")
    lock_file(path, "taken").close()
