"""Figures of judged solutions, with bootstrap intervals over questions.

Source of F1: ProcessBench (Zheng et al. 2024, arXiv 2412.06559). With e over solutions that have a labelled error and c
over those that have none:

    accuracy on erroneous  A_e = mean over e of [called = label]
    accuracy on correct    A_c = mean over c of [called = none]
    F1                         = 2 · A_e · A_c / (A_e + A_c)

A failure is right in neither. Calibration, over the steps up to and including the labelled one (y = 1 there, 0 before),
with p = ``p_wrong``, the probability that the step is wrong given that those before it are right:

    Brier = mean of (p − y)²,     ECE = Σ_b n_b / n · |mean p in b − mean y in b|,  ten bins b of equal width

Intervals are those of :mod:`stepalign_report.intervals`: questions are drawn with replacement, and all solutions of a
question together. Two critics are compared on the same draws. Figures in percent, but for tokens, seconds, Brier, ECE
and ratios.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from stepalign_report.critic_quality.judged import NO_STEP, Judged
from stepalign_report.intervals import RESAMPLES, Array, Bootstrap, middle

BINS = 10
STEP_RANGES = ((1, 3), (4, 5), (6, 7), (8, 10), (11, None))
DIGITS = 4
THRESHOLDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, *(round(0.01 * i, 2) for i in range(1, 100)))
"""Weak models find nothing wrong with more than a hundredth."""
_MOST_DRAWS = 40_000_000
"""Numbers that a bootstrap may hold; of many questions there are fewer resamples."""
_FEWEST_RESAMPLES = 1_000


@lru_cache(maxsize=2)
def _bootstrap(questions: int) -> Bootstrap:
    return Bootstrap(questions, min(RESAMPLES, max(_FEWEST_RESAMPLES, _MOST_DRAWS // questions)))


class Sample:
    """Judged solutions and the resamples of their questions.

    A figure is an array ``[1 + R]``: the observed value, then that of each resample, NaN where there is none.
    """

    def __init__(self, judged: Sequence[Judged]) -> None:
        self.judged = list(judged)
        questions = list(dict.fromkeys(one.question for one in self.judged))
        place = {question: index for index, question in enumerate(questions)}
        self._place_N = np.array([place[one.question] for one in self.judged], dtype=np.intp)
        self._bootstrap = _bootstrap(len(questions))

    @property
    def questions(self) -> int:
        return self._bootstrap.problems

    @property
    def resamples(self) -> int:
        return self._bootstrap.resamples

    def totals(self, values_N: Sequence[float] | Array) -> Array:
        """``[1 + R]``: the sums of a value of each solution."""
        of_question: Array = np.zeros(self.questions)
        np.add.at(of_question, self._place_N, np.asarray(values_N, dtype=np.float64))
        return np.concatenate([[of_question.sum()], self._bootstrap.sums(of_question)])

    def mean(self, value: Callable[[Judged], float | None]) -> Array:
        """``[1 + R]``: the mean of a value over the solutions that have one."""
        found = [value(one) for one in self.judged]
        sums = self.totals([0.0 if each is None else each for each in found])
        return _over(sums, self.totals([float(each is not None) for each in found]))

    def of(self, includes: Callable[[Judged], bool]) -> Accuracies:
        """The accuracies of the solutions that are included."""
        return Accuracies(self, includes)


class Accuracies:
    """F1 and its parts over some solutions of a sample, as arrays ``[1 + R]`` of shares."""

    def __init__(self, sample: Sample, includes: Callable[[Judged], bool]) -> None:
        self.rows = [one for one in sample.judged if includes(one)]

        def mean(value: Callable[[Judged], float], among: Callable[[Judged], bool]) -> Array:
            return sample.mean(lambda one: value(one) if includes(one) and among(one) else None)

        def right(one: Judged) -> float:
            return float(one.is_right)

        self.on_erroneous = mean(right, _is_erroneous)
        self.on_correct = mean(right, lambda one: not _is_erroneous(one))
        self.f1 = f1(self.on_erroneous, self.on_correct)
        self.detected = mean(lambda one: float(_calls_wrong(one)), _is_erroneous)
        self.place = mean(right, lambda one: _is_erroneous(one) and _calls_wrong(one))
        self.valid = mean(lambda one: float(one.failure is None), lambda _: True)


def f1(on_erroneous: Array, on_correct: Array) -> Array:
    """The harmonic mean; 0 where both are 0, and NaN where either is."""
    total = on_erroneous + on_correct
    return 2 * on_erroneous * on_correct / np.where(total == 0, 1.0, total)


def at_threshold(sample: Sample, threshold: float) -> dict[str, Any]:
    """F1 and accuracies of a critic that knows no answer and calls the first ``p_wrong`` over ``threshold`` wrong."""

    def right(one: Judged) -> float:
        return float(one.is_right_over(threshold))

    on_erroneous = sample.mean(lambda one: right(one) if _is_erroneous(one) else None)
    on_correct = sample.mean(lambda one: None if _is_erroneous(one) else right(one))
    return {
        "threshold": threshold,
        "f1": percent(f1(on_erroneous, on_correct)),
        "on_erroneous": percent(on_erroneous),
        "on_correct": percent(on_correct),
    }


def best_threshold(judged: Sequence[Judged]) -> float | None:
    """The one of :data:`THRESHOLDS` with the highest F1 on these solutions; of equal ones the nearest to 0.5.

    None without probabilities, without a solution of either kind, and where no threshold finds an error.
    """
    erroneous = [one for one in judged if _is_erroneous(one)]
    correct = [one for one in judged if not _is_erroneous(one)]
    if not erroneous or not correct or not any(one.probabilities for one in judged):
        return None

    def share(among: Sequence[Judged], threshold: float) -> Array:
        return np.array([sum(one.is_right_over(threshold) for one in among) / len(among)], dtype=np.float64)

    def f1_over(threshold: float) -> float:
        return float(f1(share(erroneous, threshold), share(correct, threshold))[0])

    best = max(THRESHOLDS, key=lambda threshold: (f1_over(threshold), -abs(threshold - 0.5)))
    return best if f1_over(best) > 0 else None


def critic_figures(sample: Sample, *, knows_answers: bool = True) -> dict[str, Any]:
    """All figures of one critic. Of one that ``knows_answers``, they and no threshold decide about errors."""
    threshold = None if knows_answers else best_threshold(sample.judged)
    everything = sample.of(lambda _: True)
    return {
        **_counts(everything.rows),
        "questions": sample.questions,
        "resamples": sample.resamples,
        **_accuracies(everything),
        "detected": percent(everything.detected),
        "place_accuracy": percent(everything.place),
        "failures": dict(sorted(Counter(one.failure for one in sample.judged if one.failure is not None).items())),
        "prompt_tokens": estimate(sample.mean(lambda one: one.prompt_tokens)),
        "completion_tokens": estimate(sample.mean(lambda one: one.completion_tokens)),
        "seconds": estimate(sample.mean(lambda one: one.seconds)),
        "calibration": calibration(sample),
        "best_threshold": None if threshold is None else at_threshold(sample, threshold),
        "by_steps": _by_steps(sample),
        "by_generator": _by_generator(sample),
    }


def calibration(sample: Sample) -> dict[str, Any] | None:
    """Brier score, ECE and reliability bins of ``p_wrong``; None where the critic gives none."""
    if not any(one.probabilities for one in sample.judged):
        return None
    count, p, y = (np.zeros((len(sample.judged), BINS)) for _ in range(3))
    squares = np.zeros(len(sample.judged))
    for row, one in enumerate(sample.judged):
        for probability, is_wrong in one.probabilities:
            at = min(int(probability * BINS), BINS - 1)
            count[row, at] += 1
            p[row, at] += probability
            y[row, at] += is_wrong
            squares[row] += (probability - is_wrong) ** 2
    count_RB, p_RB, y_RB = (np.stack([sample.totals(part) for part in table.T], axis=1) for table in (count, p, y))
    total = count_RB.sum(axis=1)
    return {
        "solutions": sum(bool(one.probabilities) for one in sample.judged),
        "steps": int(total[0]),
        "ece": estimate(_over(np.abs(p_RB - y_RB).sum(axis=1), total)),
        "brier": estimate(_over(sample.totals(squares), total)),
        "bins": [_bin(at, count_RB[0, at], p_RB[0, at], y_RB[0, at]) for at in range(BINS)],
    }


def comparison_figures(a: Sequence[Judged], b: Sequence[Judged]) -> dict[str, Any]:
    """A beside B on the solutions that both have answered: differences A − B in percentage points, and the ratio of F1.

    Raises ValueError when they have none in common.
    """
    of_b = {one.id: one for one in b}
    pairs = [(one, of_b[one.id]) for one in a if one.id in of_b]
    if not pairs:
        raise ValueError("the two critics have answered no solution in common")
    sample_a, sample_b = (Sample([pair[side] for pair in pairs]) for side in (0, 1))
    of_a, of_b_ = sample_a.of(lambda _: True), sample_b.of(lambda _: True)
    return {
        "rows": len(pairs),
        "questions": sample_a.questions,
        "f1_difference": percent(of_a.f1 - of_b_.f1),
        "f1_ratio": estimate(_over(of_a.f1, of_b_.f1)),
        "on_erroneous_difference": percent(of_a.on_erroneous - of_b_.on_erroneous),
        "on_correct_difference": percent(of_a.on_correct - of_b_.on_correct),
        "valid_difference": percent(of_a.valid - of_b_.valid),
    }


def percent(values: Array) -> dict[str, float] | None:
    """:func:`estimate` of shares, in percent."""
    return estimate(100.0 * values)


def estimate(values: Array) -> dict[str, float] | None:
    """Value and ends of the interval of a figure ``[1 + R]``; None where it has no value."""
    if np.isnan(values[0]):
        return None
    low, high = middle(values[1:])
    found = {"value": float(values[0]), "low": low, "high": high}
    return {name: round(each, DIGITS) + 0.0 for name, each in found.items()}


def _is_erroneous(one: Judged) -> bool:
    return one.label != NO_STEP


def _calls_wrong(one: Judged) -> bool:
    return one.called is not None and one.called != NO_STEP


def _over(sums: Array, counts: Array) -> Array:
    """``sums / counts``, NaN where nothing is counted."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts != 0)


def _counts(rows: Sequence[Judged]) -> dict[str, int]:
    erroneous = sum(map(_is_erroneous, rows))
    return {"rows": len(rows), "erroneous": erroneous, "correct": len(rows) - erroneous}


def _accuracies(found: Accuracies) -> dict[str, Any]:
    return {
        "f1": percent(found.f1),
        "on_erroneous": percent(found.on_erroneous),
        "on_correct": percent(found.on_correct),
        "valid": percent(found.valid),
    }


def _group(name: str, found: Accuracies) -> dict[str, Any]:
    return {"name": name, **_counts(found.rows), **_accuracies(found)}


def _by_steps(sample: Sample) -> list[dict[str, Any]]:
    def within(low: int, high: int | None) -> Callable[[Judged], bool]:
        return lambda one: low <= one.steps and (high is None or one.steps <= high)

    groups = [
        _group(f"{low}–{high}" if high is not None else f"{low} or more", sample.of(within(low, high)))
        for low, high in STEP_RANGES
    ]
    return [group for group in groups if group["rows"]]


def _by_generator(sample: Sample) -> list[dict[str, Any]]:
    """Empty where no solution names the model that wrote it."""

    def by(name: str | None) -> Callable[[Judged], bool]:
        return lambda one: one.generator == name

    names = {one.generator for one in sample.judged}
    if names == {None}:
        return []
    ordered = sorted(names, key=lambda name: (name is None, name or ""))
    return [_group(name if name is not None else "not named", sample.of(by(name))) for name in ordered]


def _bin(at: int, count: float, p: float, y: float) -> dict[str, Any]:
    return {
        "low": at / BINS,
        "high": (at + 1) / BINS,
        "steps": int(count),
        "mean_p_wrong": round(p / count, DIGITS) if count else None,
        "share_wrong": round(y / count, DIGITS) if count else None,
    }
