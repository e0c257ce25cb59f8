"""A measurement from its data to the files in the output folder, going on from the answers that are there."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stepalign.client import CriticClient
from stepalign.commands.terminal import Terminal
from stepalign.errors import ConfigError, CriticUnavailableError
from stepalign.types import CriticIdentity
from stepalign_report.critic_quality.asking import ask, identity_of
from stepalign_report.critic_quality.progress import AskingProgress
from stepalign_report.critic_quality.rows import ROWS_FILES, Header, RowsFile, Told, header_of, read_rows_file
from stepalign_report.critic_quality.summary import Measured, require_own_summary, summarise, write_summary
from stepalign_report.page import require_own_page, write_page
from stepalign_run.data import LabelledData, LabelledSolution, in_half
from stepalign_run.data.labelled import Half
from stepalign_run.folder.files import lock_file, make_folder
from stepalign_run.folder.layout import RunFolder

_LOCK = ".critic-quality.lock"


@dataclass(frozen=True)
class Choice:
    """The solutions to measure on: a half of the questions, and of those the first ``limit``."""

    half: Half | None = None
    limit: int | None = None

    def of(self, data: LabelledData) -> list[LabelledSolution]:
        """Raises ConfigError when nothing is left."""
        chosen = [each for each in data.solutions if self.half is None or in_half(each, self.half)][: self.limit]
        if not chosen:
            raise ConfigError(f"no question of {data.name} is in the half {self.half}; leave --half out")
        return chosen


@dataclass(frozen=True)
class CriticAddress:
    url: str
    client: CriticClient


@dataclass(frozen=True)
class Done:
    """The figures, the page that shows them, and the last reason of each call that gave no answer."""

    summary: dict[str, Any]
    page: Path | None
    """None in the folder of a comparison, whose page is left as it is."""
    unanswered: dict[str, str] = field(default_factory=dict[str, str])


async def measure(
    data: LabelledData,
    choice: Choice,
    critics: list[CriticAddress],
    told: Told,
    out: Path,
    against: Path | None,
    *,
    concurrency: int,
    console: Terminal,
) -> Done:
    """Ask one or two critics for what is missing and write answers, ``critic_quality.json`` and the page to ``out``.

    ``against`` are another critic's finished answers, which stand as B beside the only critic. Raises ConfigError
    when ``out`` holds answers of another critic, data or kind, NotOursError when it holds files that are not ours, and
    CriticError when a critic cannot be asked; the answers so far are then kept.
    """
    chosen = choice.of(data)
    folder = RunFolder(out)
    make_folder(out)
    with lock_file(out / _LOCK, f"another critic-quality works in {out}: let it end, or give another --out"):
        require_own_summary(folder.critic_quality)
        require_own_page(folder.page)
        other = None if against is None else _answers_against(against, data)
        measured: list[Measured] = []
        unanswered: dict[str, str] = {}
        for critic, name in zip(critics, ROWS_FILES, strict=False):
            async with critic.client:
                measured.append(
                    await _measure_one(critic, out / name, data, chosen, told, concurrency, console, unanswered)
                )
        if other is not None:
            measured.append(other)
        summary = summarise(data, chosen, measured, half=choice.half, limit=choice.limit)
        write_summary(folder.critic_quality, summary)
        # The page of a comparison shows runs that lie elsewhere: only `stepalign compare` can write it.
        page = None if folder.comparison.exists() else write_page(folder.page, [out] if folder.report.exists() else [])
    return Done(summary, page, unanswered)


async def _measure_one(
    critic: CriticAddress,
    path: Path,
    data: LabelledData,
    chosen: list[LabelledSolution],
    told: Told,
    concurrency: int,
    console: Terminal,
    unanswered: dict[str, str],
) -> Measured:
    identity = await _identity(critic, path, chosen, console)
    header = Header(critic=identity, data=data.name, data_sha256=data.sha256, told=told)
    with RowsFile(path, header) as rows:
        there = sum(solution.id in rows.rows for solution in chosen)
        with AskingProgress(console, identity.model, there, len(chosen)) as progress:
            asked = await ask(critic.client, identity, chosen, told, rows, concurrency=concurrency, on_row=progress.add)
        if asked.stopped is not None:
            kept = sum(solution.id in rows.rows for solution in chosen)
            console.print(
                f"{kept} of {len(chosen)} answers are kept in {path}: the same command goes on", soft_wrap=True
            )
            raise asked.stopped
        unanswered.update(asked.unanswered)
        return Measured(identity, told, dict(rows.rows))


async def _identity(
    critic: CriticAddress, path: Path, chosen: list[LabelledSolution], console: Terminal
) -> CriticIdentity:
    """The critic's identity; that of the answers, where nobody is there to ask and nothing is left to ask."""
    try:
        return await identity_of(critic.client)
    except CriticUnavailableError:
        header = header_of(path)
        if header is None or any(solution.id not in read_rows_file(path)[1] for solution in chosen):
            raise
        console.print(f"no critic answers at {critic.url}; all answers are there already", soft_wrap=True)
        return header.critic


def _answers_against(path: Path, data: LabelledData) -> Measured:
    """Another critic's answers. Raises ConfigError when they are to other data."""
    path = path / ROWS_FILES[0] if path.is_dir() else path
    header, rows = read_rows_file(path)
    if header.data_sha256 != data.sha256:
        raise ConfigError(
            f"{path} holds answers to other data ({header.data} {header.data_sha256[:12]}, now {data.name} "
            f"{data.sha256[:12]}); two critics are compared on the same solutions"
        )
    return Measured(header.critic, header.told, rows)
