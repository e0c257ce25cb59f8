"""Rows of a file that is one JSON object over several lines, with a list of rows under each key.

That is the form of Mr-Ben's files, which no other reader takes. Rows have no lines there, and are counted in their
order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from stepalign.problems.files import ProblemFile, opened
from stepalign.problems.readers import Row

MAX_BYTES = 256 * 2**20
"""The file is read as a whole."""

_HEAD = 1024


def is_grouped(file: ProblemFile) -> bool:
    """Whether the file begins like such an object. Raises ValueError where it cannot be read."""
    with opened(file.path) as stream:
        head = stream.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.split(b"\n", 1)[0].strip() == b"{"


def grouped_rows(file: ProblemFile) -> Iterator[Row]:
    """Raises ValueError where the file is too long, no JSON, or an object that holds something else."""
    with opened(file.path) as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"one object of more than {MAX_BYTES // 2**20} MiB; write one row a line")
    try:
        found: Any = json.loads(content)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8; save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    groups = list(cast("dict[str, Any]", found).values())
    if not all(isinstance(group, list) for group in groups):
        raise ValueError("an object over several lines; write one object a line, or an array")
    rows = [row for group in groups for row in cast("list[Any]", group)]
    for number, value in enumerate(rows, start=1):
        yield Row(number, value)
