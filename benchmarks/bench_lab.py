"""Compare every arm on the lab, over several seeds, and write ``benchmarks/results/lab.json`` and ``docs/results.md``.

    python -m benchmarks.bench_lab

Each run is ``stepalign run configs/lab.toml`` with its arm and seed: same problems in the same order, same number of
rollouts, same evaluation seeds, checkpoint picked on validation. Runs that have ended are kept, interrupted ones are
continued: start it again until all are done. The budget is part of the result, so figures of several budgets
(``--steps``) stand side by side in the file.

Exits with 1 when a bound is missed or a run failed, after writing the files.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from benchmarks.lab_results import write_section
from stepalign.config import shipped_arms
from stepalign.errors import StepalignError
from stepalign_lab.campaign import Campaign, Member
from stepalign_lab.compare_command import show_comparison
from stepalign_lab.comparison import Comparison

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "lab.toml"
RESULTS = ROOT / "benchmarks" / "results" / "lab.json"
DOCS = ROOT / "docs" / "results.md"
RUNS = ROOT / "runs" / "bench-lab"
# Differences in points of Avg@12 that the paper reports; ours must not be smaller, and their intervals apart from 0.
BOUNDS = (("stepalign_scoped", "grpo", 16.11), ("stepalign_scoped", "refsol", 5.27))

_console = Console()


def main(
    steps: int = typer.Option(100, help="Updates of every run: the budget."),
    seed: list[int] = typer.Option([0, 1, 2, 3, 4], help="Seeds."),
    arm: list[str] = typer.Option([], help="Arms; all that are shipped without it."),
    jobs: int = typer.Option(2, min=1, help="Runs at a time; each keeps about one core busy."),
    directory: Path = typer.Option(RUNS, help="Folder of the runs; a folder per budget."),
    only_report: bool = typer.Option(False, "--only-report", help="Start nothing; write what has ended so far."),
) -> None:
    """Run what is missing, then compare."""
    campaign = Campaign(
        CONFIG, arm or shipped_arms(), seed, directory / f"steps-{steps}", ["--trainer.steps", str(steps)]
    )
    failed = [] if only_report else run_all(campaign, jobs)
    comparison = campaign.compare()
    bounds = check_bounds(comparison)
    write_results(steps, comparison, campaign, bounds)
    write_section(DOCS, json.loads(RESULTS.read_text(encoding="utf-8")))
    show_comparison(_console, comparison)
    for bound in bounds:
        _console.print(f"{bound['what']}: {bound['value']}, at least {bound['at_least']}: {_verdict(bound)}")
    if failed or not all(bound["kept"] for bound in bounds):
        for name in failed:
            _console.print(f"[red]failed:[/] {name}; its output: {campaign.directory / f'{name}.log'}")
        raise typer.Exit(1)


def _verdict(bound: dict[str, Any]) -> str:
    return "kept" if bound["kept"] else "missed"


def run_all(campaign: Campaign, jobs: int) -> list[str]:
    """Run what has not ended, ``jobs`` at a time. Returns the names of those that failed; the others went on."""
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
    command = [sys.executable, "-m", "stepalign.cli", "run", str(campaign.config_path), how, *member.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (campaign.directory / f"{member.name}.log").open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def check_bounds(comparison: Comparison) -> list[dict[str, Any]]:
    """The bounds whose arms are both there."""
    found: list[dict[str, Any]] = []
    for a, b, least in BOUNDS:
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


def write_results(steps: int, comparison: Comparison, campaign: Campaign, bounds: list[dict[str, Any]]) -> None:
    """Put this budget's figures into the file, beside those of others."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"budgets": {}}
    reports = [
        json.loads((campaign.config(member).run_dir / "report.json").read_text(encoding="utf-8"))
        for member in campaign.members
        if campaign.finished(member)
    ]
    known["benchmark"] = "lab"
    known["budgets"][str(steps)] = {
        "command": command_of(steps, reports),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "architecture": platform.machine()},
        "versions": reports[0]["versions"],
        "rollouts_per_run": steps * reports[0]["terms"]["batch"],
        "bounds": bounds,
        "comparison": comparison.as_json(),
        "runs": [_of_run(report) for report in reports],
    }
    known["budgets"] = dict(sorted(known["budgets"].items(), key=lambda item: int(item[0])))
    scratch = RESULTS.with_suffix(".tmp")
    scratch.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, RESULTS)


def command_of(steps: int, reports: list[dict[str, Any]]) -> str:
    """What makes these runs again, and no others."""
    seeds = sorted({report["seed"] for report in reports})
    arms = sorted({arm for report in reports for arm in report["arms"]})
    chosen = [] if arms == shipped_arms() else [f"--arm {arm}" for arm in arms]
    return f"make bench-lab ARGS='{' '.join([f'--steps {steps}', *(f'--seed {seed}' for seed in seeds), *chosen])}'"


def _of_run(report: dict[str, Any]) -> dict[str, Any]:
    """What the comparison does not hold of a run."""
    (name, arm), *_ = report["arms"].items()
    k = report["terms"]["evaluation"]["samples"]
    return {
        "arm": name,
        "seed": report["seed"],
        "selected_step": arm["selected_step"],
        "validation": {step: figures[f"avg_at_{k}"] for step, figures in arm["validation"].items()},
        "first_update": arm["first_update"],
        "rollouts": report["rollouts"],
        "critiques": report["critiques"],
        "alarms": report["alarms"],
        "wall_seconds": report["wall_seconds"],
    }


if __name__ == "__main__":
    try:
        typer.run(main)
    except StepalignError as error:
        _console.print(f"[red]bench-lab:[/] {error}", highlight=False)
        raise SystemExit(1) from None
