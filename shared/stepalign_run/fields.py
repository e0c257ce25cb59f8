"""The fields of a run that travel: its name, its arm, its numbers. See also :mod:`stepalign.fields`.

Configuration and wire types use these, so a configuration that loads can be run: nothing of it is refused later by a
rollout, a Redis key or a report.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, cast

from pydantic import AfterValidator, Field

from stepalign.fields import MAX_INTEGER, check_json, well_formed

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# A run may be named after its arm and its seed, and its probe has an ending besides.
_LONGEST_RUN, _LONGEST_ARM = 100, 80

BASE, CHANCE = "base", "chance"
"""Rows of result tables that are no arms."""


def _name(text: str, longest: int) -> str:
    """A name that is a folder, a part of Redis keys and of URLs, and is no path out of a folder."""
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{text[:40]!r} is no name: take ASCII letters, digits and _ . -, and begin with a letter, a digit or _"
        )
    if len(text) > longest:
        raise ValueError(f"{text[:40]!r}… has {len(text)} characters; take {longest} at most")
    return text


def _arm(text: str) -> str:
    name = _name(Path(text).stem if text.endswith(".toml") else text, _LONGEST_ARM)
    if name in (BASE, CHANCE):
        raise ValueError(f"an arm cannot be called {name!r}, which names another row of the tables; rename its file")
    return text


RunName = Annotated[str, AfterValidator(lambda text: _name(text, _LONGEST_RUN))]
"""A run's name, and ``run_id`` on the wire."""

ArmName = Annotated[str, AfterValidator(_arm)]
"""A shipped arm, or the path of a TOML file that is named like one."""

RunSeed = Annotated[int, Field(ge=0, lt=2**31)]
SampleSeed = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
"""Of one completion; :func:`stepalign_models.sampling.stable_seed` makes it."""

Version = Annotated[int, Field(ge=0, lt=2**31)]
"""A policy version: the number of updates behind it. Lua compares versions as floating-point numbers."""

Steps = Annotated[int, Field(ge=1, lt=2**31)]
"""Updates, the last of which gives the version of this number."""

Temperature = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, lt=2**31)]
CompletionTokens = Annotated[int, Field(ge=1, le=2**20)]
LogProbability = Annotated[float, Field(allow_inf_nan=False)]


def check_travels(value: object) -> None:
    """Raise ValueError for a configured value that a report cannot hold, or that is no path.

    Paths and texts of the command line hold halves of surrogate pairs where the bytes are no UTF-8.
    """
    match value:
        case Path():
            if "\0" in str(value):
                raise ValueError("a path cannot hold the character NUL; remove it")
            _utf8(str(value))
        case str():
            _utf8(value)
        case int() | float() | dict():
            check_json(cast(object, value))
        case list() | tuple():
            for member in cast("list[object] | tuple[object, ...]", value):
                check_travels(member)
        case _:
            pass


def _utf8(text: str) -> None:
    try:
        well_formed(text)
    except ValueError:
        raise ValueError(f"{text!a} is no UTF-8; rename it with other characters") from None
