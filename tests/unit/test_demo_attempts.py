"""The attempts of `make demo-qwen`: what they are said to be, one wrong in each way and two right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stepalign.types import CritiqueRequest

ATTEMPTS = Path(__file__).parents[2] / "examples" / "gsm8k_style_attempts.jsonl"
REQUESTS = [CritiqueRequest.model_validate_json(line) for line in ATTEMPTS.read_text(encoding="utf-8").splitlines()]
# Steps, the attempt's answer, the right one.
MIX = [
    (3, "36", "36"),
    (4, "144", "150"),
    (3, "82", "66"),
    (3, "195", "185"),
    (3, "36", "36"),
    (2, "12", "20"),
    (3, None, "36"),
    (3, "85", "235"),
]
SUM = re.compile(r"((?:[\d.]+ [-+*/] )+[\d.]+) = (\d+)")


def wrong_sums(text: str) -> list[str]:
    return [found[0] for found in SUM.finditer(text) if eval(found[1]) != float(found[2])]


def test_there_are_eight_of_them_cut_into_the_steps_that_were_meant() -> None:
    split = [request.split() for request in REQUESTS]
    assert [
        (len(one.steps), None if one.answer is None else one.text[slice(*one.answer)], request.answer)
        for one, request in zip(split, REQUESTS, strict=True)
    ] == MIX


@pytest.mark.parametrize("request_", REQUESTS, ids=[str(number) for number in range(1, 9)])
def test_the_reference_solutions_are_right(request_: CritiqueRequest) -> None:
    reference = request_.reference_solution
    assert reference is not None and SUM.search(reference) and wrong_sums(reference) == []
    assert request_.answer is not None and re.search(rf"\b{request_.answer}\b", reference)


def test_one_attempt_is_wrong_by_a_slip_and_the_others_by_their_thoughts() -> None:
    slips = [wrong_sums(request.split().text) for request in REQUESTS]
    assert slips == [[], [], [], ["280 - 95 = 195"], [], [], [], []]
