"""Means over problems and seeds with intervals, for the page: those of :mod:`stepalign_report.intervals`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypedDict, get_args

import numpy as np

from stepalign_report.intervals import Bootstrap
from stepalign_run.folder.report import Marks

Metric = Literal["avg", "maj", "pass", "trace"]
METRICS: tuple[Metric, ...] = get_args(Metric)
HEADING: dict[Metric, str] = {"avg": "Avg", "maj": "Maj", "pass": "Pass", "trace": "Trace"}
"""Names in tables, to which ``@k`` is added."""

Shares = list[float | None]


class Estimate(TypedDict):
    """A mean and the ends of its interval, in percent."""

    value: float
    low: float
    high: float


def problem_values(marks: Marks, samples: int) -> dict[Metric, Shares]:
    """Shares of each problem by measure; None where no sample could be graded.

    ``trace`` is there only when an exact checker read the traces.
    """
    correct, traces = marks.correct, marks.trace_correct
    graded = marks.graded if marks.graded is not None else [samples] * len(correct)
    values: dict[Metric, Shares] = {
        "avg": [right / n if n else None for right, n in zip(correct, graded, strict=True)],
        "maj": [share if n else None for share, n in zip(marks.majority, graded, strict=True)],
        "pass": [float(right > 0) if n else None for right, n in zip(correct, graded, strict=True)],
    }
    if traces is not None:
        values["trace"] = [right / n if n else None for right, n in zip(traces, graded, strict=True)]
    return values


def estimate(values_SP: Sequence[Shares]) -> Estimate | None:
    """The mean of values with a row for each seed and a column for each problem; None when there is none at all."""
    values = np.array(values_SP, dtype=np.float64)
    if np.isnan(values).all():
        return None
    found = _bootstrap(values.shape[1]).interval(values)
    return {"value": found.difference, "low": found.lower, "high": found.upper}


@lru_cache(maxsize=2)
def _bootstrap(problems: int) -> Bootstrap:
    return Bootstrap(problems)
