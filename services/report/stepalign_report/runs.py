"""Finished runs as ``stepalign compare`` reads them: their ``report.json``, checked.

Values of a problem, each a share between 0 and 1, for n graded samples of which c are right (n = k, the number of
samples, unless the grader failed on some):

=========  =========================================================================================
``avg``    c / n
``maj``    share of right answers among the most voted ones
``pass``   1 if c > 0, else 0: the unbiased estimator of Pass@n (``stepalign.scoring``) for n samples
``trace``  share of samples with every step right and the right answer; absent without a checker
=========  =========================================================================================

With n = 0 a problem has no value (NaN) and leaves the figures, as in ``stepalign.scoring``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from stepalign.errors import ConfigError
from stepalign_report.measures import METRICS, Metric, problem_values
from stepalign_run.fields import BASE, CHANCE
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.report import Figures, Marks, read_report, unreadable

AGREEMENT = 0.01
"""Percentage points by which a figure may be off the mean of its values by problem. Reports round to 0.0001."""

OPTIONAL = ("chance", "terms.critic")
"""Keys that not every run has: a run without one agrees with any."""

SHOWN = 16
"""Most characters of a value in a message; checksums are longer."""

Values = dict[Metric, tuple[float, ...]]


class _Evaluation(BaseModel):
    samples: Annotated[int, Field(ge=1)]


class _Terms(BaseModel):
    """The terms that a comparison reads itself; the others are only compared."""

    evaluation: _Evaluation
    steps: int


@dataclass(frozen=True)
class Run:
    """One run: an arm trained with a seed, and the test results of its selected checkpoint and of its base."""

    folder: Path
    name: str
    arm: str
    seed: int
    condition: dict[str, Any]
    """The arm's objective, context, scope and their settings."""
    terms: dict[str, Any]
    """Settings that must be equal for two runs to be compared."""
    samples: int
    """k: samples of each problem."""
    ids: dict[str, tuple[str, ...]]
    """Problem ids by split (``validation``, ``test``)."""
    validation: dict[int, float]
    """Avg@k on validation by step, percent."""
    selected_step: int
    test: Values
    """The selected checkpoint's values, one for each test problem."""
    base: Values
    """The base model's, sampled with this run's seed."""
    chance: dict[Metric, float] | None
    """Figures of a guesser, percent."""


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Read the reports of finished runs, in the given order. Raises ConfigError, as :func:`read_run` does."""
    return [read_run(Path(path)) for path in paths]


def read_run(folder: Path) -> Run:
    """Read one run's report.

    Raises ConfigError, which names the folder and the remedy, when there is no report, it cannot be read, its run
    has not made all its updates or has no evaluation, its parts do not agree with one another, or its checkpoint is
    not the one that validation picks.
    """
    report = read_report(RunFolder(folder))
    arm, evaluated = report.arm_name, report.evaluated
    if arm in (BASE, CHANCE):
        raise ConfigError(f"{folder}: an arm cannot be called {arm!r}, which names another row; rename its file")
    if evaluated is None:
        raise ConfigError(
            f"{folder}: the run has no evaluation; set data.validation and data.test and run it again to compare it"
        )
    try:
        terms = _Terms.model_validate(report.terms)
    except ValidationError as error:
        raise unreadable(RunFolder(folder).report, error, "terms.") from error
    if report.steps != terms.steps:
        raise ConfigError(
            f"{folder}: {report.steps} of {terms.steps} updates are made; continue the run with --resume, or leave it "
            "out"
        )
    k, marks = terms.evaluation.samples, evaluated.by_problem
    _check_agreement(folder, "base.test", evaluated.base.test, marks.base.test, marks.ids.test, k)
    _check_agreement(folder, f"arms.{arm}.test", evaluated.test, marks.test, marks.ids.test, k)
    for step, figures in evaluated.validation.items():
        if step not in marks.validation:
            raise _torn(folder, f"by_problem.validation has no step {step}")
        place = f"arms.{arm}.validation.{step}"
        _check_agreement(folder, place, figures, marks.validation[step], marks.ids.validation, k)
    run = Run(
        folder=folder,
        name=report.run,
        arm=arm,
        seed=report.seed,
        condition=report.arm.condition,
        terms=report.terms,
        samples=k,
        ids={"validation": tuple(marks.ids.validation), "test": tuple(marks.ids.test)},
        validation={step: figures[f"avg_at_{k}"] for step, figures in evaluated.validation.items()},
        selected_step=evaluated.selected_step,
        test=_values(marks.test, k),
        base=_values(marks.base.test, k),
        chance=_chance(folder, report.chance, k),
    )
    if not selection_is_argmax(run):
        raise ConfigError(
            f"{folder}: selected_step is {run.selected_step}, which is not the earliest step with the highest "
            f"Avg@{k} on validation; a checkpoint picked otherwise cannot be compared. Run `stepalign evaluate` and "
            "`stepalign report` again"
        )
    return run


def selection_is_argmax(run: Run) -> bool:
    """Whether the selected step is the earliest of those with the highest Avg@k on validation, as the report says."""
    return bool(run.validation) and run.selected_step == min(
        run.validation, key=lambda step: (-run.validation[step], step)
    )


def check_comparable(runs: Sequence[Run]) -> None:
    """Raises ConfigError, which names the folders, when two runs are of the same arm and seed, or when runs differ in
    their problems, their terms or their chance."""
    _check_distinct(runs)
    _check_same_problems(runs)
    _check_one_condition(runs)
    _check_same_terms(runs)


def _torn(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder}: its report does not agree with itself: {what}; write it again with `stepalign report`"
    )


def _values(marks: Marks, k: int) -> Values:
    of_problems = problem_values(marks, k)
    return {
        metric: tuple(math.nan if value is None else value for value in of_problems[metric])
        for metric in METRICS
        if metric in of_problems
    }


def _check_agreement(folder: Path, name: str, figures: Figures, marks: Marks, ids: list[str], k: int) -> None:
    """The lists have one entry for each problem, counts are possible, and the figures (percent) are their means."""
    for key, listed in marks:
        if listed is not None and len(listed) != len(ids):
            raise _torn(folder, f"{name} has {len(listed)} entries of {key} for {len(ids)} problems")
    graded = marks.graded if marks.graded is not None else [k] * len(ids)
    for counts, most in ((graded, [k] * len(ids)), (marks.correct, graded), (marks.trace_correct or [], graded)):
        if any(count > n for count, n in zip(counts, most, strict=False)):
            raise _torn(folder, f"{name} counts more samples of a problem than the {k} there are, or were graded")
    if not any(graded):
        raise ConfigError(f"{folder}: the grader failed on every sample of {name}; mend data.grader and run it again")
    if f"avg_at_{k}" not in figures:
        raise _torn(folder, f"{name} has no avg_at_{k}, though terms.evaluation.samples is {k}")
    for metric, values in _values(marks, k).items():
        known = [value for value in values if not math.isnan(value)]
        figure, mean = figures.get(f"{metric}_at_{k}"), 100.0 * sum(known) / len(known)
        if figure is not None and abs(figure - mean) > AGREEMENT:
            raise _torn(folder, f"{name}.{metric}_at_{k} is {figure:.2f}, its problems give {mean:.2f}")


def _chance(folder: Path, figures: Figures | None, k: int) -> dict[Metric, float] | None:
    if figures is None:
        return None
    found: dict[Metric, float] = {metric: figures[key] for metric in METRICS if (key := f"{metric}_at_{k}") in figures}
    if not found:
        raise _torn(folder, f"chance has no figure for {k} samples")
    return found


def _check_distinct(runs: Sequence[Run]) -> None:
    known: dict[tuple[str, int], Run] = {}
    for run in runs:
        first = known.setdefault((run.arm, run.seed), run)
        if first is not run:
            raise ConfigError(
                f"{first.folder} and {run.folder} are both of arm {run.arm}, seed {run.seed}; leave one of them out"
            )


def _check_same_problems(runs: Sequence[Run]) -> None:
    first = runs[0]
    for run in runs[1:]:
        for split, ids in run.ids.items():
            expected = first.ids[split]
            if ids == expected:
                continue
            at = next((i for i, (x, y) in enumerate(zip(expected, ids, strict=False)) if x != y), None)
            how = (
                f"{len(expected)} and {len(ids)} problems"
                if at is None
                else f"problem {at + 1} is {expected[at]!r} and {ids[at]!r}"
            )
            raise ConfigError(
                f"{first.folder} and {run.folder} were not evaluated on the same {split} problems in the same order "
                f"({how}); compare runs with the same data.{split}"
            )


def _check_one_condition(runs: Sequence[Run]) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        known = first.setdefault(run.arm, run)
        if run.condition != known.condition:
            raise ConfigError(
                f"{known.folder} and {run.folder} are both of an arm named {run.arm!r}, with different settings; give "
                "one of them another name, as a file of its own"
            )


def _check_same_terms(runs: Sequence[Run]) -> None:
    flat = {run.folder: _flat("terms", run.terms) for run in runs}
    for run in runs:
        if run.chance is not None:
            flat[run.folder] |= {f"chance.{metric}": value for metric, value in run.chance.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves}, key=lambda key: (key.startswith("chance"), key))
    differing = [said for key in keys if (said := _disagreement(key, flat))]
    if differing:
        raise ConfigError(
            f"these runs were not made on equal terms: {'; '.join(differing)}. Compare runs that differ in arm and "
            "seed only"
        )


def _flat(name: str, value: Any) -> dict[str, Any]:
    """Leaves by dotted name."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {key: leaf for part, inner in value.items() for key, leaf in _flat(f"{name}.{part}", inner).items()}


def _disagreement(key: str, flat: dict[Path, dict[str, Any]]) -> str | None:
    """``terms.batch: 32 in runs/a, 16 in runs/b``; None where all agree. See OPTIONAL."""
    folders: dict[str, list[Path]] = {}
    for folder, leaves in flat.items():
        if key in leaves:
            folders.setdefault(json.dumps(leaves[key], sort_keys=True), []).append(folder)
        elif not key.startswith(OPTIONAL):
            folders.setdefault("absent", []).append(folder)
    if len(folders) < 2:
        return None
    return f"{key}: " + ", ".join(_held(value, where) for value, where in folders.items())


def _held(value: str, folders: Sequence[Path]) -> str:
    """``32 in runs/a and 2 more``."""
    shown = value.strip('"')[:SHOWN]
    more = f" and {len(folders) - 1} more" if len(folders) > 1 else ""
    return f"{shown} in {folders[0]}{more}"
