"""Which form of an answer a client wants, by its header ``Accept``."""

from __future__ import annotations

import pytest

from stepalign_critic.http.accept import prefers

LINES, JSON = "application/x-ndjson", "application/json"


@pytest.mark.parametrize(
    ("accepts", "lines"),
    [
        ([], False),
        ([""], False),
        (["*/*"], False),
        (["application/*"], False),
        ([LINES], True),
        (["Application/X-NDJSON"], True),
        ([f"{LINES}; charset=utf-8"], True),
        ([f"{LINES};q=0"], False),
        ([f"{LINES};q=0.000"], False),
        ([f"{LINES};Q=0"], False),
        ([f"{LINES} ; q = 0"], False),
        ([f"{LINES};q=0, */*"], False),
        ([f"{LINES};q=0, application/*"], False),
        ([f"{LINES};q=0.001"], True),
        ([f"text/html, {LINES};q=0.9"], True),
        # The greater weight decides, in any order and in several headers.
        ([f"{JSON};q=0.5, {LINES}"], True),
        ([f"{LINES}, {JSON};q=0.5"], True),
        ([f"{JSON};q=0.5", LINES], True),
        ([f"{JSON}, {LINES};q=0.5"], False),
        ([f"{LINES};q=0.5, */*"], False),
        ([f"{LINES};q=0.5, */*;q=0.1"], True),
        # Of equal weights the one that is named more exactly; both named, the default.
        ([f"{LINES}, */*"], True),
        ([f"{LINES}, application/*"], True),
        ([f"{JSON}, text/plain, */*"], False),
        ([f"{JSON}, {LINES}"], False),
        ([f"{LINES}, {JSON}"], False),
        # A range that names it exactly counts, not a wider one.
        ([f"*/*, {JSON};q=0"], True),
        # A client that takes neither gets the default.
        (["text/html"], False),
        ([f"{LINES};q=0, {JSON};q=0"], False),
        # What cannot be read is passed over.
        ([f"{LINES};q=2"], False),
        ([f"{LINES};q=nan"], False),
        ([f"{LINES};q="], False),
        ([f"{LINES};q=0.1234"], False),
        ([f";;, ,{LINES}"], True),
        ([f'text/plain;x="a, {LINES}, b"'], False),
    ],
)
def test_the_form_of_an_answer(accepts: list[str], lines: bool) -> None:
    assert prefers(LINES, JSON, accepts) is lines
