"""Intervals of a paired difference over problems and seeds.

Source of the intervals: Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 386–411. For two arms
A and B, seeds s that both have (S of them) and test problems p (P of them), in percent:

    D[s, p] = 100 · (value of A − value of B),     difference = mean of D

Every seed is evaluated on the same problems: the two are crossed, not nested. So a resample draws S seeds and P
problems with replacement, independently, and takes the mean of D over the drawn rows and columns: a drawn problem is
drawn for every seed and for both arms, a drawn seed for both arms. The interval holds the middle 95 % of 10,000 such
means (percentile interval). The draws depend on S and P only, so an interval does not change when other runs are added.

Limits:

- With 3 to 5 seeds it is too narrow where seeds differ. Resampling S seeds sees (S − 1)/S of the variance between
  them, and no more than the range of their values: with 3 seeds and no other noise the interval goes from the worst
  seed to the best and holds the true difference in 75 % of cases (of a symmetric scatter), not 95 %. No bootstrap
  makes up for missing seeds.
- Noise of single cells (this problem with this seed) is counted (2 − 1/S)(2 − 1/P) − 1 times, which is 2.3 times for 3
  seeds and 60 problems. That widens the interval; it does not cancel the first point.
- With one seed it is over problems only and says nothing about another seed.
- Nothing is corrected for the number of pairs that are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 95.0
BOOTSTRAP_SEED = 0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean difference and its interval, in percentage points, rounded as reports are."""

    difference: float
    lower: float
    upper: float

    @property
    def apart_from_0(self) -> bool:
        return self.lower > 0 or self.upper < 0


class Bootstrap:
    """Crossed resamples of ``problems`` problems, the same for every interval.

    ``problems``: P. ``resamples``: R. Holds R × P numbers.
    """

    def __init__(self, problems: int, resamples: int = RESAMPLES) -> None:
        self.problems = problems
        self.resamples = resamples
        self._seed_draws: dict[int, Array] = {}

    @cached_property
    def _problem_draws(self) -> Array:
        return self._draws(self.problems, stream=0)

    def _draws(self, of: int, stream: int) -> Array:
        """``[R, of]``: how often each of ``of`` was drawn in each resample."""
        random = np.random.default_rng([BOOTSTRAP_SEED, stream, of])
        return random.multinomial(of, np.full(of, 1.0 / of), size=self.resamples).astype(np.float64)

    def means(self, differences: Array) -> Array:
        """``[R]``: the means of the resamples, for ``differences`` (``[S, P]``).

        NaN where a problem has no value: a mean is over the others. A resample without any other is left out.
        """
        seeds = differences.shape[0]
        if seeds not in self._seed_draws:
            self._seed_draws[seeds] = self._draws(seeds, stream=1)
        known = ~np.isnan(differences)

        def drawn(cells: Array) -> Array:
            return (self._seed_draws[seeds] * (self._problem_draws @ cells.T)).sum(axis=1)

        counts = drawn(known.astype(np.float64))
        sums = drawn(np.where(known, differences, 0.0))
        return sums[counts > 0] / counts[counts > 0]

    def sums(self, values: Array) -> Array:
        """``[R, …]``: the sums of the resamples, for ``values`` (``[P, …]``) that are sums over a problem's rows."""
        return self._problem_draws @ values

    def interval(self, differences: Array) -> Interval:
        """Mean and percentile interval of ``differences`` (``[S, P]``, shares, NaN as above), in percentage points."""
        lower, upper = middle(self.means(differences))
        found = (100.0 * float(value) for value in (np.nanmean(differences), lower, upper))
        return Interval(*(round(value, 4) + 0.0 for value in found))


def middle(resampled: Array) -> tuple[float, float]:
    """The ends of the percentile interval of resampled figures (``[R]``); resamples without one (NaN) are left out.

    Raises ValueError when none has one.
    """
    known = resampled[~np.isnan(resampled)]
    if not known.size:
        raise ValueError("no resample has a figure")
    tail = (100.0 - LEVEL) / 2
    lower, upper = np.percentile(known, [tail, 100.0 - tail])
    return float(lower), float(upper)
