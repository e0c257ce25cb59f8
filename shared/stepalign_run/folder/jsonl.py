"""JSON Lines and JSON files that another process may be writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a JSON Lines file; none when there is no file.

    A last line without its line break is still being written, or was cut short by a kill: it is left out.
    """
    if not path.exists():
        return []
    # Not splitlines: a row may hold other characters that end lines.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one when there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def end_at_a_whole_row(path: Path) -> None:
    """Remove a last row that a kill has cut short, so that the next one starts on a line of its own."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
