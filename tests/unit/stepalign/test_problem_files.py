"""Problem files as people have them: encodings, arrays, gzip, Parquet, folders; and any bytes at all."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from stepalign.errors import ProblemFileError, RefusedRow
from stepalign.problems import load_problems, problems_sha256
from stepalign.problems.readers import MAX_BLANK_BYTES, MAX_ROW_BYTES
from stepalign.types import Problem

ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "1 + 1? ½\u2028", "answer": "2", "reference_solution": None, "metadata": {"level": 5}},
    {"id": "b", "question": "2 + 2?", "answer": "4", "reference_solution": "2 + 2 = 4", "metadata": {"level": 1}},
]
PROBLEMS = [Problem.model_validate({key: value for key, value in row.items() if value is not None}) for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def as_parquet(folder: Path, rows: list[dict[str, Any]], name: str = "problems.parquet") -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def refused(path: Path) -> list[RefusedRow]:
    with pytest.raises(ProblemFileError) as error:
        load_problems(path)
    return error.value.rows


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        json.dumps(ROWS[0], ensure_ascii=False).encode() + b"\n\n" + json.dumps(ROWS[1]).encode(),
        codecs.BOM_UTF8 + LINES.replace("\n", "\r\n").encode(),
        json.dumps(ROWS).encode(),
        codecs.BOM_UTF8 + b"\r\n" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
        gzip.compress(LINES.encode(), mtime=0),
        gzip.compress(json.dumps(ROWS).encode(), mtime=0),
    ],
    ids=["lines", "blank line", "BOM and CRLF", "array", "indented array with BOM", "gzip", "array in gzip"],
)
@pytest.mark.parametrize("name", ["problems.jsonl", "problems.json", "problems.jsonl.gz", "problems"])
def test_the_content_says_what_a_file_is(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert load_problems(tmp_path / name) == PROBLEMS


def test_parquet_is_read_like_lines(tmp_path: Path) -> None:
    assert load_problems(as_parquet(tmp_path, ROWS)) == PROBLEMS
    answers = load_problems(
        as_parquet(tmp_path, [{"question": "q", "answer": 1e-05}, {"question": "r", "answer": 18.0}])
    )
    assert [problem.answer for problem in answers] == ["0.00001", "18.0"]


def test_a_large_array_is_read_piece_by_piece(tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "question": "é" * (i % 700 + 1), "answer": i} for i in range(900)]
    (tmp_path / "p.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [problem.id for problem in load_problems(tmp_path / "p.json")] == [f"r{i}" for i in range(900)]


GOOD = b'{"question": "q", "answer": "1"}'
DAMAGED = None


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (b"[]", RefusedRow(0, "the file holds no problem")),
        (b"\xff\xfe[\x00", RefusedRow(0, "the file is UTF-16 or UTF-32; save it as UTF-8")),
        (
            b'{\n "question": "q"\n}',
            RefusedRow(0, "an object over several lines; write one object a line, or an array"),
        ),
        (b'{"question": "\xe9", "answer": "1"}', RefusedRow(1, "not UTF-8; save the file as UTF-8")),
        (b"[3]", RefusedRow(1, "not a JSON object", "row")),
        (b"[" + GOOD + b" {}]", RefusedRow(2, "not JSON: '{' where a comma or ] belongs", "row")),
        (b"[" + GOOD, RefusedRow(2, "not JSON: the file's end where a comma or ] belongs", "row")),
        (b"[" + GOOD + b"] x", RefusedRow(0, "there is more after the array's end; a file holds one array")),
        (b"[" * 99999, RefusedRow(1, "nested too deeply; 32 levels are the most", "row")),
        (gzip.compress(LINES.encode(), mtime=0)[:-9], DAMAGED),
        (gzip.compress(LINES.encode(), mtime=0)[:20] + b"\0" * 50, DAMAGED),
        (
            gzip.compress(b"PAR1" + b"0" * 99, mtime=0),
            RefusedRow(0, "a Parquet file that is packed by gzip; unpack it"),
        ),
        (b"PAR1" + b"0" * 99, DAMAGED),
    ],
)
def test_a_file_that_is_none_is_refused_with_a_place(tmp_path: Path, content: bytes, row: RefusedRow | None) -> None:
    (tmp_path / "p").write_bytes(content)
    found = refused(tmp_path / "p")
    if row is not DAMAGED:
        assert found == [row]
    else:
        assert found[-1].number == 0
        assert found[-1].reason.endswith(("copy it again", "write it again"))


def test_what_unpacks_without_an_end_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    for opening in (b"", b"["):
        with gzip.open(bomb, "wb", compresslevel=1) as file:
            file.write(opening + b'"' + bytes(MAX_ROW_BYTES * 8))
        (row,) = refused(bomb)
        assert row.number == 1 and row.reason.startswith("the row is longer than 4 MiB")


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (b"question,answer\nwhat,1\n", "CSV"),
        (codecs.BOM_UTF8 + b'"id";"the question";"answer"\r\n', "CSV"),
        (b"question\tanswer\nwhat\t1\n", "CSV"),
        (b"\n<!DOCTYPE html><html></html>", "a web page"),
        (b"PK\x03\x04abc", "a zip archive; unpack it"),
        (b"\x28\xb5\x2f\xfdabc", "packed by zstd; unpack it"),
        (bz2.compress(LINES.encode()), "packed by bzip2; unpack it"),
        (lzma.compress(LINES.encode()), "packed by xz; unpack it"),
        (gzip.compress(gzip.compress(LINES.encode()), mtime=0), "packed by gzip twice; unpack it once"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_named_with_what_to_do(tmp_path: Path, content: bytes, seems: str) -> None:
    (tmp_path / "p").write_bytes(content)
    (row,) = refused(tmp_path / "p")
    assert row.number == 0 and row.reason.startswith(f"the file seems to be {seems}")


@pytest.mark.parametrize("opening", [b"", b"[", LINES.encode(), b"[" + json.dumps(ROWS[0]).encode()])
@pytest.mark.parametrize("blank", [b"\n", b" \t\r\n"])
def test_blanks_without_an_end_are_not_read(tmp_path: Path, opening: bytes, blank: bytes) -> None:
    bomb = tmp_path / "bomb.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        file.write(opening + blank * (MAX_BLANK_BYTES // len(blank) + 2**20))
    rows = refused(bomb)
    assert rows == [RefusedRow(0, "there are more than 64 MiB of blanks in one place; remove them")]


def test_lines_are_counted_behind_many_blank_ones(tmp_path: Path) -> None:
    blanks = ["\n" * 200_000, " \r\n" * 70_000, "  \n\x0b\n"]
    content = "".join(blank + line + "\n" for blank, line in zip(blanks, [*LINES.splitlines(), "broken"], strict=True))
    (tmp_path / "p").write_text(content, newline="")
    (row,) = refused(tmp_path / "p")
    assert row.number == content[: content.index("broken")].count("\n") + 1
    (tmp_path / "p").write_text(content.replace("broken", ""), newline="")
    assert load_problems(tmp_path / "p") == PROBLEMS


def test_missing_columns_of_parquet_are_named_with_those_there_are(tmp_path: Path) -> None:
    rows = refused(as_parquet(tmp_path, [{"problem": "q", "answer": "1"}, {"problem": "r", "answer": "2"}]))
    assert [(row.number, row.unit) for row in rows] == [(1, "row"), (2, "row")]
    assert rows[0].reason.startswith("question: missing; columns found: 'problem', 'answer'")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path, ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(path) == [RefusedRow(0, "a Parquet file, which needs pyarrow: pip install 'stepalign[data]'")]


@pytest.mark.parametrize("special", ["fifo", "device", "gone", "loop"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, special: str) -> None:
    path = tmp_path / "p.jsonl"
    if special == "fifo":
        os.mkfifo(path)
    elif special == "loop":
        path.symlink_to(path)
    elif special == "device":
        path = Path("/dev/zero")
    (row,) = refused(path)
    assert "no regular file" in row.reason or row.reason.startswith("cannot be read: ")
    with pytest.raises(ProblemFileError):
        problems_sha256(path)


# Folders.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files in three formats, and others that are none."""
    path = tmp_path / "problems"
    (path / "sub").mkdir(parents=True)
    (path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    (path / "A.JSON").write_text(json.dumps([ROWS[0]]))
    as_parquet(path, [{"id": "c", "question": "3 + 3?", "answer": 6}], "c.parquet")
    for other in ("README.md", ".hidden.jsonl", "sub/d.jsonl"):
        (path / other).write_text("no problem")
    return path


def test_a_folder_is_its_files_in_the_order_of_their_names(folder: Path) -> None:
    assert [problem.id for problem in load_problems(folder)] == ["a", "b", "c"]


def test_an_id_in_two_files_is_named_with_both(folder: Path) -> None:
    (folder / "z.jsonl").write_text(
        '\n{"id": "b", "question": "other", "answer": "1"}\n{"question": "3", "answer": 1}\n{}'
    )
    with pytest.raises(ProblemFileError) as error:
        load_problems(folder)
    text = str(error.value)
    assert "\n  z.jsonl, line 2: id 'b' is that of b.jsonl.gz, line 1; ids must be unique\n" in text
    assert "\n  z.jsonl, line 4: question: missing; columns found: none; answer: missing" in text


def test_a_folder_without_problem_files_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "train.csv").touch()
    (tmp_path / "data").mkdir()
    (row,) = refused(tmp_path)
    assert "holds no problem file (.jsonl, " in row.reason
    assert "but 'data', 'train.csv'; subfolders are not read" in row.reason


def test_an_empty_file_of_a_folder_is_named(folder: Path) -> None:
    (folder / "b2.jsonl").touch()
    assert refused(folder) == [RefusedRow(0, "the file holds no problem", file="b2.jsonl")]


def test_a_digest_is_of_the_content_unpacked(tmp_path: Path, folder: Path) -> None:
    plain, packed = tmp_path / "p.jsonl", tmp_path / "q.gz"
    plain.write_text(LINES)
    packed.write_bytes(gzip.compress(LINES.encode(), mtime=0))
    assert problems_sha256(plain) == problems_sha256(packed) == hashlib.sha256(LINES.encode()).hexdigest()
    listing = "".join(f"{problems_sha256(folder / name)}  {name}\n" for name in ("A.JSON", "b.jsonl.gz", "c.parquet"))
    assert problems_sha256(folder) == hashlib.sha256(listing.encode()).hexdigest()
    before = problems_sha256(folder)
    (folder / "README.md").write_text("other")
    assert problems_sha256(folder) == before
    (folder / "A.JSON").rename(folder / "a.json")
    assert problems_sha256(folder) != before


# Any bytes.

texts = st.text(st.characters(exclude_categories=()), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["#### 4", "x #### 1,000"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
rows = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("id", "reference_solution", "source", "metadata", "other"), json_values)
    | dict.fromkeys(("question", "answer"), texts | json_values),
)
files = st.one_of(
    st.binary(max_size=200),
    st.lists(rows | json_values, max_size=4).map(lambda found: "\n".join(map(json.dumps, found)).encode()),
    st.lists(rows | json_values, max_size=4).map(lambda found: json.dumps(found).encode()),
)


@st.composite
def damaged(draw: Callable[..., Any]) -> bytes:
    """A file with some bytes replaced, cut off or packed."""
    content = bytearray(draw(files))
    for place in draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)):
        content[place : place + 1] = draw(st.binary(max_size=2))
    packed = draw(st.sampled_from(["no", "whole", "cut off"]))
    if packed == "no":
        return bytes(content)
    return gzip.compress(bytes(content), mtime=0)[: None if packed == "whole" else draw(st.integers(1, 30))]


def problems_or_places(path: Path, content: bytes) -> None:
    """Problems that are as the wire wants them, or an error of ours that names at least one place."""
    path.write_bytes(content)
    try:
        found = load_problems(path)
    except ProblemFileError as error:
        assert error.rows and all(row.number >= 0 and row.reason for row in error.rows)
        assert str(error).startswith(f"{path} was refused")
    else:
        assert found and len({problem.id for problem in found}) == len(found)
        assert [Problem.model_validate_json(problem.model_dump_json()) for problem in found] == found
    assert len(problems_sha256_or_refusal(path)) == 64


def problems_sha256_or_refusal(path: Path) -> str:
    try:
        return problems_sha256(path)
    except ProblemFileError:
        return "0" * 64


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=files | damaged())
@example(content=b'{"question": "q", "answer": "1", "source": "\\ud800"}')
@example(content=b'{"question": "q", "answer": "1", "metadata": {"a": NaN}}')
@example(content=b'[{"question": "q", "answer": 1}, 2')
@example(content=b"[1")
@example(content=b"\xef\xbb\xbf")
def test_any_bytes_are_problems_or_an_error_with_a_place(tmp_path: Path, content: bytes) -> None:
    problems_or_places(tmp_path / "p", content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_parquet_is_problems_or_an_error_with_a_place(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "p.parquet"
    content = bytearray(as_parquet(tmp_path, ROWS).read_bytes())
    for place in data.draw(st.lists(st.integers(4, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(4, len(content)))
    problems_or_places(path, bytes(content)[:cut])
