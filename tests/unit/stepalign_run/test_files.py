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


def test_files_beside_it_with_names_like_those_of_aids_keep_their_text(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_text("mine")
    (tmp_path / "lock").write_text("mine")
    replace_text(tmp_path / "file", "text")
    lock_file(tmp_path / "lock", "taken").close()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        ".file.tmp": "mine",
        "lock": "mine",
        "file": "text",
    }


def test_a_file_that_cannot_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_lock_is_held_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    with lock_file(path, "taken"), pytest.raises(ConfigError, match="taken"):
        lock_file(path, "taken")
    lock_file(path, "taken").close()
