"""How the critic writes its answer to a prompt set's ``critique``: the file ``critique.toml`` beside the prompts.

``form = "inline"``: the steps one after the other, each followed by its mark::

    <step_1>…</step_1><copied/>
    <step_2>…</step_2><corrected/>
    …
    <answer>…</answer>

``form = "check"``: a line with a word for each step through the first wrong one, then what takes the place of the
attempt from there on. What is right is not written again::

    Step 1: right
    Step 2: wrong
    <step_2>…</step_2>
    …
    <answer>…</answer>

``form = "turns"``: a conversation. The user shows one step after the other (``critique_step``, the first one in
``critique``), and the assistant answers each with one word. What the attempt lacks is asked for in a last turn
(``critique_write`` after a wrong step, ``critique_continue`` where the attempt breaks off), and written as above.
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stepalign.errors import PromptError


class CritiqueLayout(BaseModel):
    """The parts of an answer's text besides steps and answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["inline", "check", "turns"]
    before_mark: str = ""
    """Between a step's closing tag and its mark (inline)."""
    separator: str = "\n"
    """Between a step or its mark and the next one."""
    inside: str = ""
    """Around the answer, between its tags."""
    label: str = "Step {number}:"
    """Opens the line of a step (check, turns)."""
    right: str = " right"
    wrong: str = " wrong"
    unjustified: str | None = None
    """The word for a step before which one is missing; None where the prompt knows none (check)."""


@cache
def load_layout(version: str) -> CritiqueLayout:
    """The layout of the prompt set ``version``. Raises PromptError when the set has none."""
    path = _file(version)
    if path is None:
        raise PromptError(f"there is no prompt set {version!r} that says how a critique is written; sets: {_sets()}")
    return CritiqueLayout.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def is_in_turns(version: str) -> bool:
    """Whether a prompt set asks in turns. False for a name that is no set."""
    return _file(version) is not None and load_layout(version).form == "turns"


def _file(version: str) -> Traversable | None:
    path = files("stepalign.prompts") / version / "critique.toml"
    return path if re.fullmatch(r"[a-z0-9-]+", version) and path.is_file() else None


def _sets() -> list[str]:
    return sorted(entry.name for entry in files("stepalign.prompts").iterdir() if _file(entry.name) is not None)
