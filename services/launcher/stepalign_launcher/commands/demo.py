"""``stepalign demo``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from stepalign.commands.terminal import Terminal
from stepalign.errors import ConfigError
from stepalign_launcher.campaign import Campaign, started
from stepalign_launcher.commands.run import Resume, carry_out, say_replaced
from stepalign_launcher.runner import LocalRun, lock_folder
from stepalign_launcher.subprocesses import stepalign
from stepalign_run.config import load_config
from stepalign_run.folder.ownership import Kind, OwnFolder

LAB = "stepalign_lab"
DEMO_ARMS = ("grpo", "refsol", "stepalign", "stepalign_scoped")


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an earlier demo to .replaced.")] = False,
) -> None:
    """Train the lab's solver in four ways on equal terms, and compare them.

    GRPO, distillation from the reference, and step-aligned distillation on all tokens and up to the first error, one
    after the other: some minutes on a CPU. Files go to runs/demo. With --resume the runs there are continued, or get
    other seeds and arms beside them. The lab's configuration can be overridden, as in --trainer.steps 200.
    """
    if resume and overwrite:
        raise ConfigError("--resume continues an earlier demo and --overwrite replaces it; give one of them")
    configuration = lab_configuration()
    own_folder = OwnFolder(load_config(configuration).run.dir, "demo", Kind.COMPARISON)
    directory = own_folder.path
    own_folder.require()
    arms, seeds = started(directory) if resume else ([], [])
    if not set(arms) - set(DEMO_ARMS):
        arms = [*DEMO_ARMS]
    campaign = Campaign(configuration, arm or arms, seed or seeds or [0], directory, ctx.args)
    console = Terminal()
    with lock_folder(directory):
        if overwrite:
            say_replaced(console, own_folder.move_aside())
        elif not resume and started(directory) != ([], []):
            raise ConfigError(
                f"{directory} holds an earlier demo; --resume continues it or adds to it, --overwrite replaces it"
            )
        own_folder.claim()
        for member in campaign.outstanding():
            local = LocalRun(configuration, member.overrides, brief=True)
            carry_out(console, local, resume=campaign.begun(member), overwrite=True)
        stepalign("compare", *map(str, campaign.ended()), "--to", str(directory))
    _next_steps(console, directory, ctx.args)


def lab_configuration() -> Path:
    """The lab's ``lab.toml``, found without importing the lab's code. Raises ConfigError where it is not installed."""
    spec = find_spec(LAB)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the package {LAB} is missing: install stepalign with its extra 'lab'")
    return Path(spec.origin).parent / "assets" / "lab.toml"


def _next_steps(console: Terminal, directory: Path, overrides: Sequence[str]) -> None:
    """``overrides`` are those of these runs, without which others are not comparable to them."""
    program = os.path.relpath(sys.argv[0])
    same = "".join(f" {word}" for word in map(shlex.quote, overrides))
    hints = (
        ("the same with other rollouts", f"{program} demo --resume --seed 1{same}"),
        ("a control: no feedback at all", f"{program} demo --resume --arm null --arm stepalign_scoped{same}"),
        ("runs of several seeds compared", f"{program} compare {directory}/*/"),
        ("figures of each update", f"tail -n 1 {directory}/*/metrics.jsonl"),
        ("real weights on word problems", "make demo-smollm2"),
    )
    console.print("\nWhat to try next:")
    for what, command in hints:
        console.print(f"  {what:<31} {command}", soft_wrap=True)
