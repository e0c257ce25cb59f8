"""``stepalign run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

from stepalign.commands.application import OVERRIDES
from stepalign.commands.terminal import Terminal
from stepalign_launcher.commands.audit import audit
from stepalign_launcher.runner import LocalRun
from stepalign_run.commands.arguments import ConfigPath

Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]


class _RunUnlessNamed(TyperGroup):
    """``run CONFIG …`` means ``run start CONFIG …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["start", *args])


run = typer.Typer(cls=_RunUnlessNamed, help="Run the whole loop on this machine, as processes; `run audit` checks it.")


run.command("audit")(audit)


@run.command("start", context_settings=OVERRIDES)
def start(
    ctx: typer.Context,
    config: ConfigPath,
    problems: Annotated[
        Path | None, typer.Option("--problems", metavar="FILE", help="Problems to train on: JSONL (data.train).")
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run of this name.")] = False,
) -> None:
    """Run the whole loop on this machine, as processes. `stepalign run audit RUN` checks that no rollout was lost."""
    overrides = [*ctx.args, *(["--data.train", str(problems.resolve())] if problems is not None else [])]
    carry_out(Terminal(), LocalRun(config, overrides), resume=resume, overwrite=overwrite)


def carry_out(console: Terminal, local: LocalRun, *, resume: bool, overwrite: bool) -> None:
    """Run to the end and show how it goes. Raises typer.Exit when it is stopped."""
    config = local.config
    local.prepare(resume=resume, overwrite=overwrite)
    settings = (
        f": arm {config.arm_name}, {config.trainer.steps} updates of {config.trainer.batch} rollouts, seed "
        f"{config.run.seed}, {local.threads} thread(s) per process; files in {config.run_dir}"
    )
    console.print(Text.assemble("run ", (config.run.name, "bold"), settings), soft_wrap=True)
    # The report's process writes to the same output, and must come after this line.
    sys.stdout.flush()
    try:
        local.run()
    except KeyboardInterrupt:
        console.print("stopped, no process is left; continue with --resume")
        raise typer.Exit(130) from None
