"""``stepalign queue …``: look at a run's queue."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from stepalign.config import Config, QueueSection, load_config
from stepalign.queue import open_queue, resolve_url
from stepalign.queue.base import QueueStatus

queue = typer.Typer(no_args_is_help=True, help="Look at the rollout queue of a run.")


@queue.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keeps ``status`` a sub-command while it is the only one."""


@queue.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def status(
    ctx: typer.Context,
    config: Path = typer.Argument(help="The run's TOML file; options such as --run.name NAME override it."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show how many rollouts are in the queue and what became of the others."""
    settings = load_config(config, ctx.args)
    report = asyncio.run(_read(settings))
    if as_json:
        print(json.dumps(_figures(report) | {"skipped": report.skipped, "balanced": report.balanced}))
    else:
        Console().print(_table(settings.run.name, report))


async def _read(config: Config) -> QueueStatus:
    section: QueueSection = config.queue.model_copy(update={"redis_url": resolve_url(config)})
    opened = open_queue(section, config.run.name, "status")
    try:
        return await opened.status()
    finally:
        await opened.close()


def _figures(report: QueueStatus) -> dict[str, int]:
    counts: dict[str, int] = {
        field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "skipped"
    }
    return {"waiting": report.waiting, **counts}


def _table(run: str, report: QueueStatus) -> Table:
    verdict = "the ledger is balanced" if report.balanced else "[bold red]the ledger is NOT balanced[/]"
    table = Table("entries", title=f"queue of run {run}", caption=verdict)
    table.add_column("count", justify="right")
    for name, count in _figures(report).items():
        table.add_row(name.replace("_", " "), str(count))
    for reason, count in sorted(report.skipped.items()):
        table.add_row(f"skipped: {reason}", str(count))
    return table
