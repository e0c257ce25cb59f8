"""Texts of models, servers and files on their way to a terminal.

Such a text may hold characters that a terminal obeys (colours, the cursor, its title) or by which it shows the text in
another order than it has. Whatever a command prints passes through here; :class:`~stepalign.commands.terminal.Terminal`
sees to it for tables and progress.
"""

from __future__ import annotations

from unicodedata import bidirectional, category

_KEPT = "\n\t"
# Control characters, halves of a surrogate pair (which no stream can encode), separators of lines and paragraphs.
_STEERING = frozenset({"Cc", "Cs", "Zl", "Zp"})
_REORDERING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_MARKS = frozenset("\u061c\u200e\u200f")


def printable(text: str) -> str:
    """``text`` with U+FFFD for each character that steers a terminal or reorders text. The length stays."""
    return text if text.isascii() and text.isprintable() else "".join("\ufffd" if _steers(c) else c for c in text)


def printable_json(text: str) -> str:
    """A JSON text with those characters escaped; it means the same."""
    return "".join(f"\\u{ord(c):04x}" if _steers(c) else c for c in text)


def _steers(character: str) -> bool:
    if character in _KEPT:
        return False
    return category(character) in _STEERING or bidirectional(character) in _REORDERING or character in _MARKS
