"""The data of the page, from the files of finished runs: the JSON inside ``report.html``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stepalign.errors import ConfigError
from stepalign_report.build import sum_counts
from stepalign_report.intervals import LEVEL, RESAMPLES
from stepalign_report.measures import METRICS, Estimate, Metric, Shares, estimate, problem_values
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.report import Evaluated, Figures, ProblemIds, Report, read_report

TOKEN_DIGITS, FIGURE_DIGITS = 4, 6
_K = re.compile(r"avg_at_(\d+)")
Where = Literal["base", "test"]


@dataclass(frozen=True)
class _Run:
    """One finished run: its report, its updates, and its token rows if it has any."""

    report: Report
    updates: list[dict[str, Any]]
    tokens: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.report.run

    @property
    def seed(self) -> int:
        return self.report.seed

    @property
    def arm(self) -> str:
        return self.report.arm_name

    @property
    def evaluated(self) -> Evaluated:
        """Raises ValueError for a run without an evaluation, which stands in no table and no curve."""
        found = self.report.evaluated
        if found is None:
            raise ValueError(f"run {self.name} has no evaluation")
        return found

    @property
    def ids(self) -> ProblemIds:
        return self.evaluated.by_problem.ids

    @property
    def samples(self) -> int:
        """k of Avg@k."""
        return next(int(found[1]) for key in self.evaluated.base.test if (found := _K.fullmatch(key)))

    def figures(self, where: Where) -> Figures:
        return self.evaluated.base.test if where == "base" else self.evaluated.test

    def marks(self, where: Where) -> dict[Metric, Shares]:
        """Values of the test problems: of the base, or of the selected checkpoint."""
        by_problem = self.evaluated.by_problem
        return problem_values(by_problem.base.test if where == "base" else by_problem.test, self.samples)

    def validation(self, step: int) -> dict[Metric, Shares]:
        """Values of the validation problems of a checkpoint."""
        return problem_values(self.evaluated.by_problem.validation[step], self.samples)


@dataclass(frozen=True)
class _Group:
    """The runs of one arm with one number of updates: its seeds."""

    label: str
    runs: list[_Run]


def page_data(
    folders: Sequence[Path], comparison: dict[str, Any] | None = None, quality: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that the page shows: runs, and a critic's ``quality`` (``critic_quality.json``), or it alone.

    Raises ConfigError when the folders hold no runs that can stand on one page.
    """
    runs = [_read_run(folder) for folder in folders]
    if not runs and quality is None:
        raise ConfigError("no run is given; give the folders of finished runs, as runs/demo")
    groups = _groups(runs)
    evaluated = [group for group in groups if group.runs[0].report.evaluated is not None]
    _check_evaluations(evaluated)
    names = [run.name for run in runs]
    return {
        "title": _title(names, quality),
        "runs": [_run_data(run, groups) for run in runs],
        "arms": [group.label for group in groups],
        "warnings": _differences_of_terms(runs),
        "samples": evaluated[0].runs[0].samples if evaluated else None,
        "problems": {
            "validation": len(evaluated[0].runs[0].ids.validation) if evaluated else 0,
            "test": len(evaluated[0].runs[0].ids.test) if evaluated else 0,
        },
        "resampling": {"resamples": RESAMPLES, "level": LEVEL},
        "results": _results(evaluated),
        "curves": [_curve(group) for group in evaluated],
        "differences": _plain(_differences(comparison or {}), FIGURE_DIGITS),
        "remarks": (comparison or {}).get("remarks", []),
        "quality": quality,
    }


def _title(names: Sequence[str], quality: dict[str, Any] | None) -> str:
    if not names and quality is not None:
        return f"stepalign · critic on {quality['data']['name']}"
    return f"stepalign · {names[0]}" if len(names) == 1 else f"stepalign · {len(names)} runs"


def _read_run(folder: Path) -> _Run:
    files = RunFolder(folder)
    return _Run(read_report(files), read_rows(files.metrics), read_rows(files.tokens))


def _groups(runs: Sequence[_Run]) -> list[_Group]:
    """Runs of the same arm and number of updates stand together; raises ConfigError when a seed is there twice."""
    members: dict[tuple[str, int], list[_Run]] = {}
    for run in runs:
        members.setdefault((run.arm, run.report.steps), []).append(run)
    budgets = Counter(arm for arm, _ in members)
    groups: list[_Group] = []
    for (arm, steps), together in members.items():
        if len({run.seed for run in together}) < len(together):
            names = ", ".join(run.name for run in together)
            raise ConfigError(f"arm {arm} is there twice with the same seed ({names}); leave one of the runs out")
        groups.append(_Group(arm if budgets[arm] == 1 else f"{arm}, {steps} updates", together))
    return groups


def _check_evaluations(groups: Sequence[_Group]) -> None:
    """All runs answer the same problems with as many samples: else their figures are no figures of one table."""
    runs = [run for group in groups for run in group.runs]
    for run in runs[1:]:
        first = runs[0]
        if run.samples != first.samples or run.ids != first.ids:
            raise ConfigError(
                f"runs {first.name!r} and {run.name!r} were evaluated on other problems or with another number of "
                "samples; write a page for each of them"
            )


def _differences_of_terms(runs: Sequence[_Run]) -> list[str]:
    """Names of terms that the runs do not share, with their values. Runs without a critic agree with any."""
    flat = [dict(_flatten(run.report.terms)) for run in runs]
    warnings: list[str] = []
    for name in sorted({name for terms in flat for name in terms}):
        known = [terms for terms in flat if name in terms or not name.startswith("critic.")]
        values = list(dict.fromkeys(str(terms.get(name, "–"))[:12] for terms in known))
        if len(values) > 1:
            warnings.append(f"{name}: {', '.join(values)}")
    return warnings


def _flatten(terms: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in terms.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _run_data(run: _Run, groups: Sequence[_Group]) -> dict[str, Any]:
    report = run.report
    return {
        "name": run.name,
        "arm": next(index for index, group in enumerate(groups) if any(run is other for other in group.runs)),
        "seed": run.seed,
        "steps": report.steps,
        **report.arm.model_dump(include={"objective", "context", "scope", "selected_step"}),
        **report.model_dump(
            mode="json",
            include={"rollouts", "critiques", "alarms", "wall_seconds", "threads", "versions", "evaluation"},
        ),
        "outcomes": sum_counts(run.updates, "outcomes"),
        "updates": _plain(_columns(run.updates), FIGURE_DIGITS),
        "tokens": [_plain(row, TOKEN_DIGITS) for row in run.tokens],
    }


def _columns(updates: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """The numbers of the updates, by name."""
    names = {name for row in updates for name, value in row.items() if isinstance(value, int | float)}
    return {name: [row.get(name) for row in updates] for name in sorted(names)}


def _results(groups: Sequence[_Group]) -> list[dict[str, Any]]:
    """Rows of the result table: base, chance, then each arm, and its seeds under it when there are several."""
    if not groups:
        return []
    every = [run for group in groups for run in group.runs]
    by_seed = list({run.seed: run for run in reversed(every)}.values())[::-1]
    rows = [_result("base", by_seed, "base")]
    chance = every[0].report.chance
    if chance is not None:
        figures = {
            key: {"value": chance[name]} for key in METRICS if (name := f"{key}_at_{every[0].samples}") in chance
        }
        rows.append({"kind": "chance", "arm": None, "seeds": [], "step": None, "mean_tokens": None, **figures})
    for index, group in enumerate(groups):
        rows.append(_result("arm", group.runs, "test", index))
        if len(group.runs) > 1:
            rows.extend(_result("seed", [run], "test", index) for run in group.runs)
    return rows


def _result(kind: str, runs: Sequence[_Run], where: Where, arm: int | None = None) -> dict[str, Any]:
    figures = [run.figures(where) for run in runs]
    return {
        "kind": kind,
        "arm": arm,
        "seeds": [run.seed for run in runs],
        "step": runs[0].evaluated.selected_step if kind != "base" and len(runs) == 1 else None,
        "mean_tokens": round(sum(each["mean_tokens"] for each in figures) / len(figures), 4),
        **_estimates([run.marks(where) for run in runs]),
    }


def _estimates(values: Sequence[dict[Metric, Shares]]) -> dict[Metric, Estimate | None]:
    """By measure, over seeds; a measure that some run does not have is left out."""
    shared: list[Metric] = [metric for metric in METRICS if all(metric in each for each in values)]
    return {metric: estimate([each[metric] for each in values]) for metric in shared}


def _curve(group: _Group) -> dict[str, Any]:
    """Validation figures of the steps that every seed of the arm has."""
    of_each = [set(run.evaluated.by_problem.validation) for run in group.runs]
    steps = sorted(set.intersection(*of_each))
    points = [_estimates([run.validation(step) for run in group.runs]) for step in steps]
    return {
        "label": group.label,
        "steps": steps,
        "selected": [{"seed": run.seed, "step": run.evaluated.selected_step} for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        **{metric: [point.get(metric) for point in points] for metric in METRICS},
    }


def _differences(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences of two arms, a row for each pair."""
    rows: list[dict[str, Any]] = []
    for pair in comparison.get("pairs", []):
        metrics = {
            metric: {"value": d["difference"], "low": d["lower"], "high": d["upper"], "apart": d["apart_from_0"]}
            for metric, d in pair["metrics"].items()
        }
        seeds = next((d["seeds"] for d in pair["metrics"].values() if d["seeds"]), [])
        head = {"a": pair["a"], "b": pair["b"], "headline": pair["headline"]}
        rows.append({**head, "seeds": seeds, "metrics": metrics})
    return rows


def _plain(value: Any, digits: int) -> Any:
    """The same with rounded numbers; one that is not finite becomes None, since JSON has no word for it."""
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, digits) for each in value]
    return value
