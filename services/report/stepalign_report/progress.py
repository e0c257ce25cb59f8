"""Live progress of a run in the terminal, read from the files that its processes write."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from stepalign.commands.printable import printable
from stepalign.commands.terminal import Table, Terminal
from stepalign_report.build import sum_counts
from stepalign_report.measures import HEADING, METRICS
from stepalign_run.config import Config
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.report import Evaluated, Report


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _critiques(updates: list[dict[str, Any]]) -> str:
    """The critiques of these updates by outcome, which say why rollouts are not trained; empty without any."""
    outcomes = sum_counts(updates, "critiques")
    return (
        printable("critiques: " + ", ".join(f"{name} {count}" for name, count in outcomes.items())) if outcomes else ""
    )


class RunProgress:
    """A progress bar, the last update's figures and the validation curve; one line a checkpoint without a terminal."""

    def __init__(self, config: Config, console: Terminal) -> None:
        self.config = config
        self.folder = config.folder
        self.console = console
        self.updates: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.printed = 0
        self.printed_updates = 0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.bar.add_task("starting processes", total=config.trainer.steps)
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> RunProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.live.stop()

    def watch(self) -> None:
        """Read the run's rows anew."""
        self.updates = read_rows(self.folder.metrics)
        # A resumed run may ask for another number of samples than an earlier session, whose rows are scored anew.
        scored = f"avg_at_{self.config.evaluation.samples}"
        self.evaluations = [row for row in read_rows(self.folder.evaluations) if scored in row["figures"]]
        description = "training" if self.updates else "starting processes"
        if len(self.updates) == self.config.trainer.steps:
            description = "evaluating" if self.config.data.test is not None else "finishing"
        self.bar.update(self.task, completed=len(self.updates), description=description)
        for row in self.evaluations[self.printed :]:
            self.console.print(self._evaluation_line(row), soft_wrap=True)
        self.printed = len(self.evaluations)
        if not self.console.is_terminal:
            self._print_updates()

    def _print_updates(self) -> None:
        """A line every tenth of the run, for logs."""
        every = max(1, self.config.trainer.steps // 10)
        for row in self.updates[self.printed_updates :]:
            if row["step"] % every == 0:
                critiques = _critiques([row])
                self.console.print(
                    f"  {'update':>10} · step {row['step']:>4} · loss {_figure(row['loss'], 4)} · "
                    f"{row['trained_rollouts']} of {row['rollouts']} rollouts trained"
                    + (f" · {critiques}" if critiques else ""),
                    soft_wrap=True,
                )
        self.printed_updates = len(self.updates)

    def _evaluation_line(self, row: dict[str, Any]) -> str:
        k = self.config.evaluation.samples
        figures = row["figures"]
        return (
            f"  {row['split']:>10} · step {row['step']:>4} · Avg@{k} {figures[f'avg_at_{k}']:6.2f} · "
            f"Maj@{k} {figures[f'maj_at_{k}']:6.2f} · Pass@{k} {figures[f'pass_at_{k}']:6.2f}"
        )

    def _render(self) -> Group:
        return Group(self.bar, *(Text(line) for line in self._last_figures()))

    def _last_figures(self) -> list[str]:
        if not self.updates:
            return []
        last = self.updates[-1]
        critiques = _critiques(self.updates)
        rollouts = f"rollouts {sum(row['rollouts'] for row in self.updates)}"
        return [
            f"loss {_figure(last['loss'], 4)} · entropy {_figure(last['entropy'], 3)} · "
            f"mean tokens {_figure(last['mean_tokens'], 1)}",
            f"advantage: correct {_figure(last['advantage_correct'])}, error {_figure(last['advantage_at_error'])}",
            f"{rollouts} · {critiques}" if critiques else rollouts,
        ]


def result_table(report: Report, evaluated: Evaluated) -> Table:
    """Base against trained on the test problems."""
    k = report.terms["evaluation"]["samples"]
    base, test = evaluated.base.test, evaluated.test
    table = Table(f"{base['problems']} test problems, {k} samples each, seed {report.seed}")
    rows = [("base", base), (f"{report.arm_name} (step {evaluated.selected_step})", test)]
    if report.chance is not None:
        rows.insert(0, ("chance", report.chance))
    figures = {f"{HEADING[metric]}@{k}": f"{metric}_at_{k}" for metric in METRICS if f"{metric}_at_{k}" in test}
    figures["mean tokens"] = "mean_tokens"
    for heading in ("", *figures):
        table.add_column(heading, number=bool(heading))
    for name, values in rows:
        table.add_row(name, *(_figure(values.get(key), 1) for key in figures.values()))
    return table


def summary_table(report: Report) -> Table:
    """Outcomes of the rollouts and of the critiques, by number."""
    table = Table(f"run {report.run}: {report.steps} updates")
    table.add_column("what")
    table.add_column("count", number=True)
    rollouts = report.rollouts
    table.add_row("rollouts published", str(rollouts.published))
    table.add_row("  trained on", str(rollouts.trained))
    for reason, count in rollouts.skipped.items():
        table.add_row(f"  skipped: {reason}", str(count))
    for name, count in (("stale", rollouts.stale), ("dead", rollouts.dead), ("pending", rollouts.pending)):
        table.add_row(f"  {name}", str(count))
    for outcome, count in report.critiques.items():
        table.add_row(f"critiques: {outcome}", str(count))
    for name, alarm in report.alarms.items():
        said = Text.assemble((f"alarm: {name}", "bold red"), f", first at update {alarm.first_step}")
        table.add_row(said, str(alarm.updates))
    return table
