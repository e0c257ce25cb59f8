"""The known forms of rows. A new one is a module with ``NAME``, ``recognises`` and ``read``, listed here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stepalign_run.data import big_bench_mistake, mr_ben, mr_gsm8k, own, prm800k, processbench
from stepalign_run.data.labelled import LabelledSolution

_LISTED = 12


@dataclass(frozen=True)
class Format:
    name: str
    marks: str
    """The columns by which a row of this form is known, for messages."""
    recognises: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any]], LabelledSolution]
    """Raises ValueError for a bad row, and LeftOutError for one that its data set gives no usable label."""


FORMATS = (
    Format(own.NAME, "first_error, steps", own.recognises, own.read),
    Format(processbench.NAME, "label, steps", processbench.recognises, processbench.read),
    Format(prm800k.NAME, "question.problem, label.steps", prm800k.recognises, prm800k.read),
    Format(mr_ben.NAME, "Model_Solution_Steps", mr_ben.recognises, mr_ben.read),
    Format(mr_gsm8k.NAME, "model_output_steps", mr_gsm8k.recognises, mr_gsm8k.read),
    Format(big_bench_mistake.NAME, "mistake_index, steps", big_bench_mistake.recognises, big_bench_mistake.read),
)


def format_of(row: dict[str, Any]) -> Format:
    """Raises ValueError, with the columns of all forms, for a row of none."""
    found = next((each for each in FORMATS if each.recognises(row)), None)
    if found is None:
        columns = ", ".join(repr(name[:40]) for name in list(row)[:_LISTED]) or "none"
        known = "; ".join(f"{each.name}: {each.marks}" for each in FORMATS)
        raise ValueError(f"a row of no known form; columns found: {columns}. The forms are known by ({known})")
    return found
