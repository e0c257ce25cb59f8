"""What one row of a batch proposes and hides, beside a search that reads everything each time."""

from __future__ import annotations

import random
import time
from typing import Any, cast

from stepalign_critic.decoding.draft import Draft
from stepalign_critic.decoding.drafted import Job, _Row


def row_of(draft: list[int], written: list[int]) -> _Row:
    return _Row(0, Job(cast(Any, None), Draft(draft, len(draft), ())), answer=written[:2], written=written[2:])


def searched(draft: list[int], written: list[int]) -> list[int]:
    """What follows in the draft where the last three tokens stand there, the latest place first."""
    ends = [end for end in range(3, len(draft)) if len(written) >= 3 and draft[end - 3 : end] == written[-3:]]
    return draft[ends[-1] : ends[-1] + 8] if ends else []


def test_the_latest_place_of_the_draft_is_proposed() -> None:
    choose = random.Random(0)
    proposals = 0
    for _ in range(2000):
        draft, written = (choose.choices(range(4), k=choose.randint(1, most)) for most in (60, 6))
        found = row_of(draft, written).proposed()
        assert found == searched(draft, written)
        proposals += bool(found)
    assert proposals > 200


def test_a_pass_does_not_read_the_whole_draft_again() -> None:
    row = row_of(list(range(100_000)), [1, 2])
    begin = time.process_time()
    for token in range(3000):
        row.written.append(token % 7)
        row.proposed()
    assert time.process_time() - begin < 10


def test_what_is_hidden_is_the_newest_that_is_attended_to() -> None:
    choose = random.Random(1)
    row, mask = row_of([], []), list[int]()
    for _ in range(300):
        gap, count = choose.randint(0, 3), choose.randint(0, 5)
        row.feed(gap, count)
        mask += [0] * gap + [1] * count
        hidden = choose.randint(0, min(4, sum(mask)))
        row.hide(hidden)
        for _ in range(hidden):
            mask[max(i for i, shown in enumerate(mask) if shown)] = 0
        assert (row.mask, row.fed) == (mask, sum(mask))
