"""The plain form of an answer: what it says without its dress, its name and its unit.

====================================================  =====================
``\\boxed{12}``, ``\\(12\\)``, ``$12$``, ``**12**``       ``12``
``x = 12``                                            ``12``, name ``x``
``12 students``, ``5 \\text{ cm}``, ``\\$5``, ``50\\%``   the number, and a unit
``1{,}000``, ``1\\,000``, U+2212                        ``1000``, ``-``
====================================================  =====================

Letters are a unit only where they cannot be variables: in ``\\text{…}``, as a word of three letters or more after a
number and a space, or as a known short unit. ``5m`` is five times *m*.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from stepalign.critique.answers import number_of

_CHARACTERS = str.maketrans(
    {
        "\u2212": "-",
        "\ufe63": "-",
        "\uff0d": "-",
        "\u00d7": "\\times ",
        "\u00b7": "\\cdot ",
        "\u00f7": "\\div ",
        "\u2044": "/",
        "\u00b0": "^\\circ",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        **dict.fromkeys("\u00a0\u2007\u2009\u202f", " "),
    }
)
_GROUPED = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\ )(?=\d{3}(?!\d))")
_SPACED_GROUPS = re.compile(r"([-+]?\d{1,3}(?: \d{3})+)(?![\d.])")
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigl|bigr|Bigl|Bigr|displaystyle|limits)(?![A-Za-z])\.?")
_GAPS = re.compile(r"\\[,;:! ]|~|\\q?quad(?![A-Za-z])")
_FENCES = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("`", "`"))
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|mathit|mbox)\s*(?=\{)")
_NAME = re.compile(r"(\\?[A-Za-z]+(?:_\w|_\{\w+\})?|[A-Za-z]\([A-Za-z]\))\s*=(?!=)\s*")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_MIXED = re.compile(r"([-+]?)(\d+)\s*(?:\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|(?<=\s)(\d+)/(\d+))")
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt pi infty inf gcd lcm max min"
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS.split())})(?![A-Za-z])")
_ROOT_OF_ROUND = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_TIGHT = re.compile(r"\s*([,;()\[\]{}+*/^=<>-])\s*")

_POWER = r"(?:\^\{?-?[1-4]\}?|[\u00b2\u00b3])?"
_SHORT = "mm cm dm km mg kg ml dl hr hrs min sec ms ft in yd mi lb lbs oz mph kph kmh"
_NAMED_UNIT = re.compile(rf"\\(?:text|mathrm|textrm|mbox|rm)\s*\{{\s*([^{{}}\\]*[A-Za-z][^{{}}\\]*)\}}\s*{_POWER}$")
_SHORT_UNIT = re.compile(rf"(?<=[\d}}])\s*({'|'.join(_SHORT.split())}){_POWER}$")
_WORD_UNIT = re.compile(r"(?<=[\d}])\s+([A-Za-z]{3,}(?:[ -][A-Za-z]{2,}){0,4}|[A-Za-z]+/[A-Za-z]+)$")
_PERCENT = re.compile(r"\s*(?:\\?%|(?<![A-Za-z])per ?cent)$", re.IGNORECASE)
_DEGREE = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|(?<![A-Za-z])degrees?)$")
_CURRENCY = re.compile(r"\\?([$\u20ac\u00a3\u00a5])\s*(?=[-+]?[\d.])")
_SCALES = {"hundred", "thousand", "million", "billion", "trillion", "dozen", "score", "half"}
_NO_UNITS = {"and", "or", "to", "times", "than", *_SCALES}
_LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_ENVIRONMENT = re.compile(r"\\(?:begin|end|operatorname|mathrm|text|mathbf)\s*\{[^{}]*\}")


@dataclass(frozen=True)
class Plain:
    """An answer without dress. ``unit`` and ``name`` are empty where there are none."""

    value: str
    unit: str = ""
    name: str = ""

    @property
    def number(self) -> Fraction | None:
        """The value as an exact number; None where it is none."""
        mixed = _MIXED.fullmatch(self.value)
        if mixed is not None:
            over, under = mixed[3] or mixed[4] or mixed[7], mixed[5] or mixed[6] or mixed[8]
            return _signed(mixed[1], int(mixed[2]) + Fraction(int(over), int(under))) if int(under) else None
        fraction = _FRACTION.fullmatch(self.value)
        if fraction is not None:
            over, under = fraction[2] or fraction[3], fraction[4] or fraction[5]
            return _signed(fraction[1], Fraction(int(over), int(under))) if int(under) else None
        return number_of(self.value)

    @property
    def is_text(self) -> bool:
        """Whether the value is words, which no algebra may read as products of letters."""
        rest = _ENVIRONMENT.sub(" ", self.value)
        return _LETTERS.search(rest) is not None or (rest.isalpha() and rest.isascii() and len(rest) > 1)

    @property
    def scales(self) -> bool:
        """Whether a word such as ``million`` changes the number before it."""
        return self.value[:1].isdigit() and not _SCALES.isdisjoint(self.value.casefold().split())


def plain(answer: str) -> Plain:
    """Take the dress off ``answer``, of at most some thousand characters."""
    text = _GROUPED.sub("", answer.translate(_CHARACTERS))
    text = _GAPS.sub(" ", _SIZES.sub("", text)).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _undressed(text)
    name = _NAME.match(text)
    label = ""
    if name is not None and not re.search(r"[=,;]|\\[A-Za-z]*(?:le|ge|or|and|text)\b", text[name.end() :]):
        label, text = "".join(name[1].split()), _undressed(text[name.end() :])
    text, unit = _without_unit(text)
    text = _TIGHT.sub(r"\1", " ".join(_undressed(text).split()))
    if _SPACED_GROUPS.fullmatch(text):
        text = text.replace(" ", "")
    return Plain(_ROOT_OF_ROUND.sub(r"\\sqrt{\1}", _BARE_FUNCTION.sub(r"\\\1", text)), unit, label)


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _undressed(text: str) -> str:
    """Without fences, boxes and full stops around the whole of it."""
    while True:
        before = text
        text = text.strip().removesuffix(".").rstrip()
        for opening, closing in _FENCES:
            inner = text[len(opening) : -len(closing)]
            if (
                text.startswith(opening)
                and text.endswith(closing)
                and len(text) > len(opening)
                and opening not in inner
            ):
                text = inner.strip()
        wrapper = _WRAPPED.match(text)
        start = wrapper.end() if wrapper is not None else 0
        # Braces without a command are a set where they hold a list.
        is_dress = wrapper is not None or "," not in text
        if is_dress and text[start : start + 1] == "{" and _closing(text, start) == len(text) - 1:
            text = text[start + 1 : -1].strip()
        if text == before:
            return text


def _closing(text: str, start: int) -> int:
    """Where the brace that opens at ``start`` is closed; -1 where it never is."""
    depth = 0
    for place in range(start, len(text)):
        escaped = place > 0 and text[place - 1] == "\\"
        depth += 0 if escaped else (text[place] == "{") - (text[place] == "}")
        if not depth:
            return place
    return -1


def _without_unit(text: str) -> tuple[str, str]:
    """The text before a unit, and the unit: ``%``, ``degree``, a currency's sign, or words in small letters."""
    currency = _CURRENCY.match(text)
    if currency is not None and number_of(text[currency.end() :]) is not None:
        return text[currency.end() :], currency[1]
    for pattern, unit in ((_PERCENT, "%"), (_DEGREE, "degree")):
        found = pattern.search(text)
        if found is not None and found.start() and text[found.start() - 1] not in "^_{\\":
            return text[: found.start()], unit
    for pattern in (_NAMED_UNIT, _SHORT_UNIT, _WORD_UNIT):
        found = pattern.search(text)
        if found is not None and found.start() and _is_unit(found[1]):
            return text[: found.start()], _named(found[0])
    return text, ""


def _is_unit(words: str) -> bool:
    said = words.casefold().split()
    return _NO_UNITS.isdisjoint(said) and not _BARE_FUNCTION.search(words)


_WORDS_OF_SIGNS = {"dollar": "$", "euro": "\u20ac", "pound": "\u00a3", "percent": "%", "degree": "degree"}


def _named(written: str) -> str:
    """One spelling of a unit: small letters, without the commands around it and the plural's s."""
    bare = re.sub(r"\\[a-z]+|[{}]", " ", written).replace("\u00b2", "^2").replace("\u00b3", "^3")
    words = " ".join(bare.split()).casefold()
    single = words if len(words) < 4 else words.removesuffix("s")
    return _WORDS_OF_SIGNS.get(single, single)
