"""The figures as a file and as a table, with the bounds beside them."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from stepalign_run.folder.files import replace_text
from stepalign_run.folder.outputs import require_own_file
from stepalign_run.folder.ownership import NotOursError


@dataclass(frozen=True)
class Bound:
    """A figure and the least or most that it may be."""

    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def kept(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def as_dict(self) -> dict[str, Any]:
        limit = {"at_least": self.at_least} if self.at_least is not None else {"at_most": self.at_most}
        return {"value": self.value, **limit, "kept": self.kept}


def machine() -> dict[str, Any]:
    """Where the figures come from. Call it before there is load."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")  # Only Linux has it.
    for line in described.read_text(encoding="utf-8").splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def output_option(benchmark: str) -> Any:
    """The option that names the file of figures.

    A file that holds anything but earlier figures of this benchmark is refused before anything is measured.
    """

    def checked(path: Path) -> Path:
        try:
            _require_own(path, benchmark)
        except NotOursError as error:
            raise typer.BadParameter(str(error)) from None
        return path

    return typer.Option(callback=checked, help="Where the figures go.")


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write ``figures`` as JSON, with as many digits as mean something. Raises NotOursError for another's file."""
    _require_own(path, figures["benchmark"])
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(rounded(figures), indent=2) + "\n")


def _require_own(path: Path, benchmark: str) -> None:
    def is_own(text: str) -> bool:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.get("benchmark") == benchmark

    require_own_file(path, is_own, "give the name of a new file")


def rounded(value: Any) -> Any:
    """``value`` with all its floats cut to four decimals."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def show(console: Console, bounds: dict[str, Bound], others: dict[str, float]) -> None:
    """A table of the figures."""
    table = Table("figure", "measured", "bound", "")
    for name, bound in bounds.items():
        table.add_row(name, f"{bound.value:.3g}", str(bound), "kept" if bound.kept else "[red]missed[/red]")
    for name, value in others.items():
        table.add_row(name, f"{value:.3g}")
    console.print(table)
