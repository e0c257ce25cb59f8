"""The rows of a problem file, one by one: JSON Lines, a JSON array, or Parquet, told apart by the file's content."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

from stepalign.fields import MAX_DEPTH
from stepalign.problems.files import ProblemFile, is_packed, opened
from stepalign.problems.numbers import WrittenNumber

MAX_ROW_BYTES = 4 * 2**20
"""A longer row is refused: it is another kind of file, or one that unpacks without an end."""

MAX_BLANK_BYTES = 64 * 2**20
"""More blanks in one place are refused, since a small packed file unpacks to any number of them."""

PARQUET = b"PAR1"
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_BLANK = b" \t\r\n"
_BLANKS = re.compile(r"[ \t\r\n]*")
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "packed by zstd; unpack it, or pack it by gzip",
    b"BZh": "packed by bzip2; unpack it, or pack it by gzip",
    b"\xfd7zXZ\x00": "packed by xz; unpack it, or pack it by gzip",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"\x1f\x8b": "packed by gzip twice; unpack it once",
    b"version https://git-lfs": "a Git LFS pointer in place of the file; fetch it with `git lfs pull`",
    b"ARROW1": "an Arrow file; write it as Parquet or JSON Lines",
    b"SQLite format 3": "a SQLite database; write its rows as JSON Lines",
    b"<": "a web page or XML; download the file itself, or write its rows as JSON Lines",
}
"""What begins so, as people see it, and what to do."""
_CSV = re.compile(rb"""["']?[A-Za-z_][\w .-]*["']?([,;\t] ?["']?[A-Za-z_][\w .-]*["']?)+""")
"""A line of columns' names."""
_HEAD, _CHUNK = 1024, 2**16
_TOO_LONG = f"the row is longer than {MAX_ROW_BYTES // 2**20} MiB; write one problem a row. The rest was not read"
_TOO_BLANK = f"there are more than {MAX_BLANK_BYTES // 2**20} MiB of blanks in one place; remove them"
_TOO_DEEP = f"nested too deeply; {MAX_DEPTH} levels are the most"


@dataclass(frozen=True)
class Row:
    """A row's value, or the fault for which there is none. ``number`` counts from 1."""

    number: int
    value: Any = None
    fault: str | None = None


class RepeatedKey(dict[str, Any]):
    """An object in which a key stands twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKey(found)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=WrittenNumber, parse_int=WrittenNumber.whole)


def rows_of(file: ProblemFile) -> tuple[str, Iterator[Row]]:
    """What the file's rows are counted as, and the rows.

    Raises ValueError, as the rows' iterator does, where the file cannot be read or is of no known kind.
    """
    with opened(file.path) as stream:
        head = stream.read(_HEAD)
    if head.startswith(_OTHER_ENCODINGS):
        raise ValueError("the file is UTF-16 or UTF-32; save it as UTF-8")
    if head.startswith(PARQUET):
        if is_packed(file.path):
            raise ValueError("a Parquet file that is packed by gzip; unpack it")
        from stepalign.problems.parquet import parquet_rows

        return "row", parquet_rows(file.path)
    beginning = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    other = next((kind for mark, kind in _OTHER_KINDS.items() if beginning.startswith(mark)), None)
    if other is not None:
        raise ValueError(f"the file seems to be {other}")
    if _CSV.fullmatch(beginning.split(b"\n", 1)[0].strip()):
        raise ValueError("the file seems to be CSV; write its rows as JSON Lines or Parquet")
    if beginning.startswith(b"["):
        return "row", _of(file, _array)
    if beginning.split(b"\n", 1)[0].strip() == b"{":
        raise ValueError("an object over several lines; write one object a line, or an array")
    return "line", _of(file, _lines)


def _of(file: ProblemFile, read: Any) -> Iterator[Row]:
    with opened(file.path) as stream:
        yield from read(stream)


def _lines(stream: BufferedReader) -> Iterator[Row]:
    number = blank = 0
    while True:
        passed = _blank_lines(stream)
        line = stream.readline(MAX_ROW_BYTES + 1)
        number += passed.count(b"\n") + 1
        blank += len(passed)
        if blank > MAX_BLANK_BYTES:
            raise ValueError(_TOO_BLANK)
        if not line:
            return
        if len(line) > MAX_ROW_BYTES:
            yield Row(number, fault=_TOO_LONG)
            return
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            blank = 0
            yield _row(number, line)
        else:
            blank += len(line)


def _blank_lines(stream: BufferedReader) -> bytes:
    """The whole blank lines at the beginning of what is buffered, passed over: line by line, they take minutes."""
    seen = stream.peek()
    blank = seen[: len(seen) - len(seen.lstrip(_BLANK))]
    return stream.read(blank.rfind(b"\n") + 1)


def _row(number: int, line: bytes) -> Row:
    try:
        return Row(number, _DECODER.decode(line.decode("utf-8")))
    except UnicodeDecodeError:
        return Row(number, fault="not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Row(number, fault=f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Row(number, fault=_TOO_DEEP)


class _Window:
    """The part of the text that is looked at. It grows at its end while an element does not fit."""

    def __init__(self, stream: BufferedReader) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._ended = False
        self.text = ""
        self.at = 0

    def grow(self) -> bool:
        """Read on. False at the end of the file. Raises ValueError for bytes that are no UTF-8."""
        if self._ended:
            return False
        chunk = self._stream.read(_CHUNK)
        self._ended = not chunk
        try:
            self.text = self.text[self.at :] + self._decode.decode(chunk, final=self._ended)
        except UnicodeDecodeError:
            raise ValueError("not UTF-8; save the file as UTF-8") from None
        self.at = 0
        return not self._ended

    def next_character(self) -> str:
        """The next one that is not blank, which is not passed over; empty at the end.

        Raises ValueError when there are too many blanks before it.
        """
        passed = 0
        while True:
            start = self.at
            blanks = _BLANKS.match(self.text, start)
            self.at = start if blanks is None else blanks.end()
            passed += self.at - start
            if passed > MAX_BLANK_BYTES:
                raise ValueError(_TOO_BLANK)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""


def _array(stream: BufferedReader) -> Iterator[Row]:
    """The elements, one at a time. What is no JSON ends the reading: nobody knows where the next one begins."""
    window = _Window(stream)
    window.next_character()
    window.at += 1
    number = 0
    while (character := window.next_character()) != "]":
        number += 1
        if number > 1:
            if character != ",":
                yield Row(number, fault=f"not JSON: {_found(character)} where a comma or ] belongs")
                return
            window.at += 1
            window.next_character()
        row = _element(number, window)
        yield row
        if row.fault is not None:
            return
    window.at += 1
    if window.next_character():
        raise ValueError("there is more after the array's end; a file holds one array")


def _element(number: int, window: _Window) -> Row:
    while True:
        try:
            value, end = _DECODER.raw_decode(window.text, window.at)
        except RecursionError:
            return Row(number, fault=_TOO_DEEP)
        except json.JSONDecodeError as error:
            if len(window.text) - window.at > MAX_ROW_BYTES:
                return Row(number, fault=_TOO_LONG)
            if not window.grow():
                return Row(number, fault=f"not JSON: {error.msg}. The rest was not read")
        else:
            # A number may go on in what is not read yet.
            length = end - window.at
            if end < len(window.text) or not window.grow():
                window.at += length
                return Row(number, value)


def _found(character: str) -> str:
    return repr(character) if character else "the file's end"
