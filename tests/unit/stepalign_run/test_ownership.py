"""Folders of ours and of others: what is marked, what is refused, where an earlier folder goes and how many stay."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.layout import RECORD_KEYS, RunFolder
from stepalign_run.folder.ownership import Kind, NotOursError, OwnFolder
from stepalign_run.folder.replaced import ROOM


def made(parent: Path, name: str = "run", kind: Kind = Kind.RUN, update: str = "{}\n") -> OwnFolder:
    """A folder of ours; the text of its metrics tells it from others."""
    own = OwnFolder(parent, name, kind)
    own.claim()
    RunFolder(own.path).metrics.write_text(update)
    return own


def replaced(parent: Path, name: str = "run") -> list[Path]:
    return sorted(parent.glob(f"{ROOM}/*/{name}"))


SEPARATED = ["a/b", "../a", "/a", "a\\b"]
UNPRINTABLE = ["a\nb", "a\0b", "a\x1b[2J", "a\u202eb", "\ud800"]


@pytest.mark.parametrize("name", ["", ".", "..", ".git", *SEPARATED, *UNPRINTABLE, "n" * 201])
def test_a_name_is_one_component_of_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name is"):
        OwnFolder(tmp_path, name)


@pytest.mark.parametrize("name", ["run", "a.b", "x..", "mein lauf", "größe", "n" * 200])
def test_any_other_name_will_do(tmp_path: Path, name: str) -> None:
    own = made(tmp_path, name)
    assert own.move_aside() == replaced(tmp_path, name)[0] and not own.path.exists()


def test_the_marker_is_the_first_file_and_counts_as_nothing(tmp_path: Path) -> None:
    own = OwnFolder(tmp_path / "runs", "run")
    own.claim()
    own.claim()
    assert [path.name for path in own.path.iterdir()] == [Kind.RUN.value]
    assert RunFolder(own.path).is_empty and own.move_aside() is None


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    own = OwnFolder(tmp_path, "thesis")
    own.path.mkdir()
    (own.path / "chapter.tex").write_text("mine")
    (own.path / Kind.RUN.value).symlink_to(own.path / "chapter.tex")
    for refused in (own.require, own.claim, own.move_aside):
        with pytest.raises(NotOursError, match=r"is left as it is: choose another run\.name"):
            refused()
    assert sorted(path.name for path in own.path.iterdir()) == [Kind.RUN.value, "chapter.tex"]


@pytest.mark.parametrize(
    ("record", "ours"),
    [
        (dict.fromkeys(RECORD_KEYS, 1), True),
        ({"program": "another"}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_record_tells_as_well_if_it_is_the_trainers(tmp_path: Path, record: object, ours: bool) -> None:
    own = OwnFolder(tmp_path, "run")
    own.path.mkdir()
    RunFolder(own.path).record.write_text(json.dumps(record))
    if not ours:
        with pytest.raises(NotOursError):
            own.move_aside()
        return
    aside = own.move_aside()
    # It is known from now on.
    assert aside is not None and (aside / Kind.RUN.value).is_file()


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udcff"])
def test_a_record_that_cannot_be_read_is_not_ours(tmp_path: Path, text: str) -> None:
    own = OwnFolder(tmp_path, "run")
    own.path.mkdir()
    RunFolder(own.path).record.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(NotOursError):
        own.require()


def test_a_run_is_no_comparison_and_a_comparison_no_run(tmp_path: Path) -> None:
    for kind, other in ((Kind.RUN, Kind.COMPARISON), (Kind.COMPARISON, Kind.RUN)):
        made(tmp_path, kind.noun, kind)
        with pytest.raises(NotOursError, match=f"no folder of a {other.noun}"):
            OwnFolder(tmp_path, kind.noun, other).move_aside()


def test_a_file_or_a_dangling_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(NotOursError, match="is no folder"):
            OwnFolder(tmp_path, name).claim()
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_a_link_to_a_run_is_used_but_not_replaced(tmp_path: Path) -> None:
    elsewhere = made(tmp_path / "disk", "run")
    (tmp_path / "run").symlink_to(elsewhere.path)
    own = OwnFolder(tmp_path, "run")
    own.claim()
    with pytest.raises(NotOursError, match="is a link, which is not replaced"):
        own.move_aside()
    assert RunFolder(elsewhere.path).metrics.exists() and not (tmp_path / ROOM).exists()


def test_a_mount_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = made(tmp_path)
    # Mounting takes rights that tests have not everywhere.
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == own.path)
    with pytest.raises(NotOursError, match="is a mount, which is not replaced"):
        own.move_aside()
    assert RunFolder(own.path).metrics.exists()


def test_a_linked_room_is_not_followed(tmp_path: Path) -> None:
    own = made(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / ROOM).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        own.move_aside()
    assert RunFolder(own.path).metrics.exists() and not any((tmp_path / "elsewhere").iterdir())


def test_what_is_needed_is_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = made(tmp_path)
    config = own.path / "run.toml"
    config.write_text("")
    with pytest.raises(ConfigError, match=r"run\.toml is needed and lies in it"):
        own.move_aside([tmp_path / "problems.jsonl", config])
    monkeypatch.chdir(own.path)
    with pytest.raises(ConfigError, match="is needed and lies in it"):
        OwnFolder(Path(".."), "run").move_aside()
    assert own.path.exists()


@pytest.mark.parametrize("place", ["run/.trainer.lock", "run/.grpo-0.lock", "run/grpo-0/.trainer.lock"])
def test_a_folder_in_use_is_not_moved(tmp_path: Path, place: str) -> None:
    own = made(tmp_path, kind=Kind.COMPARISON)
    with lock_file(tmp_path / place, "taken"):
        with pytest.raises(ConfigError, match=r"is in use: the lock .* is held; end that process first"):
            own.move_aside()
        assert own.path.exists()
    assert own.move_aside() is not None


def test_a_folder_keeps_its_name_and_its_files(tmp_path: Path) -> None:
    aside = made(tmp_path, update="first\n").move_aside()
    assert aside is not None and aside.parent.parent == tmp_path / ROOM
    assert aside.name == "run" and RunFolder(aside).metrics.read_text() == "first\n"


def test_nothing_that_was_moved_is_ever_deleted(tmp_path: Path) -> None:
    own = made(tmp_path)
    RunFolder(own.path).logs.mkdir()
    (RunFolder(own.path).logs / "notes.md").write_text("mine")
    for number in range(8):
        assert own.move_aside() is not None
        made(tmp_path, update=f"{number}\n")
    assert len(replaced(tmp_path)) == 8
    assert (RunFolder(replaced(tmp_path)[0]).logs / "notes.md").read_text() == "mine"
