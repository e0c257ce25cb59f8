"""The words of a failed validation, for users: pydantic's own end in a link to its documentation."""

from __future__ import annotations

from pydantic import ValidationError

_MOST_SHOWN = 5


def explain(error: ValidationError) -> str:
    """The first problems, each with the dotted place that it is about."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        f"{'.'.join(map(str, problem['loc']))}{': ' if problem['loc'] else ''}"
        f"{problem['msg'].removeprefix('Value error, ')}"
        for problem in problems[:_MOST_SHOWN]
    ]
    more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
    return "; ".join(shown) + more
