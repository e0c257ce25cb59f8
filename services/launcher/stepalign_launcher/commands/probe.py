"""``stepalign probe``: which arm is worth a run."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from stepalign.commands.terminal import Terminal
from stepalign_launcher.commands.run import say_replaced
from stepalign_launcher.probe import LocalProbe
from stepalign_launcher.subprocesses import stepalign
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import shipped_arms


def probe(
    ctx: typer.Context,
    config: ConfigPath,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Rollouts, each of another problem.")] = 64,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of each rollout's self-teacher.")] = 4,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", metavar="ARM", help="An arm to look at; all without it. Repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Say before a run which arm is worth it, from one batch of the base model. Trains nothing.

    Shows whether the self-teachers are right and where they push, and ranks the arms. Files go to a run folder of its
    own, <run.name>-probe; an earlier probe there is moved to .replaced.
    """
    local = LocalProbe(config, ctx.args, arm or shipped_arms(), rollouts, samples)
    _probe(Terminal(stderr=as_json), local, rollouts)
    stepalign("probe-report", str(local.folder.path), *(["--json"] if as_json else []))


def _probe(console: Terminal, local: LocalProbe, asked: int) -> None:
    config, batch = local.config, local.config.trainer.batch
    fewer = f" (data.train has no more problems than that; asked for were {asked})" if batch < asked else ""
    console.print(
        f"probing {len(local.plan.arms)} arms on {batch} rollouts{fewer}, seed {config.run.seed}, {local.threads} "
        f"thread(s) per process; logs in {local.folder.logs}",
        soft_wrap=True,
    )
    started = time.monotonic()
    try:
        with console.status("sampling, asking the critic, measuring"):
            local.run()
    except KeyboardInterrupt:
        console.print("stopped, no process is left")
        raise typer.Exit(130) from None
    say_replaced(console, local.replaced)
    console.print(f"report: {local.folder.probe} ({time.monotonic() - started:.0f} s)", soft_wrap=True)
