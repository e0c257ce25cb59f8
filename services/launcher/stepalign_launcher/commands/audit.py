"""``stepalign run audit``: whether every rollout of a run is accounted for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from stepalign.commands.terminal import Table, Terminal
from stepalign.errors import ConfigError
from stepalign_launcher.redis_server import EmbeddedRedis
from stepalign_launcher.runner import lock_folder
from stepalign_run.audit import Audit, read_records
from stepalign_run.audit import audit as audit_records
from stepalign_run.config import load_config
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.ownership import OwnFolder
from stepalign_run.queue import resolve_url
from stepalign_run.queue.snapshot import read_snapshot

_RECONNECT_SECONDS = 3.0
# The records and the queue of a run in progress are read at two moments. Rollouts that move in between look like a
# problem once, and no longer at the next look.
_LOOKS = 4
_BETWEEN_LOOKS_SECONDS = 0.5
_ADDRESS_SECONDS = 30.0


def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, as runs/demo/stepalign_scoped-0.")],
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file that names the Redis server, if not REDIS_URL.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check that published = trained + skipped + stale + dead + pending; exit with 1 when it is not so.

    The records of solver and trainer are compared with the queue's entries and counters. A run of the local stack
    needs no address: its own server is asked, and started for it when the run has ended.
    """
    found = examine(run, config)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "accounted": found.accounted, "adds_up": not found.problems}))
    else:
        _show(Terminal(), run.name, found)
    if found.problems:
        raise typer.Exit(1)


def examine(run: Path, config: Path | None = None) -> Audit:
    """The audit of a run's folder. Raises ConfigError when it is none or when there is no server to ask."""
    # The folder's name is the run's, and `.` has none.
    run = Path(os.path.abspath(run))
    record = RunFolder(run).record
    if not record.is_file():
        raise ConfigError(f"{run} is no run's folder: there is no {record.name}")
    with _server(run, config) as url:
        found = _examined(run, url)
        for _ in range(_LOOKS - 1):
            if not found.problems:
                break
            time.sleep(_BETWEEN_LOOKS_SECONDS)
            found = _examined(run, url)
    return found


def _examined(run: Path, url: str) -> Audit:
    records = read_records(run)
    return audit_records(records, asyncio.run(read_snapshot(url, run.name, _RECONNECT_SECONDS)))


@contextmanager
def _server(run: Path, config: Path | None) -> Iterator[str]:
    folder = RunFolder(run)
    if config is not None:
        yield resolve_url(load_config(config, ["--run.dir", str(run.parent), "--run.name", run.name]))
    elif folder.redis.is_dir():
        # A server that is started in it writes there.
        OwnFolder(run.parent, run.name).require()
        try:
            lock = lock_folder(run)
        except ConfigError:
            yield _address_of_a_run_in_progress(folder.redis_url)
            return
        # An address that is there all the same is that of a server that a power cut or a kill has ended.
        with lock, EmbeddedRedis(folder.redis) as url:
            yield url
    elif os.environ.get("REDIS_URL"):
        yield os.environ["REDIS_URL"]
    else:
        raise ConfigError("no Redis server to ask: name the run's TOML file after its folder, or set REDIS_URL")


def _address_of_a_run_in_progress(path: Path) -> str:
    """Its server may be on its way up, or up again. Raises ConfigError when it does not come."""
    deadline = time.monotonic() + _ADDRESS_SECONDS
    while not path.is_file():
        if time.monotonic() > deadline:
            raise ConfigError(f"the run is in progress and its Redis server does not start; see {path.parent}")
        time.sleep(0.1)
    return path.read_text(encoding="utf-8").strip()


def _show(console: Terminal, run: str, found: Audit) -> None:
    table = Table(f"audit of run {run}")
    table.add_column("rollouts")
    table.add_column("count", number=True)
    rows = {
        "published": found.published,
        "= trained": found.trained,
        **{f"+ skipped: {reason}": count for reason, count in found.skipped.items()},
        "+ stale": found.stale,
        "+ dead": found.dead,
        "+ pending": found.pending,
    }
    for name, count in rows.items():
        table.add_row(name, str(count))
    console.print(table)
    if found.forgotten:
        console.print(
            f"the queue's server does not know {found.forgotten} of these, which solver and trainer have on record: "
            "a power cut has cost it its last writes"
        )
    if not found.problems:
        console.print("it adds up: nothing is lost, and nothing was trained twice")
    for problem in found.problems:
        console.print(Text.assemble(("it does not add up:", "bold red"), f" {problem}"), soft_wrap=True)
