"""``stepalign probe``: which arm is worth a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.probe_agreement import agreement, finished_below
from stepalign_launcher.probe import LocalProbe
from stepalign_report.probe_tables import agreement_table, probe_tables, remarks
from stepalign_run.config import shipped_arms
from stepalign_run.probing import PROBE, ProbeReport


def probe(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; override with --section.key value.")],
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Rollouts, each of another problem.")] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of each rollout's self-teacher.")] = 4,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", metavar="ARM", help="An arm to look at; all without it. Repeatable.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            "--against",
            metavar="DIR",
            help="A finished run, or a folder of them, to compare the scores with; an earlier probe of the same "
            "settings is used. Repeatable.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Say before a run which arm is worth it, from one batch of the base model. Trains nothing.

    Shows whether the self-teachers are right and where they push, and ranks the arms. Files go to a run folder of its
    own, <run.name>-probe, where an earlier probe is replaced.
    """
    local = LocalProbe(config, ctx.args, arm or shipped_arms(), rollouts, samples)
    folders = finished_below(against) if against else []
    report = local.stored() if folders else None
    console = Console(stderr=as_json)
    if report is None:
        report = _probe(console, local, rollouts)
    compared = agreement(report, folders) if folders else None
    if as_json:
        content = report.model_dump(mode="json") | ({"against": compared.as_json()} if compared is not None else {})
        typer.echo(json.dumps(content, indent=1))
        return
    for table in probe_tables(report):
        console.print(table)
    for remark in remarks(report):
        console.print(remark, highlight=False, soft_wrap=True)
    if compared is not None:
        console.print(agreement_table(compared))
        if compared.left_out:
            console.print(f"without a score or a finished run: {', '.join(compared.left_out)}", highlight=False)


def _probe(console: Console, local: LocalProbe, asked: int) -> ProbeReport:
    config, batch = local.config, local.config.trainer.batch
    fewer = f" (data.train has no more problems than that; asked for were {asked})" if batch < asked else ""
    console.print(
        f"probing {len(local.plan.arms)} arms on {batch} rollouts{fewer}, seed {config.run.seed}, {local.threads} "
        f"thread(s) per process; logs in {config.run_dir / 'logs'}",
        highlight=False,
    )
    started = time.monotonic()
    try:
        with console.status("sampling, asking the critic, measuring"):
            report = local.run(lambda: None)
    except KeyboardInterrupt:
        console.print("stopped, no process is left", highlight=False)
        raise typer.Exit(130) from None
    console.print(f"report: {config.run_dir / PROBE} ({time.monotonic() - started:.0f} s)", highlight=False)
    return report
