"""A first reading with real weights: arms on SmolLM2-135M and sums, ``benchmarks/results/smollm2.json``.

    make bench-smollm2

The target converts the weights first. Interrupted, it continues where it was.
"""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.arms_benchmark import ROOT, ArmsBenchmark, run_as_program

ARMS = ("stepalign_scoped", "stepalign", "refsol", "grpo", "null")
BENCHMARK = ArmsBenchmark("smollm2", ROOT / "configs" / "sums.toml", ARMS)


def main(
    steps: int = typer.Option(8, help="Updates of every run: the budget."),
    seed: list[int] = typer.Option([0], help="Seeds."),
    arm: list[str] = typer.Option([], help="Arms; four and the control without it."),
    jobs: int = typer.Option(1, min=1, help="Runs at a time; each keeps about one core busy."),
    directory: Path = typer.Option(BENCHMARK.runs, help="Folder of the runs; a folder per budget."),
    only_report: bool = typer.Option(False, "--only-report", help="Start nothing; write what has ended so far."),
) -> None:
    BENCHMARK.carry_out(steps, seed, arm, jobs, directory, only_report=only_report)


if __name__ == "__main__":
    run_as_program(main)
