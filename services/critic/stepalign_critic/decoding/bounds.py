"""Which parts of what was written were cut at the bound of their free text.

A grammar that counts tokens (:func:`.grammar.to_lark`) leaves such a part without its closing tag. One that counts
characters (:func:`.grammar.to_gbnf`) closes it, so there the characters are counted again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from stepalign.critique.quotation import BLANKS, end_of_common
from stepalign.critique.trace import Trace, parse_trace
from stepalign.types import Forced
from stepalign_critic.decoding.grammar import Choice, Free, Grammar, Literal, Onward, Sequenced, most_elements

_ELEMENT = re.compile(r"<[^/a-zA-Z<]|[^<]")
_END_BEGUN = re.compile(r"(?:\s*<step_[0-9]+>)?\s*(?:<(?:/?[a-z]*_?[0-9]*)?|<answer>[^<]*(?:</?[a-z]*)?)?\Z")
_TAG_BEGUN = re.compile(r"<(?:/[a-z]*_?[0-9]*)?\Z")


def cut_by_tokens(text: str) -> frozenset[Forced]:
    """The parts of ``text``, written by a grammar that counts tokens, that their bound has cut."""
    written = parse_trace(text)
    found = {Forced.STEP_BOUND} if any(not step.closed for step in written.steps) else set[Forced]()
    return frozenset(found | ({Forced.ANSWER_BOUND} if answer_is_open(written, text) else set()))


def cut_by_characters(grammar: Grammar, text: str, open_text: str) -> frozenset[Forced]:
    """The parts of ``text``, written from ``open_text`` on by a grammar that counts characters, at their bound.

    Exact to one character, which a wrong step's last full stop may take.
    """
    written = parse_trace(text)
    bounds = {free.closing.strip(): free for free in _free(grammar)}
    found: set[Forced] = set()
    given = len(open_text.partition(">")[2])
    for i, step in enumerate(written.steps):
        free = bounds.get(f"</step_{step.number}>")
        if free is not None and _is_full(free, step.body[0 if i else given :]):
            found.add(Forced.STEP_BOUND)
    answer = bounds.get("</answer>")
    if answer is not None and written.answer is not None and _is_full(answer, written.answer.body):
        found.add(Forced.ANSWER_BOUND)
    return frozenset(found)


def answer_is_open(written: Trace, text: str) -> bool:
    """Whether ``text``, parsed as ``written``, ends in an answer without its closing tag."""
    return written.answer is None and "<answer>" in text


def without_begun_tag(body: str) -> str:
    """A body that its bound has cut, without the beginning of its closing tag."""
    return _TAG_BEGUN.sub("", body)


def without_begun_end(text: str) -> str:
    """A text that its whole budget has cut, without a tag, an empty step or an answer that is begun and not ended."""
    return _END_BEGUN.sub("", text, count=1)


def _free(grammar: Grammar) -> Iterator[Free]:
    match grammar:
        case Free():
            yield grammar
        case Sequenced(parts) | Choice(parts):
            for part in parts:
                yield from _free(part)
        case Onward():
            yield from _free(grammar.expanded())
        case Literal():
            return


def _is_full(free: Free, body: str) -> bool:
    place = 0 if free.unlike is None else end_of_common(free.unlike, body)
    # One blank may stand before the first character of its own, which the bound does not count.
    place += body[place : place + 1] in tuple(BLANKS)
    return len(_ELEMENT.findall(body, place)) - 1 >= most_elements(free) - (free.unlike is not None)
