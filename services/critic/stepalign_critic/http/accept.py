"""The header ``Accept`` (RFC 9110, 12.5.1): which of two forms of an answer a client wants."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.request import parse_http_list

_WEIGHT = re.compile(r"(0(\.\d{0,3})?|1(\.0{0,3})?)")
_NOT_NAMED = (0.0, 0)


def prefers(wanted: str, default: str, accepts: Iterable[str]) -> bool:
    """Whether a client wants ``wanted`` rather than ``default``, by its values of ``Accept``.

    The greater weight decides; where weights are equal, the one that is named more exactly, or else the default. A
    client that accepts neither gets the default as well: an answer in another form tells it more than a 406.
    """
    ranges = [parsed for value in accepts for parsed in map(_parse, parse_http_list(value)) if parsed is not None]
    (weight, exactness), other = _rank(wanted, ranges), _rank(default, ranges)
    return weight > 0 and (weight, exactness) > other


def _rank(kind: str, ranges: list[tuple[str, float]]) -> tuple[float, int]:
    """Weight of a media type by the range that names it most exactly, and how exactly (0 to 3)."""
    exactness = {"*/*": 1, f"{kind.partition('/')[0]}/*": 2, kind: 3}
    matches = [(exactness[named], weight) for named, weight in ranges if named in exactness]
    if not matches:
        return _NOT_NAMED
    exact, weight = max(matches)
    return weight, exact


def _parse(element: str) -> tuple[str, float] | None:
    """A media range with its weight; None for what is none."""
    named, *parameters = (part.strip().lower() for part in element.split(";"))
    given = next(
        (value.strip() for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"), "1"
    )
    return (named, float(given)) if _WEIGHT.fullmatch(given) else None
