"""``stepalign probe-report``: prints the findings of a probe. ``stepalign probe`` starts it at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from stepalign.commands.printable import printable_json
from stepalign.commands.terminal import Terminal
from stepalign.errors import ConfigError
from stepalign.validation import explain
from stepalign_report.probe_tables import probe_tables, remarks
from stepalign_run.folder.layout import RunFolder
from stepalign_run.probing import ProbeReport


def probe_report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a probe, as runs/lab-probe.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Print the report of a probe."""
    report = read_probe(folder)
    if as_json:
        typer.echo(printable_json(report.model_dump_json(indent=1)))
        return
    console = Terminal()
    for table in probe_tables(report):
        console.print(table)
    for remark in remarks(report):
        console.print(remark, soft_wrap=True)


def read_probe(folder: Path) -> ProbeReport:
    """The report of a probe. Raises ConfigError when there is none to be read."""
    path = RunFolder(folder).probe
    try:
        return ProbeReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        why = explain(error) if isinstance(error, ValidationError) else error
        raise ConfigError(f"{path} is no report of a probe ({why}); run `stepalign probe` again") from None
