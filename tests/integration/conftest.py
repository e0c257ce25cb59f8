"""Whole runs that several modules start or look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.stacks import LAB, UNDISTURBED, Stack, made_once


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Callable[..., Stack]]:
    """``stack(name, *options, config=…)``: a run of the lab, not started yet; none of it outlives the test."""
    made: list[Stack] = []

    def make(name: str, *options: str, config: Path = LAB) -> Stack:
        made.append(Stack(tmp_path, name, *options, config=config))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with the options ``UNDISTURBED`` that nothing happened to."""

    def run(folder: Path) -> None:
        Stack(folder, "undisturbed", *UNDISTURBED).finished()

    (run_dir,) = made_once(tmp_path_factory, "undisturbed", run).glob("stack-*-undisturbed")
    return run_dir
