"""The final answer of a text without answer tags: where it stands, and whether a text is nothing but the answer.

The first rule that finds something is used:

==============  =======================================================================================================
``boxed``       The last ``\\boxed{…}`` or ``\\fbox{…}``, without braces too: ``\\boxed 5``.
``hashes``      The text after ``####`` on the last line.
``phrase``      The last value that is announced: by ``answer is``, ``answer:``, ``answer =``, a line ``A: …``, or a
                line that is nothing but ``Final Answer``. The value stands behind these words, or on the next line.
``conclusion``  The only number of the last sentence, which opens with ``So``, ``Therefore``, … and has a full stop.
==============  =======================================================================================================

The sentence of a ``conclusion`` calculates nothing: no sign but those of money, per cent and emphasis stands in it, and
its number has no letter or hyphen at its end. Such a sentence also closes steps on the way to an answer, which nobody
can tell from a last one: docs/critique-format.md has how often that happens.

An announced value ends with its clause: ``7, because …``, ``7. I hope it is correct.`` Where a clause without numbers
of its own marks one place, by dollar signs, LaTeX's brackets or asterisks, the value is that place. Emphasis, dollar
signs and full stops around a value do not belong to it.
"""

from __future__ import annotations

import re

from stepalign.critique.rules import AnswerRule
from stepalign.critique.trace import Span

# Texts are hostile: possessive quantifiers keep every pattern linear.
_BRACE = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*+)?(?<!\\)\{|(?P<end>(?<!\\)\})|\\(?:boxed|fbox)[ \t]*+(?P<bare>[^\s\\{}$]++)(?!\{)"
)
_HASHES = re.compile(r"[ \t]*+####(?!#)([^\n]++)")
_LEAD = re.compile(
    r"\banswer\b(?:[ \t]++(?:to|of|for)\b[^.,:;=\n]{1,100}?|,[^,.:;=\n]{1,100},)?[ \t*_]*+"
    r"(?:\b(?:is|was|equals|(?:would|will|should|must)[ \t]++be)\b|[:=：]|[-–—](?=[ \t]))"
    r"|^[ \t>*_]*+(?P<letter>(?-i:A|Ans|ANS))[*_]*+[:：.](?=[ \t*_])"
    r"|^[ \t]*+(?:\#{1,6}[ \t]++)?[*_]*+(?:the[ \t]++)?(?:final[ \t]++)?answer[*_]*+[ \t]*+$",
    re.I | re.M,
)
_LINE_END = re.compile(r"\n")
_LEAD_WORD = re.compile("[Aa](?i:nswer)")
_CHOICE = re.compile(r"^[ \t>*_]*+B[*_]*+[:：.]", re.M)
_NO_VALUE = re.compile(r"(?:not|(?:in)?correct|wrong|clear|obvious|reasonable|as[ \t]++follows)\b", re.I)
_FILLER = re.compile(
    r"(?:[\s:=：]|[*_]++(?=\s)|<<[^<>\n]*+>>"
    r"|(?:therefore|thus|then|simply|indeed|exactly|equal[ \t]++to|that|there[ \t]++(?:is|are))\b,?)*+",
    re.I,
)
_CLAUSE_END = re.compile(
    r"[.!?]++[\"'”’)*_$]*+(?=\s|$)|[,;](?=[ \t]++(?!(?:and|or)\b)(?:[a-z]{2}|i\b))"
    r"|[ \t](?:because|since|which|so|as)\b|[ \t][-–—][ \t]|\n",
    re.I,
)
_DELIMITED = re.compile(
    r"\$\$([^$]++)\$\$|(?<!\\)\$(?=\S)([^$\n]++)(?<=\S)\$(?!\d)|\\\(((?:(?!\\\)).)++)\\\)|\\\[((?:(?!\\\]).)++)\\\]"
    r"|\*\*(?=\S)([^*\n]++)\*\*",
    re.S,
)
_UNIT = re.compile(r"(?!\s*+(?:and|or)\b)[a-z\s'*_.!-]*+", re.I)
_NUMBER_OF_MANY_WORDS = re.compile(r"(-?\d[\d,.]*+(?<!\D))(?:[ \t]++(?!and\b|or\b)[a-z]{2,}+){3}", re.I)
_SENTENCE_BEGINS = re.compile(r"[.!?:;][\"'”’)*_$]*+\s++|\n")
_CONCLUDES = re.compile(
    r"[\s*_>]*+(?:so(?![ \t]++(?:far|that|long)\b)|therefore|thus|hence|consequently|finally"
    r"|in[ \t]++(?:total|conclusion))\b",
    re.I,
)
_CONCLUSION_ENDS = re.compile(r"[.!][\"'”’)*_$]*+\s*+\Z")
_DENIES = re.compile(r"\b(?:not|never|cannot|neither|wrong|incorrect|mistake|error)\b|n['’]t\b", re.IGNORECASE)
_NAMED = re.compile(r"\b(?:step|case|option|choice|part|question|problem|equation|line|method)\s+\Z", re.IGNORECASE)
"""Before a number that is a name."""
_CALCULATES = re.compile(r"\\[^()$%]|[=<>≤≥≠≈+×÷^{}\[\]|?]")
_NUMBER = re.compile(r"(?:\\?\$)?[-−]?\d++(?:,\d{3})*+(?:\.\d++)?+(?:/\d++)?+(?:\\?%)?")
_LONGEST_CONCLUSION = 400
_BEFORE_VALUE = re.compile(r"(?:\\[$,!; ]|[\s*_$!`\"“]|\.(?!\d))++")
_AFTER_VALUE = ' \t\n*_$.!`"”,;:\\'
_AROUND_BOXED = " \t\n$.\\"

_MARK = r"<<[^<>\n]*+>>|[\W_]|\b(?:the|final|answer|ans|a|boxed|fbox|text)\b"
_ONLY_MARK = re.compile(rf"(?:{_MARK})*+", re.I)
_STATES = rf"{_MARK}|\b(?:therefore|so|thus|hence|in|conclusion|is|was|be)\b"
_ONLY_STATES = re.compile(rf"(?:{_STATES})*+", re.I)
_CLOSING_WORDS = re.compile(r"(?:[\W_]|\bI hope (?:it|this)(?: is|'s) (?:correct|right)\b)*+", re.I)


def find_answer(text: str, *, conclusions: bool = True) -> tuple[Span | None, AnswerRule | None]:
    """Where the answer stands, and the rule that found it; without ``conclusions`` an announced one alone."""
    for rule, find in _RULES:
        span = find(text) if conclusions or rule is not AnswerRule.CONCLUSION else None
        if span is not None:
            return span, rule
    return None, None


def is_only_answer(text: str, span: Span, answer: Span, *, sentences: bool) -> bool:
    """Whether the text at ``span`` is the answer with its mark, or, if ``sentences``, with words that announce it.

    Marks, announcements and "I hope it is correct." without the answer count too.
    """
    start, end = span
    inside = start <= answer[0] and answer[1] <= end
    before, after = (text[start : answer[0]], text[answer[1] : end]) if inside else (text[start:end], "")
    if not inside and (sentences and answer[1] <= start and _CLOSING_WORDS.fullmatch(before) is not None):
        return True
    if not inside and _LEAD_WORD.search(before) is None:
        return False
    if _ONLY_MARK.fullmatch(before) is not None and re.fullmatch(r"[\W_]*+", after) is not None:
        return True
    return sentences and _ONLY_STATES.fullmatch(before) is not None and _CLOSING_WORDS.fullmatch(after) is not None


def _boxed(text: str) -> Span | None:
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    last: Span | None = None
    opened: list[re.Match[str]] = []
    for match in _BRACE.finditer(text):
        found: Span | None = None
        if match["bare"]:
            found = match.span("bare")
        elif not match["end"]:
            opened.append(match)
        elif opened and (opening := opened.pop())["box"] is not None:
            found = opening.end(), match.start()
        if found is not None:
            last = _unwrapped(text, found, _AROUND_BOXED) or last
    return last


def _hashes(text: str) -> Span | None:
    match = _HASHES.match(text, text.rstrip().rfind("\n") + 1)
    return _unwrapped(text, match.span(1)) if match is not None else None


def _announced(text: str) -> Span | None:
    leads = _leads(text)
    choices = any(lead["letter"] for lead in leads) and _CHOICE.search(text) is not None
    for lead in reversed(leads):
        value = None if lead["letter"] and choices else _value(text, lead.end())
        if value is not None:
            return value
    return None


def _leads(text: str) -> list[re.Match[str]]:
    """Where a value is announced. An announcement begins a line or with one word: other places need no look."""
    words = [word.start() for word in _LEAD_WORD.finditer(text)]
    lines = [end.end() for end in _LINE_END.finditer(text)]
    leads: list[re.Match[str]] = []
    after = 0
    for place in sorted({0, *lines, *words}):
        lead = _LEAD.match(text, place) if place >= after else None
        if lead is not None:
            leads.append(lead)
            after = lead.end()
    return leads


def _concluded(text: str) -> Span | None:
    last = text[-_LONGEST_CONCLUSION:]
    ending = _CONCLUSION_ENDS.search(last)
    if ending is None:
        return None
    begins = [match.end() for match in _SENTENCE_BEGINS.finditer(last, 0, ending.start())]
    start = begins[-1] if begins else 0
    whole = bool(begins) or len(last) == len(text)
    if not whole or _CONCLUDES.match(last, start) is None or _CALCULATES.search(last, start) is not None:
        return None
    if _DENIES.search(last, start) is not None:
        return None
    numbers = list(_NUMBER.finditer(last, start, ending.start()))
    if len(numbers) != 1:
        return None
    (first, end), offset = numbers[0].span(), len(text) - len(last)
    # "4th", "x2", "5-foot" and "3:30" count nothing.
    named = _NAMED.search(last, start, first) is not None
    alone = not named and not last[first - 1 : first].isalnum() and re.match(r"[\w^:°]|-\w", last[end:]) is None
    return _unwrapped(text, (offset + first, offset + end)) if alone else None


_RULES = (
    (AnswerRule.BOXED, _boxed),
    (AnswerRule.HASHES, _hashes),
    (AnswerRule.PHRASE, _announced),
    (AnswerRule.CONCLUSION, _concluded),
)


def _value(text: str, start: int) -> Span | None:
    """The value that is announced right before ``start``."""
    filler = _FILLER.match(text, start)
    start = filler.end() if filler is not None else start
    if _NO_VALUE.match(text, start) is not None:
        return None
    marked = _DELIMITED.match(text, start)
    ending = _CLAUSE_END.search(text, start if marked is None else marked.end())
    end = len(text) if ending is None else ending.start()
    places = [marked] if marked is not None else list(_DELIMITED.finditer(text, start, end))
    if len(places) == 1:
        place = places[0]
        if not re.search(r"\d", text[start : place.start()]) and _UNIT.fullmatch(text, place.end(), end) is not None:
            return _unwrapped(text, place.span(place.lastindex or 0))
    sentence = _NUMBER_OF_MANY_WORDS.match(text, start, end)
    return _unwrapped(text, (start, end) if sentence is None else sentence.span(1))


def _unwrapped(text: str, span: Span, around: str = _AFTER_VALUE) -> Span | None:
    """Without the emphasis, dollar signs and full stops around it; None when nothing is left."""
    start, end = span
    opening = _BEFORE_VALUE.match(text, start, end)
    start = opening.end() if opening is not None else start
    value = text[start:end].rstrip(around)
    if "$" in value or "**" in value:
        # These belong to parts of the value.
        value = text[span[0] : end].strip()
        start = span[0] + len(text[span[0] : end]) - len(text[span[0] : end].lstrip())
        value = value.rstrip(" .,;:")
    if value.endswith(")") and "(" not in value:
        value = value[:-1].rstrip(around)
    return (start, start + len(value)) if value else None
