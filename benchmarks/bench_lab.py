"""Compare every arm on the lab, over several seeds: ``benchmarks/results/lab.json`` and ``docs/results.md``.

    make bench-lab

Exits with 1 when a bound is missed or a run failed, after writing the files.
"""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.arms_benchmark import ROOT, ArmsBenchmark, run_as_program
from stepalign_run.config import shipped_arms

# Differences in points of Avg@12 that the paper reports; ours must not be smaller, and their intervals apart from 0.
BOUNDS = (("stepalign_scoped", "grpo", 16.11), ("stepalign_scoped", "refsol", 5.27))
BENCHMARK = ArmsBenchmark("lab", ROOT / "configs" / "lab.toml", shipped_arms(), BOUNDS)


def main(
    steps: int = typer.Option(100, help="Updates of every run: the budget."),
    seed: list[int] = typer.Option([0, 1, 2, 3, 4], help="Seeds."),
    arm: list[str] = typer.Option([], help="Arms; all that are shipped without it."),
    jobs: int = typer.Option(2, min=1, help="Runs at a time; each keeps about one core busy."),
    directory: Path = typer.Option(BENCHMARK.runs, help="Folder of the runs; a folder per budget."),
    only_report: bool = typer.Option(False, "--only-report", help="Start nothing; write what has ended so far."),
) -> None:
    BENCHMARK.carry_out(steps, seed, arm, jobs, directory, only_report=only_report)


if __name__ == "__main__":
    run_as_program(main)
