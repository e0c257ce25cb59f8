"""Functions that other distributions bring along, found by entry point.

====================== ======================================================================================
``stepalign.checkers`` ``(question, attempt) -> critique text``: a domain's exact critic; ValueError on a question
                       that it cannot handle
``stepalign.graders``  ``(answer, known_answer) -> bool | None``: whether two answers are the same; None: unknown
====================== ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stepalign.critique.answers import Grader
from stepalign.errors import ConfigError

CHECKERS = "stepalign.checkers"
GRADERS = "stepalign.graders"

Checker = Callable[[str, str], str]


@dataclass(frozen=True)
class Plugin:
    """A loaded function; ``revision`` names the distribution and version that it comes from."""

    name: str
    function: Callable[..., Any]
    revision: str


def load_plugin(group: str, key: str, name: str | None) -> Plugin:
    """The function called ``name`` in ``group``. Raises ConfigError, naming ``key``, unless there is exactly one."""
    installed = entry_points(group=group)
    found: list[EntryPoint] = [entry for entry in installed if entry.name == name]
    if len(found) != 1 or found[0].dist is None:
        names = sorted({entry.name for entry in installed})
        raise ConfigError(
            f"{key} is {name!r}; it must name one entry point in the group {group}; installed are {names}"
        )
    entry, dist = found[0], found[0].dist
    return Plugin(entry.name, entry.load(), f"{dist.name}-{dist.version}")


def load_checker(name: str) -> Checker:
    """The exact checker that ``data.checker`` names. Raises ConfigError as above."""
    return load_plugin(CHECKERS, "data.checker", name).function


def load_grader(name: str, key: str = "data.grader") -> Grader:
    """The grader ``name``, which ``key`` names. Raises ConfigError as above, and where its extra is not installed."""
    return load_plugin(GRADERS, key, name).function
