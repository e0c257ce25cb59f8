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
from stepalign.errors import ConfigError, NothingTrainedError
from stepalign_launcher.commands.audit import audit
from stepalign_launcher.runner import LocalRun
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.queue import QueueStatus

Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]


_AUDIT, _RUN = "audit", "run"


class _RunUnlessAudit(TyperGroup):
    """``run audit RUN`` is a command of its own. Anything else, help too, is that of ``run CONFIG``."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] == [_AUDIT]:
            return super().make_context(info_name, args, parent, **extra)
        return self.commands[_RUN].make_context(info_name, args, parent, **extra)


run = typer.Typer(cls=_RunUnlessAudit, help="Run the whole loop on this machine, as processes; `run audit` checks it.")


run.command(_AUDIT)(audit)


@run.command(_RUN, context_settings=OVERRIDES)
def start(
    ctx: typer.Context,
    config: ConfigPath,
    problems: Annotated[
        str | None,
        typer.Option("--problems", metavar="PATH", help="Problems to train on (data.train): a file or a folder."),
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Move an earlier run of this name to .replaced.")
    ] = False,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Exit with 0 even if no rollout was trained on.")
    ] = False,
) -> None:
    """Run the whole loop on this machine, as processes. `stepalign run audit RUN` checks that no rollout was lost.

    Exits with 1 when nothing was trained, because every rollout was skipped.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues an earlier run and --overwrite replaces it; give one of them")
    # As a text: an empty one is refused by the configuration, and no working directory.
    train = problems and str(Path(problems).absolute())
    overrides = [*ctx.args, *(["--data.train", train] if train is not None else [])]
    local = LocalRun(config, overrides)
    found = carry_out(Terminal(), local, resume=resume, overwrite=overwrite)
    if not found.trained and not allow_untrained:
        raise NothingTrainedError(local.config.run.name, found.published, found.skipped)


def carry_out(console: Terminal, local: LocalRun, *, resume: bool, overwrite: bool) -> QueueStatus:
    """Run to the end and show how it goes. Returns the queue's last state. Raises typer.Exit when it is stopped."""
    config = local.config
    local.prepare(resume=resume, overwrite=overwrite)
    say_replaced(console, local.replaced)
    settings = (
        f": arm {config.arm_name}, {config.trainer.steps} updates of {config.trainer.batch} rollouts, seed "
        f"{config.run.seed}, {local.threads} thread(s) per process; files in {config.run_dir}"
    )
    console.print(Text.assemble("run ", (config.run.name, "bold"), settings), soft_wrap=True)
    # The report's process writes to the same output, and must come after this line.
    sys.stdout.flush()
    try:
        return local.run()
    except KeyboardInterrupt:
        console.print("stopped, no process is left; continue with --resume")
        raise typer.Exit(130) from None


def say_replaced(console: Terminal, replaced: Path | None) -> None:
    """Tell where an earlier folder has gone, if there was one."""
    if replaced is not None:
        console.print(f"the earlier one is kept in {replaced}, which you may remove", soft_wrap=True)
