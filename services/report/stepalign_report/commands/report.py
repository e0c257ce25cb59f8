"""``stepalign report``."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stepalign.errors import ConfigError
from stepalign_report.build import (
    METRICS,
    PAGE,
    read_rows,
    read_state,
    stored_report,
)
from stepalign_report.progress import RunProgress, result_table, summary_table
from stepalign_report.write import ensure_page, finish_report
from stepalign_run.config import Config, load_config

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; override with --section.key value.")]
FOLLOW_SECONDS = 1.0


def report(
    ctx: typer.Context,
    config: ConfigPath,
    follow: Annotated[bool, typer.Option("--follow", help="Show the run's figures until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
) -> None:
    """Print the report of a run, and write it where the processes were started one by one, as Docker Compose does."""
    settings = load_config(config, ctx.args)
    console = Console(stderr=as_json)
    content = stored_report(settings)
    if content is None or follow:
        content = _await_report(settings, console, follow=follow)
    ensure_page(settings)
    if as_json:
        typer.echo(json.dumps(content, indent=1, sort_keys=True))
    else:
        _show(console, settings, content)


def _await_report(settings: Config, console: Console, *, follow: bool) -> dict[str, Any]:
    """The report of a run that has ended, written to its folder. Raises ConfigError before the end without follow."""
    state = asyncio.run(read_state(settings))
    if not state.finished and not follow:
        how_far = f"{len(read_rows(settings.run_dir / METRICS))} of {settings.trainer.steps} updates are done"
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


def _show(console: Console, config: Config, report: dict[str, Any]) -> None:
    console.print(summary_table(config, report))
    if report["rollouts"]["published"] and not report["rollouts"]["trained"]:
        console.print("[bold red]nothing was trained:[/] every rollout was skipped, for the reasons in the table")
    if "base" in report:
        console.print(result_table(config, report))
    console.print(f"report: {config.run_dir / PAGE} ({report['wall_seconds']:.0f} s)", highlight=False)
