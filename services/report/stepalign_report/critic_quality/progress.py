"""Live progress of a measurement: a bar in a terminal, a line every tenth without one."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stepalign.commands.printable import printable
from stepalign.commands.terminal import Terminal
from stepalign_report.critic_quality.rows import Row


class AskingProgress:
    """Counts answers of one critic. ``done`` of the ``total`` were there before."""

    def __init__(self, console: Terminal, critic: str, done: int, total: int) -> None:
        self._console = console
        self._critic = printable(critic)
        self._done = self._before = done
        self._total = total
        self._failures = 0
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(self._said, total=total, completed=done)

    def __enter__(self) -> Self:
        if self._before:
            self._console.print(f"{self._critic}: {self._before} of {self._total} answers are there already")
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def add(self, row: Row) -> None:
        self._done += 1
        self._failures += row.response is None or row.response.critique is None
        self._bar.update(self._task, completed=self._done, description=self._said)
        every = max(1, self._total // 10)
        if not self._console.is_terminal and (self._done % every == 0 or self._done == self._total):
            self._console.print(f"{self._said}: {self._done} of {self._total}")

    @property
    def _said(self) -> str:
        return f"{self._critic}, failures {self._failures}" if self._failures else self._critic
