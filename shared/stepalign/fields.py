"""The fields of problems and rollouts that travel: what each may hold, said once.

Configuration, problem files and wire types use these annotated types, so that what one of them accepts every other can
carry. A value is refused with a sentence that says what to change.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Annotated, Any, cast

from pydantic import AfterValidator, Field

MAX_DEPTH = 32
"""Levels of a JSON value. The parsers and writers on the way stop at some hundred."""

MAX_INTEGER = 2**63 - 1
"""The largest whole number in a JSON value: what 64 bits hold."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """Raises ValueError for half of a surrogate pair, which JSON can escape and UTF-8 cannot hold."""
    lone = _SURROGATE.search(text)
    if lone is not None:
        raise ValueError(f"there is half of a surrogate pair at code point {lone.start()}; send whole characters")
    return text


_FILLERS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""Letters, marks and signs that show nothing."""


def _shows(character: str) -> bool:
    """Whether a reader sees anything: no blank, control or format character, and none that fills a place."""
    category = unicodedata.category(character)
    is_selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return category[0] != "Z" and category not in ("Cc", "Cf") and character not in _FILLERS and not is_selector


def _not_blank(text: str) -> str:
    if not any(map(_shows, text)):
        raise ValueError("it is blank; give it a text or remove the problem")
    return text


def _json_object(value: dict[str, Any]) -> dict[str, Any]:
    check_json(value)
    return value


def check_json(value: object, place: str = "", level: int = 1) -> None:
    """Raise ValueError for a value that some reader of JSON cannot hold, and name its place in ``value``."""
    where = f"{place}: " if place else ""
    match value:
        case None | bool():
            pass
        case str():
            try:
                well_formed(value)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
        case int():
            if abs(value) > MAX_INTEGER:
                raise ValueError(f"{where}a whole number of more than 64 bits; write it as text")
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{where}no finite number ({value}); write it as text, or null")
        case dict() | list():
            if level > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels; flatten it, or write the inner part as text")
            _check_members(cast("dict[object, object] | list[object]", value), place, level)
        case _:
            raise ValueError(f"{where}JSON has no {type(value).__name__}; write it as text")


def _check_members(value: dict[object, object] | list[object], place: str, level: int) -> None:
    if isinstance(value, list):
        for index, member in enumerate(value):
            check_json(member, f"{place}[{index}]", level + 1)
        return
    for key, member in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{place or 'it'} has the key {key!r}; the keys of JSON objects are text")
        check_json(key, f"a key of {place or 'it'}", level)
        check_json(member, f"{place}.{key}" if place else key, level + 1)


WellFormed = Annotated[str, AfterValidator(well_formed)]
"""Text of whole characters."""

Text = Annotated[WellFormed, AfterValidator(_not_blank)]
"""Text that says something."""

JsonObject = Annotated[dict[str, Any], AfterValidator(_json_object)]
"""An object that every program on the way reads as it was written."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:/@+-]+")
_LONGEST_IDENTIFIER, _LONGEST_PROBLEM_ID = 200, 150


def _identifier(text: str, longest: int) -> str:
    if not _IDENTIFIER.fullmatch(text):
        raise ValueError(f"{text[:40]!r} may hold only ASCII letters, digits and _ . : / @ + -, and is not empty")
    if len(text) > longest:
        raise ValueError(f"it has {len(text)} characters; {longest} are the most")
    return text


Identifier = Annotated[str, AfterValidator(lambda text: _identifier(text, _LONGEST_IDENTIFIER))]
"""ASCII, since ids travel in HTTP headers."""

ProblemId = Annotated[str, AfterValidator(lambda text: _identifier(text, _LONGEST_PROBLEM_ID))]
"""Short enough that the rollouts' ids, which contain it, are identifiers too."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
