"""How well a probe's ranking of the arms agrees with finished runs of them.

    python -m benchmarks.probe_agreement runs/lab-probe runs/bench-lab/steps-100

Prints the scores beside the runs' figures, and Spearman's rank correlation of each metric.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.arms_benchmark import run_as_program
from stepalign.commands.terminal import Table, Terminal
from stepalign.errors import ConfigError
from stepalign_report.commands.probe import read_probe
from stepalign_report.measures import HEADING, METRICS, Metric
from stepalign_report.probe_tables import probe_table
from stepalign_report.runs import Run, check_comparable, read_runs
from stepalign_report.tables import NUMBER_OF_SEEDS
from stepalign_run.folder.layout import RunFolder
from stepalign_run.probing import ProbeReport

LEAST_ARMS = 3
"""With two arms a rank correlation is always 1 or −1."""


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks. None where all values of one are equal.

    Raises ValueError when the lengths differ.
    """
    a, b = ranks(x), ranks(y)
    centre = (len(a) + 1) / 2
    covariance = sum((p - centre) * (q - centre) for p, q in zip(a, b, strict=True))
    spread = math.sqrt(sum((p - centre) ** 2 for p in a) * sum((q - centre) ** 2 for q in b))
    return covariance / spread if spread else None


@dataclass(frozen=True)
class ArmOutcome:
    """An arm's score beside the results of its runs: test figures, percent, mean over seeds."""

    arm: str
    score: float
    seeds: tuple[int, ...]
    figures: dict[Metric, float]


@dataclass(frozen=True)
class Agreement:
    samples: int
    """k of Avg@k and the others."""
    arms: tuple[ArmOutcome, ...]
    """Best score first."""
    left_out: tuple[str, ...]
    """Arms with runs but without a score, or with a score but without runs."""
    correlations: dict[Metric, float | None]

    def as_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "arms": [
                {
                    "arm": arm.arm,
                    "score": arm.score,
                    "seeds": list(arm.seeds),
                    **{m: round(v, 4) for m, v in arm.figures.items()},
                }
                for arm in self.arms
            ],
            "left_out": list(self.left_out),
            "spearman": {metric: None if rho is None else round(rho, 4) for metric, rho in self.correlations.items()},
        }


def finished_below(folders: Iterable[Path]) -> list[Path]:
    """Each folder itself if it is of a finished run, else the finished runs right inside it.

    Raises ConfigError for a folder without any.
    """
    found: list[Path] = []
    for folder in folders:
        candidates = [folder, *sorted(folder.glob("*/"))]
        ended = [path for path in candidates if RunFolder(path).report.exists()]
        inside = ended[:1] if ended[:1] == [folder] else ended
        if not inside:
            raise ConfigError(f"{folder}: there is no finished run in it; give runs that have ended")
        found += inside
    return found


def agreement(report: ProbeReport, folders: Iterable[Path]) -> Agreement:
    """Set a probe's scores against finished runs.

    Raises ConfigError when runs cannot be compared with one another or with the probe (another base, problems, grader
    or sampling), or when fewer than three arms have both a score and a run.
    """
    runs = read_runs(finished_below(folders))
    check_comparable(runs)
    _check_terms(report, runs[0])
    by_arm: dict[str, list[Run]] = {}
    for run in runs:
        by_arm.setdefault(run.arm, []).append(run)
    scores = {arm.arm: arm.score.value for arm in report.arms if arm.score is not None}
    arms = tuple(_outcome(name, score, by_arm[name]) for name, score in scores.items() if name in by_arm)
    if len(arms) < LEAST_ARMS:
        raise ConfigError(
            f"{len(arms)} arm(s) have both a score and a finished run; a rank correlation needs {LEAST_ARMS}: give "
            "more runs, or probe more arms"
        )
    shared: list[Metric] = [metric for metric in METRICS if all(metric in arm.figures for arm in arms)]
    both = {arm.arm for arm in arms}
    return Agreement(
        samples=runs[0].samples,
        arms=arms,
        left_out=tuple(sorted((by_arm.keys() | {arm.arm for arm in report.arms}) - both)),
        correlations={m: spearman([arm.score for arm in arms], [arm.figures[m] for arm in arms]) for m in shared},
    )


def _check_terms(report: ProbeReport, run: Run) -> None:
    differing = [key for key, value in report.terms.items() if run.terms.get(key) != value]
    if differing:
        raise ConfigError(
            f"{run.folder} and the probe differ in {', '.join(differing)}; probe with the configuration of the runs"
        )


def _outcome(name: str, score: float, runs: Sequence[Run]) -> ArmOutcome:
    figures: dict[Metric, float] = {}
    for metric in METRICS:
        means = [_mean(run.test[metric]) for run in runs if metric in run.test]
        if means:
            figures[metric] = 100.0 * sum(means) / len(means)
    return ArmOutcome(name, score, tuple(sorted(run.seed for run in runs)), figures)


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def agreement_table(agreement: Agreement) -> Table:
    k = agreement.samples
    metrics = list(agreement.correlations)
    table = probe_table(
        "scores against finished runs",
        "arm",
        "score",
        NUMBER_OF_SEEDS,
        *(f"{HEADING[m]}@{k}" for m in METRICS if m in metrics),
    )
    for arm in agreement.arms:
        figures = (f"{arm.figures[metric]:.1f}" for metric in METRICS if metric in metrics)
        table.add_row(arm.arm, f"{arm.score:.3f}", str(len(arm.seeds)), *figures)
    table.add_section()
    correlations = (agreement.correlations[metric] for metric in METRICS if metric in metrics)
    found = ("–" if rho is None else f"{rho:+.2f}" for rho in correlations)
    table.add_row("Spearman's rank correlation", "", "", *found)
    return table


def main(
    probe: Annotated[Path, typer.Argument(metavar="PROBE_DIR", help="The folder of a probe.")],
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Finished runs, or folders of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    found = agreement(read_probe(probe), runs)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=1))
        return
    console = Terminal()
    console.print(agreement_table(found))
    if found.left_out:
        console.print(f"without a score or a finished run: {', '.join(found.left_out)}")


if __name__ == "__main__":
    run_as_program(main)
