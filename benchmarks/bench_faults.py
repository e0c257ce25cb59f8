"""The fault matrix, many times: writes ``benchmarks/results/faults.json``.

    make bench-faults

Each repetition is a run of its own with real processes and a real Redis (AOF, synced every second), in which one thing
goes wrong at a moment that depends on the repetition (:mod:`benchmarks.faults.scenarios`). ``lost`` and
``trained_twice`` count rollouts over all of them, by an audit of the records of solver, trainer and queue.

Resumable: repetitions of the same code revision are kept. Exits with 1 when anything was lost, trained twice or
left unexplained.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import report
from benchmarks.errors import BenchError
from benchmarks.faults.run import ROOT, Outcome, UnfinishedError
from benchmarks.faults.scenarios import FULL_DISK, SCENARIOS, UNDISTURBED, Scenario

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
# A change elsewhere cannot touch a fault, so old repetitions stay valid.
_CODE = (
    "shared",
    "services/launcher",
    "services/solver",
    "services/critic",
    "trainer",
    "benchmarks/faults",
)
_console = Console()


def main(
    repetitions: int = typer.Option(20, min=1, help="Of each scenario."),
    output: Annotated[Path, report.output_option("faults")] = RESULTS,
) -> None:
    """Go through the matrix."""
    revision = _revision()
    known = _known(output, revision)
    machine = report.machine()
    undisturbed = _play(UNDISTURBED, 0)
    for repetition in range(repetitions):
        for scenario in _possible():
            rows = known.setdefault(scenario.name, [])
            if len(rows) <= repetition:
                rows.append(_row(scenario, repetition, undisturbed))
                _write(output, revision, machine, known)
    figures = _write(output, revision, machine, known)
    _console.print({name: figures[name] for name in ("runs", "without_an_end", "lost", "trained_twice", "violations")})
    if figures["violations"]:
        raise typer.Exit(1)


def _possible() -> list[Scenario]:
    mountable = platform.system() == "Linux" and os.getuid() == 0
    if not mountable:
        _console.print(f"left out, it needs root on Linux: {FULL_DISK.name}")
    return [scenario for scenario in SCENARIOS if mountable or scenario is not FULL_DISK]


def _play(scenario: Scenario, repetition: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="stepalign-fault-") as folder:
        return scenario.play(Path(folder) / "run", repetition)


def _row(scenario: Scenario, repetition: int, undisturbed: Outcome) -> dict[str, Any]:
    """The result of one repetition; a run that did not come to its end is a violation too."""
    try:
        outcome = _play(scenario, repetition)
    except BenchError as error:
        _console.print(f"[red]{escape(scenario.name)}[/red], {repetition}: {escape(str(error))}")
        left = error.audit if isinstance(error, UnfinishedError) else None
        lost = None if left is None else left.published - left.accounted
        return {"violations": [str(error), *(left.problems if left else ())], "lost": lost, "trained_twice": None}
    violations = scenario.violations(outcome, undisturbed)
    audit = outcome.audit
    said = "; ".join(violations) or "nothing lost, nothing trained twice"
    _console.print(f"{escape(scenario.name)}, {repetition}: {escape(said)} ({outcome.seconds:.0f} s)", highlight=False)
    return {
        "violations": violations,
        "lost": audit.published - audit.accounted,
        "trained_twice": outcome.twice,
        "audit": {name: value for name, value in asdict(audit).items() if name != "problems"},
        "restarts": outcome.restarts,
        "seconds": outcome.seconds,
    }


def _known(output: Path, revision: str) -> dict[str, list[dict[str, Any]]]:
    if not output.exists():
        return {}
    found = json.loads(output.read_text(encoding="utf-8"))
    return found["scenarios"] if found["revision"] == revision else {}


def _write(output: Path, revision: str, machine: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    rows = [row for of_scenario in known.values() for row in of_scenario]
    figures = {
        "benchmark": "faults",
        "command": "make bench-faults",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision,
        "runs": len(rows),
        "repetitions": {name: len(of_scenario) for name, of_scenario in known.items()},
        "without_an_end": sum(row["trained_twice"] is None for row in rows),
        "lost": sum(row["lost"] or 0 for row in rows),
        "trained_twice": sum(row["trained_twice"] or 0 for row in rows),
        "violations": sum(bool(row["violations"]) for row in rows),
        "machine": machine,
        "scenarios": known,
    }
    report.write(output, figures)
    return figures


def _revision() -> str:
    """A digest of the code that runs, committed or not."""
    listed = subprocess.run(["git", "ls-files", "-s", *_CODE], cwd=ROOT, capture_output=True, check=True).stdout
    changed = subprocess.run(["git", "diff", "HEAD", "--", *_CODE], cwd=ROOT, capture_output=True, check=True).stdout
    hashed = subprocess.run(
        ["git", "hash-object", "--stdin"], cwd=ROOT, input=listed + changed, capture_output=True, check=True
    )
    return hashed.stdout.decode().strip()


if __name__ == "__main__":
    typer.run(main)
