"""The rules by which an attempt is read, as the wire names them."""

from __future__ import annotations

from enum import StrEnum


class SplitRule(StrEnum):
    """The rule by which an attempt was split into steps: see docs/critique-format.md."""

    TAGS = "tags"
    REPAIRED_TAGS = "repaired_tags"
    """The step tags were not in the grammar, and were put right."""
    STEPS = "steps"
    """The request held the steps one by one."""
    NUMBERED_LINES = "numbered_lines"
    PARAGRAPHS = "paragraphs"
    LINES = "lines"
    SENTENCES = "sentences"


class AnswerRule(StrEnum):
    """The rule by which the final answer was found."""

    TAG = "tag"
    BOXED = "boxed"
    HASHES = "hashes"
    PHRASE = "phrase"
    CONCLUSION = "conclusion"
    """Nothing announces it: it is the only number of the last sentence, which opens with "So", "Therefore", …"""
