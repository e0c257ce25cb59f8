"""``stepalign report``: the report of one run."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.text import Text

from stepalign.commands.terminal import Terminal
from stepalign.errors import ConfigError
from stepalign_report.progress import RunProgress, result_table, summary_table
from stepalign_report.state import read_state
from stepalign_report.write import ensure_page, finish_report
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import Config, load_config
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.report import Report
from stepalign_run.folder.stored import newest_report, stored_report
from stepalign_run.queue import redis_url

FOLLOW_SECONDS = 1.0


def report(
    ctx: typer.Context,
    config: ConfigPath,
    follow: Annotated[bool, typer.Option("--follow", help="Show the run's figures until it ends.")] = False,
    brief: Annotated[bool, typer.Option("--brief", help="One line in place of the tables.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
) -> None:
    """Print the report of a run, and write it once the run has ended."""
    settings = load_config(config, ctx.args)
    settings.own_folder.require_place()
    console = Terminal(stderr=as_json)
    with _ended_in_order():
        found = stored_report(settings)
        if found is None and not follow:
            found = _report_with_other_settings(settings, console)
        if found is None or follow:
            found = _await_report(settings, console, follow=follow)
        ensure_page(settings.folder)
    if as_json:
        typer.echo(found.as_json(), nl=False)
    elif brief:
        console.print(f"  {found.arm_name}: done in {found.wall_seconds:.0f} s")
    else:
        _show(console, settings, found)


def _report_with_other_settings(settings: Config, console: Terminal) -> Report | None:
    """The report of a run of the local stack that has ended with another number of updates than is asked for.

    Its server is gone and nobody works on it, so its report is the last word: only the command line lacks what the run
    was given.
    """
    if redis_url(settings.queue) is not None or settings.folder.redis_url.exists():
        return None
    report = newest_report(settings)
    if report is None or report.steps != report.terms["steps"]:
        return None
    console.print(f"this run was started with trainer.steps {report.steps}, not {settings.trainer.steps}")
    return report


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: the progress leaves the terminal as it was."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _await_report(settings: Config, console: Terminal, *, follow: bool) -> Report:
    """The report of a run that has ended, written to its folder. Raises ConfigError before the end without follow."""
    state = asyncio.run(read_state(settings))
    if not state.finished and not follow:
        done = len(read_rows(settings.folder.metrics))
        how_far = f"{done} of {settings.trainer.steps} updates are done"
        if settings.data.validation is not None and settings.data.test is not None:
            how_far += " and its evaluation is not complete"
        raise ConfigError(f"run {settings.run.name!r} has not ended: {how_far}; --follow waits for the end")
    with RunProgress(settings, console) as progress:
        while not state.finished:
            progress.watch()
            time.sleep(FOLLOW_SECONDS)
            state = asyncio.run(read_state(settings))
        if follow:
            progress.watch()
    return finish_report(settings, state.queue, state.ended_at - state.started_at, state.threads)


def _show(console: Terminal, config: Config, report: Report) -> None:
    console.print(summary_table(report))
    if report.rollouts.published and not report.rollouts.trained:
        reason = " every rollout was skipped, for the reasons in the table"
        console.print(Text.assemble(("nothing was trained:", "bold red"), reason))
    if report.evaluated is not None:
        console.print(result_table(report, report.evaluated))
    page = config.folder.page
    console.print(f"report: {page} ({report.wall_seconds:.0f} s)", soft_wrap=True)
