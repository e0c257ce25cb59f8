"""How the arms of finished runs compare: means over seeds, and paired intervals over problems and seeds.

A difference of two arms uses the seeds that both have and the problems, which are the same for all. The intervals, and
their limits, are those of :mod:`stepalign_report.intervals`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stepalign.errors import ConfigError
from stepalign_report.intervals import BOOTSTRAP_SEED, LEVEL, RESAMPLES, Array, Bootstrap, Interval
from stepalign_report.measures import METRICS, Metric
from stepalign_report.runs import (
    BASE,
    Run,
    Values,
    check_comparable,
    read_runs,
    selection_is_argmax,
)
from stepalign_run.config import TableSection, shipped_tables
from stepalign_run.config.arm import ComparandsSection
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.outputs import require_own_file

__all__ = [
    "HEADLINES",
    "Arm",
    "Comparison",
    "Difference",
    "compare",
    "read_runs",
    "selection_is_argmax",
    "write_comparison",
]

_PLACES = shipped_tables()


def _rank(arm: str) -> tuple[int, str]:
    """Order of rows, and which arm is A in A − B. Arms that are not shipped follow, by name."""
    return _PLACES.get(arm, TableSection()).rank, arm


def _headlines() -> tuple[tuple[str, str], ...]:
    """Question by question, and under each in the order of the arms that name their comparands."""
    named = [
        (arm, other)
        for question in ComparandsSection.model_fields
        for arm in sorted(_PLACES, key=_rank)
        for other in getattr(_PLACES[arm].against, question)
    ]
    return tuple((a, b) if _rank(a) < _rank(b) else (b, a) for a, b in named)


HEADLINES = _headlines()
"""The differences A − B that are shown first. A stands before B in the order of arms."""

BySeed = dict[int, Array]
"""Values of the test problems (``[P]``, shares) for each seed."""


@dataclass(frozen=True)
class Difference:
    """A − B in one metric, over the seeds that both have."""

    a: str
    b: str
    metric: Metric
    seeds: tuple[int, ...]
    interval: Interval | None
    """None where no seed is common: not comparable."""

    @property
    def over(self) -> str | None:
        """The units that the interval resamples."""
        return None if not self.seeds else "problems" if len(self.seeds) == 1 else "problems and seeds"

    def as_json(self) -> dict[str, Any]:
        interval = self.interval
        return {
            "seeds": list(self.seeds),
            "difference": interval and interval.difference,
            "lower": interval and interval.lower,
            "upper": interval and interval.upper,
            "apart_from_0": interval and interval.apart_from_0,
            "over": self.over,
        }


@dataclass(frozen=True)
class Pair:
    """Two arms, and A − B in every metric that both have."""

    a: str
    b: str
    headline: bool
    differences: dict[Metric, Difference]

    def as_json(self) -> dict[str, Any]:
        found = {metric: difference.as_json() for metric, difference in self.differences.items()}
        return {"a": self.a, "b": self.b, "headline": self.headline, "metrics": found}


@dataclass(frozen=True)
class Arm:
    """An arm's figures on the test problems, percent, by metric and seed. The base model is one too."""

    name: str
    by_seed: dict[Metric, dict[int, float]]
    selected_steps: dict[int, int]
    """The checkpoint of each seed; empty for the base."""

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.by_seed["avg"])

    def mean(self, metric: Metric) -> float | None:
        """Mean over the seeds that have this metric; None where none has."""
        figures = self.by_seed.get(metric)
        return round(sum(figures.values()) / len(figures), 4) if figures else None

    def as_json(self) -> dict[str, Any]:
        figures = {
            metric: {"mean": self.mean(metric), "by_seed": {str(s): round(v, 4) for s, v in found.items()}}
            for metric, found in self.by_seed.items()
        }
        steps = {str(seed): step for seed, step in self.selected_steps.items()}
        return {"arm": self.name, "seeds": list(self.seeds), "selected_steps": steps, "figures": figures}


@dataclass(frozen=True)
class Comparison:
    """All figures; ``comparison_tables`` chooses the ones to show."""

    samples: int
    problems: int
    terms: dict[str, Any]
    runs: tuple[tuple[str, str, int], ...]
    """Name, arm and seed of each run."""
    base: Arm
    arms: tuple[Arm, ...]
    chance: dict[Metric, float] | None
    pairs: tuple[Pair, ...]
    """Headlines first, in their order; then every other pair, in the order of arms."""
    against_base: tuple[Pair, ...]
    uneven_bases: tuple[int, ...]
    """Seeds with runs that differ in the base's figures: it was sampled on other machines or threads."""
    resamples: int

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.base.seeds

    @property
    def remarks(self) -> tuple[str, ...]:
        """Caveats of the figures, one line each."""
        found: list[str] = []
        lonely = [arm.name for arm in self.arms if len(arm.seeds) == 1]
        if len(self.seeds) == 1:
            found.append(
                f"seed {self.seeds[0]} only: one seed proves nothing about an arm; the intervals are over problems only"
            )
        elif lonely:
            found.append(
                f"one seed only of {', '.join(lonely)}: one seed proves nothing about an arm; intervals with it are "
                "over problems only"
            )
        if self.uneven_bases:
            found.append(
                f"the base's samples are not the same in all runs of seed {', '.join(map(str, self.uneven_bases))} "
                "(another machine or number of threads); their mean is taken"
            )
        for pair in self.pairs:
            if not pair.differences["avg"].seeds:
                found.append(f"{pair.a} and {pair.b} have no seed in common: not comparable")
        return tuple(found)

    def as_json(self) -> dict[str, Any]:
        """Everything, all metrics and pairs. Figures in percent, differences in percentage points."""
        return {
            "samples": self.samples,
            "problems": self.problems,
            "seeds": list(self.seeds),
            "runs": [{"run": name, "arm": arm, "seed": seed} for name, arm, seed in self.runs],
            "terms": self.terms,
            "bootstrap": {"resamples": self.resamples, "level": LEVEL, "seed": BOOTSTRAP_SEED},
            "base": self.base.as_json(),
            "arms": [arm.as_json() for arm in self.arms],
            "chance": dict(self.chance) if self.chance is not None else None,
            "pairs": [pair.as_json() for pair in self.pairs],
            "against_base": [pair.as_json() for pair in self.against_base],
            "remarks": list(self.remarks),
        }


def compare(runs: Iterable[Run], *, resamples: int = RESAMPLES) -> Comparison:
    """Compare runs; their order has no influence.

    Raises ConfigError, which names the folders, when there is no run, two are of the same arm and seed, or runs differ
    in their problems, their terms or their chance.
    """
    ordered = sorted(runs, key=lambda run: (_rank(run.arm), run.seed))
    if not ordered:
        raise ConfigError("there is no run to compare; give the folders of runs that have ended")
    check_comparable(ordered)

    names = list(dict.fromkeys(run.arm for run in ordered))
    values: dict[str, dict[Metric, BySeed]] = {
        arm: _by_metric({run.seed: [run.test] for run in ordered if run.arm == arm}) for arm in names
    }
    seeds = sorted({run.seed for run in ordered})
    values[BASE] = _by_metric({seed: [run.base for run in ordered if run.seed == seed] for seed in seeds})

    bootstrap = Bootstrap(len(ordered[0].ids["test"]), resamples)
    present = [pair for pair in HEADLINES if set(pair) <= set(names)]
    others = [(a, b) for a, b in combinations(names, 2) if (a, b) not in present]
    steps = {arm: {run.seed: run.selected_step for run in ordered if run.arm == arm} for arm in names}

    def arm(name: str) -> Arm:
        means: dict[Metric, dict[int, float]] = {
            metric: {seed: 100.0 * float(np.nanmean(found)) for seed, found in by_seed.items()}
            for metric, by_seed in values[name].items()
        }
        return Arm(name, means, steps.get(name, {}))

    def pair(a: str, b: str) -> Pair:
        return Pair(a, b, (a, b) in HEADLINES, _differences(a, b, values, bootstrap))

    return Comparison(
        samples=ordered[0].samples,
        problems=bootstrap.problems,
        terms=ordered[0].terms,
        runs=tuple((run.name, run.arm, run.seed) for run in ordered),
        base=arm(BASE),
        arms=tuple(arm(name) for name in names),
        chance=next((run.chance for run in ordered if run.chance is not None), None),
        pairs=tuple(pair(a, b) for a, b in [*present, *others]),
        against_base=tuple(pair(name, BASE) for name in names),
        uneven_bases=tuple(seed for seed in seeds if _differ([run.base for run in ordered if run.seed == seed])),
        resamples=resamples,
    )


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write the file. Raises NotOursError as :func:`require_own_comparison`."""
    require_own_comparison(path)
    replace_text(path, comparison_json(comparison))


def require_own_comparison(path: Path) -> None:
    """Raises NotOursError when a file is there that is no comparison of ours."""
    require_own_file(path, _is_comparison, "move it away, or give another folder")


def _is_comparison(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"runs", "arms", "pairs", "against_base", "bootstrap"} <= found.keys()


def comparison_json(comparison: Comparison) -> str:
    """The file's text, with a stable order."""
    return json.dumps(comparison.as_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _by_metric(found: dict[int, list[Values]]) -> dict[Metric, BySeed]:
    """Values by metric and seed, over the seeds that have the metric. Several runs of a seed are averaged: their bases
    are the same model sampled with the same seed, and differ at most in rounding between machines."""
    by_metric: dict[Metric, BySeed] = {
        metric: {
            seed: np.mean([values[metric] for values in runs], axis=0)
            for seed, runs in found.items()
            if all(metric in values for values in runs)
        }
        for metric in METRICS
    }
    return {metric: by_seed for metric, by_seed in by_metric.items() if by_seed}


def _differ(bases: list[Values]) -> bool:
    return any(
        not np.array_equal(values[metric], bases[0][metric], equal_nan=True)
        for values in bases[1:]
        for metric in METRICS
        if metric in values and metric in bases[0]
    )


def _differences(
    a: str, b: str, values: dict[str, dict[Metric, BySeed]], bootstrap: Bootstrap
) -> dict[Metric, Difference]:
    found: dict[Metric, Difference] = {}
    for metric in METRICS:
        if metric not in values[a] or metric not in values[b]:
            continue
        of_a, of_b = values[a][metric], values[b][metric]
        paired = {seed: of_a[seed] - of_b[seed] for seed in sorted(of_a.keys() & of_b.keys())}
        seeds = tuple(seed for seed, cells in paired.items() if not np.isnan(cells).all())
        interval = bootstrap.interval(np.stack([paired[seed] for seed in seeds])) if seeds else None
        found[metric] = Difference(a, b, metric, seeds, interval)
    return found
