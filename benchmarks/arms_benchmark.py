"""A benchmark that runs arms × seeds of one configuration on equal terms and writes down how they compare.

Each run is ``stepalign run`` with its arm and seed: same problems in the same order, same number of rollouts, same
evaluation seeds, checkpoint picked on validation. Runs that have ended are kept, interrupted ones are continued: start
it again until all are done. The budget is part of the result, so figures of several budgets stand side by side in the
file of results.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.comparison_section import write_section
from stepalign.commands.terminal import Terminal
from stepalign.errors import StepalignError
from stepalign_launcher.campaign import Campaign, Member
from stepalign_report.commands.compare import show_comparison
from stepalign_report.comparison import Comparison
from stepalign_report.write import compare_into
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.report import Report, read_report

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "results.md"

_console = Console()


@dataclass(frozen=True)
class ArmsBenchmark:
    """``name`` is that of the make target, of the file of results and of the section of ``docs/results.md``."""

    name: str
    config: Path
    default_arms: Sequence[str]
    bounds: Sequence[tuple[str, str, float]] = ()
    """Differences ``(a, b, at least)`` in points of Avg@k; their intervals must lie apart from 0."""

    @property
    def results(self) -> Path:
        return ROOT / "benchmarks" / "results" / f"{self.name}.json"

    @property
    def runs(self) -> Path:
        return ROOT / "runs" / f"bench-{self.name}"

    def carry_out(
        self, steps: int, seeds: Sequence[int], arms: Sequence[str], jobs: int, directory: Path, *, only_report: bool
    ) -> None:
        """Run the missing runs, then compare. Raises typer.Exit when a bound is missed or a run failed."""
        overrides = ["--trainer.steps", str(steps)]
        campaign = Campaign(self.config, arms or self.default_arms, seeds, directory / f"steps-{steps}", overrides)
        failed = [] if only_report else run_all(campaign, jobs)
        comparison = compare_into(RunFolder(campaign.directory), campaign.ended())
        bounds = check_bounds(comparison, self.bounds)
        self.write_results(steps, comparison, campaign, bounds)
        write_section(DOCS, self.name, json.loads(self.results.read_text(encoding="utf-8")))
        show_comparison(Terminal(), comparison)
        for bound in bounds:
            verdict = "kept" if bound["kept"] else "missed"
            _console.print(f"{bound['what']}: {bound['value']}, at least {bound['at_least']}: {verdict}")
        if failed or not all(bound["kept"] for bound in bounds):
            for name in failed:
                _console.print(f"[red]failed:[/] {name}; its output: {campaign.directory / f'{name}.log'}")
            raise typer.Exit(1)

    def write_results(
        self, steps: int, comparison: Comparison, campaign: Campaign, bounds: list[dict[str, Any]]
    ) -> None:
        """Put this budget's figures into the file, beside those of others."""
        known: dict[str, Any] = (
            json.loads(self.results.read_text(encoding="utf-8")) if self.results.exists() else {"budgets": {}}
        )
        reports = [read_report(RunFolder(folder)) for folder in campaign.ended()]
        known["benchmark"] = self.name
        known["budgets"][str(steps)] = {
            "command": self._command(steps, reports),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()},
            "versions": reports[0].versions,
            "rollouts_per_run": steps * reports[0].terms["batch"],
            "bounds": bounds,
            "comparison": comparison.as_json(),
            "runs": [_of_run(report) for report in reports],
        }
        known["budgets"] = dict(sorted(known["budgets"].items(), key=lambda item: int(item[0])))
        replace_text(self.results, json.dumps(known, indent=1, ensure_ascii=False) + "\n")

    def _command(self, steps: int, reports: list[Report]) -> str:
        """The command that makes these runs again, and no others."""
        seeds = sorted({report.seed for report in reports})
        arms = sorted({report.arm_name for report in reports})
        chosen = [] if arms == sorted(self.default_arms) else [f"--arm {arm}" for arm in arms]
        words = [f"--steps {steps}", *(f"--seed {seed}" for seed in seeds), *chosen]
        return f"make bench-{self.name} ARGS='{' '.join(words)}'"


def run_all(campaign: Campaign, jobs: int) -> list[str]:
    """Run the unfinished runs, ``jobs`` at a time. Returns the names of those that failed; the others went on."""
    # The default would end this process alone, and its runs would go on unseen.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    campaign.directory.mkdir(parents=True, exist_ok=True)
    waiting = list(campaign.outstanding())
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                member = waiting.pop(0)
                running[member.name] = start(campaign, member)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                failed += [name] if code else []
                _console.print(f"{name}: {'failed' if code else 'done'}; {len(waiting) + len(running)} to go")
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def start(campaign: Campaign, member: Member) -> subprocess.Popen[bytes]:
    how = "--resume" if campaign.begun(member) else "--overwrite"
    # An arm that trains nothing is a result, too.
    options = [how, "--allow-untrained", *member.overrides]
    command = [sys.executable, "-m", "stepalign.cli", "run", str(campaign.config_path), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (campaign.directory / f"{member.name}.log").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def check_bounds(comparison: Comparison, wanted: Sequence[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """Every bound with both arms there, and whether it is kept."""
    found: list[dict[str, Any]] = []
    for a, b, least in wanted:
        pair = next((pair for pair in comparison.pairs if (pair.a, pair.b) == (a, b)), None)
        interval = None if pair is None else pair.differences["avg"].interval
        if interval is not None:
            found.append(
                {
                    "what": f"{a} − {b}, Avg@{comparison.samples}",
                    "value": interval.difference,
                    "interval": [interval.lower, interval.upper],
                    "at_least": least,
                    "kept": interval.difference >= least and interval.apart_from_0,
                }
            )
    return found


def _of_run(report: Report) -> dict[str, Any]:
    """The part of a run's report that the comparison does not hold."""
    k, validation = report.terms["evaluation"]["samples"], report.arm.validation or {}
    first = report.arm.first_update
    return {
        "arm": report.arm_name,
        "seed": report.seed,
        "selected_step": report.arm.selected_step,
        "validation": {str(step): figures[f"avg_at_{k}"] for step, figures in validation.items()},
        "first_update": None if first is None else first.model_dump(),
        **report.model_dump(mode="json", include={"rollouts", "critiques", "alarms", "wall_seconds"}),
    }


def run_as_program(main: Any) -> None:
    """A typed error becomes a line and exit code 1."""
    try:
        typer.run(main)
    except StepalignError as error:
        _console.print(f"[red]{Path(sys.argv[0]).stem}:[/] {error}", highlight=False)
        raise SystemExit(1) from None
