"""Secrets from files: what counts as one, and messages that name the key and keep the secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign.secret_files import read_secret, read_secrets

KEY = "critic.api_keys_file"
SECRET = "sk-never-shown"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_comments_and_blank_lines_are_no_secrets(file: Path) -> None:
    file.write_text("# of the trainer\n\nsk-1\n   \n\t# of the viewer\nsk-2\n#sk-3\n")
    assert read_secrets(KEY, file) == ["sk-1", "sk-2"]


@pytest.mark.parametrize("content", ["sk-1", "sk-1\n", "\nsk-1\r\n", "  sk-1\t\n", "# old: sk-0\nsk-1\n\n"])
def test_a_secret_is_its_line_without_the_margins(file: Path, content: str) -> None:
    file.write_bytes(content.encode())
    assert read_secret(KEY, file) == "sk-1"


def test_every_printable_ascii_character_may_be_in_a_secret(file: Path) -> None:
    secret = "".join(map(chr, range(0x21, 0x7F))).replace("#", "") + "#"
    file.write_text(secret + "\n")
    assert read_secrets(KEY, file) == [secret]


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing yet\n", "   \n"])
def test_a_file_without_a_secret_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    for read in (read_secrets, read_secret):
        with pytest.raises(ConfigError, match=r"critic\.api_keys_file: there is nothing in .*keys"):
            read(KEY, file)


@pytest.mark.parametrize(
    "line",
    [f"{SECRET}-é", f"{SECRET} and more", f"{SECRET}\tmore", f"\ufeff{SECRET}", f"{SECRET}\x00", f"{SECRET}\x7f"],
    ids=["not ASCII", "space", "tab", "byte order mark", "null", "delete"],
)
def test_what_no_header_can_carry_is_refused_wherever_it_stands(file: Path, line: str) -> None:
    for content in (line, f"sk-good\n{line}\n", f"{line}\nsk-good\n"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"^critic\.api_keys_file: .*printable ASCII without spaces") as caught:
            read_secrets(KEY, file)
        assert SECRET not in str(caught.value) and str(file) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(file: Path) -> None:
    file.write_bytes(SECRET.encode() + b"\xff\xfe\n")
    with pytest.raises(ConfigError, match=r"^critic\.api_keys_file: .*keys cannot be read: .*utf-8") as caught:
        read_secrets(KEY, file)
    assert SECRET not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"^critic\.api_keys_file: .*keys cannot be read: .*No such file"):
        read_secrets(KEY, file)
    file.mkdir()
    with pytest.raises(ConfigError, match=r"^critic\.api_keys_file: .*keys cannot be read: .*Is a directory"):
        read_secret(KEY, file)


def test_one_secret_is_not_two(file: Path) -> None:
    file.write_text(f"{SECRET}-1\n# the next one\n{SECRET}-2\n")
    with pytest.raises(ConfigError, match=r"^critic\.api_keys_file: .*keys holds 2 lines; it must hold one") as caught:
        read_secret(KEY, file)
    assert SECRET not in str(caught.value)
