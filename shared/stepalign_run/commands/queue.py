"""``stepalign queue …``: look at a run's queue, its dead letters, and empty it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.text import Text

from stepalign.commands.application import OVERRIDES
from stepalign.commands.printable import printable
from stepalign.commands.terminal import Table, Terminal
from stepalign.errors import CorruptEntryError
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import Config, QueueSection, load_config
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.jsonl import end_at_a_whole_row
from stepalign_run.folder.layout import RunFolder
from stepalign_run.queue import DeadLetter, Replay, RolloutQueue, open_queue, resolve_url
from stepalign_run.queue.base import DRAINED, QueueStatus
from stepalign_run.queue.codec import decode

T = TypeVar("T")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

queue = typer.Typer(no_args_is_help=True, help="The rollout queue of a run: its state, its dead letters, emptying it.")
dlq = typer.Typer(no_args_is_help=True, help="Rollouts that were given up: undecodable, or delivered too often.")
queue.add_typer(dlq, name="dlq")


@queue.command(context_settings=OVERRIDES)
def status(ctx: typer.Context, config: ConfigPath, as_json: AsJson = False) -> None:
    """Show the number of rollouts in the queue, and the outcomes of the others."""
    settings = load_config(config, ctx.args)
    report = _with_queue(settings, lambda opened: opened.status())
    if as_json:
        print(json.dumps(_figures(report) | {"skipped": report.skipped, "balanced": report.balanced}))
    else:
        Terminal().print(_table(settings.run.name, report))


@queue.command(context_settings=OVERRIDES)
def drain(
    ctx: typer.Context,
    config: ConfigPath,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Skip everything that is in the queue. For a run that will not go on: its trainer refuses to resume afterwards."""
    settings = load_config(config, ctx.args)
    waiting = _with_queue(settings, lambda opened: opened.status()).length
    if not yes:
        typer.confirm(f"skip the {waiting} rollouts in the queue of run {settings.run.name}?", abort=True)
    settings.own_folder.claim()
    in_use = f"a trainer works on {settings.run_dir}: end it before its queue is drained"
    with lock_file(settings.folder.trainer_lock, in_use):
        drained, buried = _with_queue(settings, lambda opened: _drain(opened, settings.run_dir))
    print(f"{drained} rollouts skipped as drained" + (f"; buried, as they do not decode: {buried}" if buried else ""))


@dlq.command("list", context_settings=OVERRIDES)
def list_letters(
    ctx: typer.Context,
    config: ConfigPath,
    count: Annotated[int, typer.Option(min=1, help="At most so many, the oldest first.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Show the dead letters: entry, rollout, size and reason."""
    letters = _with_queue(load_config(config, ctx.args), lambda opened: opened.dead_letters(count))
    if as_json:
        rows = [
            {
                "entry_id": letter.entry_id,
                "rollout_id": _rollout_id(letter.payload),
                "bytes": len(letter.payload),
                "reason": letter.reason,
            }
            for letter in letters
        ]
        print(json.dumps(rows))
        return
    table = Table("dead letters")
    for heading in ("entry", "rollout", "bytes", "reason"):
        table.add_column(heading, number=heading == "bytes")
    for letter in letters:
        name = _rollout_id(letter.payload) or "–"
        table.add_row(letter.entry_id, name, str(len(letter.payload)), letter.reason)
    Terminal().print(table)


@dlq.command("replay", context_settings=OVERRIDES)
def replay(
    ctx: typer.Context,
    config: ConfigPath,
    entry: Annotated[list[str] | None, typer.Option("--entry", metavar="ID", help="An entry id. Repeatable.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
) -> None:
    """Put dead letters back into the queue. Exits with 1 when one of them stays where it is.

    A letter of a policy that the trainer has left behind is acknowledged as stale, untrained.
    """
    if bool(entry) == everything:
        raise typer.BadParameter("name entries with --entry ID, or take --all")
    settings = load_config(config, ctx.args)
    stayed = 0
    for name, said in _with_queue(settings, lambda opened: _replay(opened, entry)):
        print(printable(f"{name}: {said}"))
        stayed += said != Replay.REPLAYED
    if stayed:
        raise typer.Exit(1)


async def _replay(opened: RolloutQueue, entries: Sequence[str] | None) -> list[tuple[str, str]]:
    letters = {letter.entry_id: letter for letter in await opened.dead_letters((await opened.status()).dead_letters)}
    return [(name, await _replay_one(opened, name, letters.get(name))) for name in entries or letters]


async def _replay_one(opened: RolloutQueue, name: str, letter: DeadLetter | None) -> str:
    if letter is None:
        return "there is no such dead letter"
    try:
        decode(letter.payload)
    except CorruptEntryError as error:
        return f"stays, it would come back at once: {error}"
    result = await opened.replay(name)
    return "stays, the queue is full: try again later" if result is Replay.FULL else result.value


async def _drain(opened: RolloutQueue, run_dir: Path) -> tuple[int, int]:
    """How many were drained and buried. Each step may be repeated after a kill."""
    names: dict[str, str] = {}
    buried = 0
    for entry_id, payload in (await opened.entries()).items():
        try:
            names[entry_id] = decode(payload).rollout_id
        except CorruptEntryError as error:
            buried += await opened.dead_letter(entry_id, str(error))
    if not names:
        return 0, buried
    # Before the queue forgets them: an audit finds an outcome for each that is gone.
    path = RunFolder(run_dir).outcomes
    end_at_a_whole_row(path)
    with path.open("a", encoding="utf-8") as outcomes:
        outcomes.write(json.dumps({"step": 0, "outcomes": dict.fromkeys(names.values(), DRAINED)}) + "\n")
        outcomes.flush()
        os.fsync(outcomes.fileno())
    return await opened.acknowledge(dict.fromkeys(names, DRAINED)), buried


def _rollout_id(payload: bytes) -> str | None:
    try:
        return decode(payload).rollout_id
    except CorruptEntryError:
        return None


def _with_queue(config: Config, call: Callable[[RolloutQueue], Awaitable[T]]) -> T:
    section: QueueSection = config.queue.model_copy(update={"redis_url": resolve_url(config)})

    async def work() -> T:
        opened = open_queue(section, config.run.name, "status")
        try:
            return await call(opened)
        finally:
            await opened.close()

    return asyncio.run(work())


def _figures(report: QueueStatus) -> dict[str, int]:
    counts: dict[str, int] = {
        field.name: getattr(report, field.name) for field in dataclasses.fields(report) if field.name != "skipped"
    }
    return {"waiting": report.waiting, **counts}


def _table(run: str, report: QueueStatus) -> Table:
    verdict = Text("the ledger is balanced") if report.balanced else Text("the ledger is NOT balanced", "bold red")
    table = Table(f"queue of run {run}", verdict)
    table.add_column("entries")
    table.add_column("count", number=True)
    for name, count in _figures(report).items():
        table.add_row(name.replace("_", " "), str(count))
    for reason, count in sorted(report.skipped.items()):
        table.add_row(f"skipped: {reason}", str(count))
    return table
