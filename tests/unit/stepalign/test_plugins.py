"""Functions by entry point: found by one name, and a message that says what to change when there is none."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint, EntryPoints, entry_points

import pytest

from stepalign import plugins
from stepalign.critique.answers import answers_equal
from stepalign.errors import ConfigError
from stepalign.graders.math import math_equal
from stepalign.plugins import CHECKERS, GRADERS, load_checker, load_grader, load_plugin
from stepalign_lab.checker import exact_critique


def test_what_is_installed_is_found_by_its_name() -> None:
    assert load_grader("exact") is answers_equal
    assert load_grader("math") is math_equal
    assert load_checker("lab") is exact_critique


def test_a_revision_names_the_distribution_and_its_version() -> None:
    from importlib.metadata import version

    plugin = load_plugin(CHECKERS, "critic.checker", "lab")
    assert (plugin.name, plugin.function, plugin.revision) == (
        "lab",
        exact_critique,
        f"stepalign-{version('stepalign')}",
    )


@pytest.mark.parametrize(
    ("group", "key", "name", "installed"),
    [
        (GRADERS, "data.grader", "symbolic", ["exact", "math"]),
        (CHECKERS, "data.checker", "nobody", ["lab", "sums"]),
        (CHECKERS, "critic.checker", None, ["lab", "sums"]),
    ],
)
def test_an_unknown_name_is_refused_with_its_key_and_the_known_names(
    group: str, key: str, name: str | None, installed: list[str]
) -> None:
    message = f"{key} is {name!r}; it must name one entry point in the group {group}; installed are {installed}"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_plugin(group, key, name)


def test_the_two_keys_of_problems_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.grader is 'nobody'"):
        load_grader("nobody")
    with pytest.raises(ConfigError, match=r"critic\.grader is 'nobody'"):
        load_grader("nobody", "critic.grader")
    with pytest.raises(ConfigError, match=r"data\.checker is 'nobody'"):
        load_checker("nobody")


def test_a_name_that_two_distributions_bring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*, group: str) -> EntryPoints:
        return EntryPoints([*entry_points(group=group), *entry_points(group=group)])

    monkeypatch.setattr(plugins, "entry_points", doubled)
    with pytest.raises(ConfigError, match="must name one entry point"):
        load_grader("exact")


def test_an_entry_point_that_no_distribution_brings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stray = EntryPoint("stray", "stepalign.critique.answers:answers_equal", GRADERS)
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: EntryPoints([stray]))
    with pytest.raises(ConfigError, match="stray"):
        load_grader("stray")
