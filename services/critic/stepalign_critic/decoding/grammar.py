"""What a critic may write, as a grammar in the two dialects that engines read.

A grammar is a small tree. :func:`to_lark` writes it for llguidance, which bounds free text in tokens; :func:`to_gbnf`
for llama.cpp and xgrammar, which know no tokens: there the bound is :data:`CHARACTERS_A_TOKEN` for each. A text of
shorter tokens meets its server's budget first: that is a bound, too, where the known answer can follow it.

Free text holds no tag: a ``<`` in it is followed by no letter and no slash. Of a corrected step it must be something
else than the step that it corrects, by :mod:`stepalign.critique.quotation`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from stepalign.critique.quotation import (
    BLANKS,
    CLOSING,
    OPENING,
    WORD_CHARACTERS,
    counts_as_opening,
    gaps,
    is_word,
    squeezed,
)
from stepalign_critic.errors import UnsupportedRequestError


@dataclass(frozen=True)
class Literal:
    """Exactly this text."""

    text: str


@dataclass(frozen=True)
class Free:
    """Text of at most ``tokens`` tokens and the tag ``closing``. It is not blank, and not ``unlike`` again.

    A text that its bound ends may lack the tag.
    """

    tokens: int
    closing: str
    unlike: str | None = None
    one_line: bool = False
    after_space: bool = False
    """Whether it must begin with whitespace."""


@dataclass(frozen=True)
class Sequenced:
    """One part after the other."""

    parts: tuple[Grammar, ...]


@dataclass(frozen=True)
class Choice:
    """One of the parts."""

    parts: tuple[Grammar, ...]


@dataclass(frozen=True)
class Onward:
    """At most ``steps`` tagged steps of at most ``tokens`` each, from ``number`` on and with ``after`` behind it; then
    ``end``."""

    number: int
    steps: int
    tokens: int
    after: str
    end: Grammar

    def expanded(self) -> Grammar:
        """The same of the other nodes."""
        grammar, after = self.end, Literal(self.after)
        for number in reversed(range(self.number, self.number + self.steps)):
            step = (Literal(f"<step_{number}>"), Free(self.tokens, f"</step_{number}>"), after, grammar)
            grammar = Choice((Sequenced(step), self.end))
        return grammar


Grammar = Literal | Free | Sequenced | Choice | Onward

_SPACE = "[ \\n\\t]"
CHARACTERS_A_TOKEN = 2
_LARK_BLANKS = " \\t\\n\\r"
BLANK = "[ \\n\\t]?"


class _Lark:
    """Rules gathered while the tree is written."""

    def __init__(self) -> None:
        self.rules: list[str] = []

    def write(self, node: Grammar) -> str:
        match node:
            case Literal(text):
                return _lark_text(text)
            case Free():
                return self._free(node)
            case Sequenced(parts):
                return " ".join(self.write(part) for part in parts)
            case Choice(parts):
                name = f"choice_{len(self.rules)}"
                self.rules.append("")
                place = len(self.rules) - 1
                self.rules[place] = f"{name}: " + " | ".join(self.write(part) for part in parts)
                return name
            case Onward():
                return self.write(node.expanded())

    def _free(self, node: Free) -> str:
        number = len(self.rules)
        inside = "[^<\\n\\r]" if node.one_line else "[^<]"
        space = _SPACE if node.after_space else f"{_SPACE}?"
        pattern = f"/{space}([^<\\s]|<[^\\/a-zA-Z<\\s])({inside}|<[^\\/a-zA-Z<])*/"
        if node.unlike is not None and squeezed(node.unlike):
            allowed = f"{pattern} & ~{_quotation(node.unlike)}"
            if not counts_as_opening(node.unlike):
                # Blanks and closing marks without an end would reach the bound and be a quotation there. Of a longer
                # step each of them is a quotation at once, and llguidance has no room for both conditions.
                run = f"/(.|\\n)*[{_LARK_BLANKS}{_escaped_class(CLOSING)}]{{8}}(.|\\n)*/"
                allowed += f" & ~{run}"
            pattern = f"({allowed}) | {_completed(node.unlike)}"
        # Lexemes are greedy: a tag of its own would begin with a "<" that the text might go on with.
        self.rules += [
            f"free_{number}[max_tokens={node.tokens}]: FREE_{number}",
            f"FREE_{number}: TEXT_{number} {_lark_text(node.closing)}",
            f"TEXT_{number}: {pattern}",
        ]
        return f"free_{number}"


def to_lark(node: Grammar) -> str:
    """The grammar for llguidance."""
    lark = _Lark()
    start = lark.write(node)
    return "\n".join([f"start: {start}", *lark.rules]) + "\n"


def _lark_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _quotation(wrong: str) -> str:
    """The regular expression of ``is_quotation``, but for the number that may complete a step."""
    text, closing = _spaced(squeezed(wrong)), f"[{_LARK_BLANKS}{_escaped_class(CLOSING)}]"
    opening = f"[{_LARK_BLANKS}{_escaped_class(OPENING)}]*"
    if not counts_as_opening(wrong):
        return f"/{opening}{text}{closing}*/"
    # What follows may not make another word or number of the last one.
    longer = WORD_CHARACTERS if is_word(squeezed(wrong)[-1:]) else ""
    return f"/{opening}{text}([^{longer}\\x{{2e}}](.|\\n)*|\\x{{2e}}([^0-9](.|\\n)*)?)?/"


def _completed(wrong: str) -> str:
    """The wrong step with the number that it lacked."""
    if not counts_as_opening(wrong):
        return '"0" & "1"'
    opening, closing = f"{_SPACE}?[{_escaped_class(OPENING)}]*", f"[{_LARK_BLANKS}{_escaped_class(CLOSING)}]*"
    return f"/{opening}{_spaced(squeezed(wrong))}[{_LARK_BLANKS}]*[0-9]{{1,12}}{closing}/"


def _spaced(text: str) -> str:
    spaces = {"none": "", "optional": f"[{_LARK_BLANKS}]*", "required": f"[{_LARK_BLANKS}]+"}
    return "".join(spaces[gap] + _escaped(character) for gap, character in gaps(text))


def _escaped(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):x}}}"


def _escaped_class(characters: str) -> str:
    return "".join(map(_escaped, characters))


def most_elements(node: Free) -> int:
    """The most that may follow the first character of its own in :func:`to_gbnf`; a "<" and what follows it are one."""
    return max(1, node.tokens * CHARACTERS_A_TOKEN - 2)


class _Gbnf:
    def __init__(self) -> None:
        self.rules: list[str] = []
        self.names = 0

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def write(self, node: Grammar) -> str:
        match node:
            case Literal(text):
                return _gbnf_text(text)
            case Free():
                return self._free(node)
            case Sequenced(parts):
                return " ".join(self.write(part) for part in parts)
            case Choice(parts):
                return "(" + " | ".join(self.write(part) for part in parts) + ")"
            case Onward():
                return self.write(node.expanded())

    def _free(self, node: Free) -> str:
        inside = "[^<\\n\\r]" if node.one_line else "[^<]"
        rest = self.name("rest")
        self.rules.append(f'{rest} ::= ({inside} | "<" [^/a-zA-Z<]){{0,{most_elements(node)}}}')
        closing = _gbnf_text(node.closing)
        # No text in such a grammar has a NUL: it cannot be a wrong step that does.
        if node.unlike is None or not squeezed(node.unlike) or _NUL in squeezed(node.unlike):
            space = "[ \\n\\t]" if node.after_space else "[ \\n\\t]?"
            return f'{space} ([^< \\n\\t\\r] | "<" [^/a-zA-Z< \\n\\t\\r]) {rest} {closing}'
        return f"{self._unlike(node.unlike, rest)} {closing}"

    def _unlike(self, wrong: str, rest: str) -> str:
        """A chain of rules, one a character: on the way of the wrong step so far, or off it for good."""
        characters = gaps(squeezed(wrong))
        names = [self.name("unlike") for _ in range(len(characters) + 1)]
        blanks = {"none": "", "optional": BLANK, "required": BLANK.rstrip("?")}
        start = f"[ \\n\\t{_gbnf_class(OPENING)}]{{0,4}}"
        for place, ((gap, character), name) in enumerate(zip(characters, names, strict=False)):
            follow = f"{blanks[gap]} {_gbnf_text(character)} {names[place + 1]}"
            if place == 0:
                follow, avoided = f"{start} {follow}", character + OPENING
                ways = [follow, f"{start} {_off(avoided)} {rest}"]
            elif gap == "none":
                ways = [
                    follow,
                    f"{_off(character)} {rest}",
                    f"{BLANK.rstrip('?')} {_off('')} {rest}",
                ]
            elif gap == "optional":
                ways = [follow, f"{BLANK} {_off(character)} {rest}"]
            else:
                ways = [
                    follow,
                    f"{_off('')} {rest}",
                    f"{BLANK.rstrip('?')} {_off(character)} {rest}",
                ]
            self.rules.append(f"{name} ::= " + " | ".join([*ways, *(['""'] if place else [])]))
        self.rules.append(f"{names[-1]} ::= {self._after(wrong, rest)}")
        return names[0]

    def _after(self, wrong: str, rest: str) -> str:
        """What may follow the whole of the wrong step."""
        if not counts_as_opening(wrong):
            return f"{BLANK} [^{_gbnf_class(CLOSING + '<' + BLANKS)}] {rest}"
        longer = f"[{WORD_CHARACTERS}] {rest} | " if is_word(squeezed(wrong)[-1:]) else ""
        return f'{longer}"." [0-9] {rest} | {BLANK} [0-9]{{1,12}}'


def _off(awaited: str) -> str:
    """A character that is neither ``awaited`` nor blank; "<" only where no tag follows, and where it is not awaited."""
    other = f"[^{_gbnf_class(awaited + '<' + BLANKS)}]"
    return other if "<" in awaited else f'({other} | "<" [^/a-zA-Z<])'


def to_gbnf(node: Grammar) -> str:
    """The grammar for llama.cpp, and for servers that read its dialect.

    Raises UnsupportedRequestError for a literal with a NUL, which ends a grammar's text there.
    """
    gbnf = _Gbnf()
    start = gbnf.write(node)
    return "\n".join([f"root ::= {start}", *gbnf.rules]) + "\n"


_GBNF_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", '"': '\\"'}


_NUL = "\x00"
_BYTE_IN_TEXT = re.compile("([\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\xff])")


def _gbnf_text(text: str) -> str:
    """A text as one or several parts in a row."""
    if _NUL in text:
        raise UnsupportedRequestError(
            "the known answer, or the attempt's unfinished step, holds the character U+0000, which a grammar of "
            "critic.openai.grammar cannot; send it without"
        )
    # xgrammar takes a control character or a Latin one in a text, be it escaped or not, for a byte; in a class, never.
    parts = [
        f"[\\u{ord(part):04x}]"
        if _BYTE_IN_TEXT.fullmatch(part)
        else f'"{"".join(_GBNF_ESCAPES.get(character, character) for character in part)}"'
        for part in _BYTE_IN_TEXT.split(text)
        if part
    ]
    return " ".join(parts) or '""'


def _gbnf_class(characters: str) -> str:
    """The inside of a class that begins with something else. A "-" at its end is no range in any reader's eyes."""
    ordered = sorted(set(characters), key=lambda character: character == "-")
    escapes = _GBNF_ESCAPES | {"]": "\\]", "[": "\\[", '"': '"'}
    return "".join(escapes.get(character, character) for character in ordered)
