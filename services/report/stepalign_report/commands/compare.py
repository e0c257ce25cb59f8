"""``stepalign compare``: how the arms of finished runs compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepalign.commands.terminal import Terminal
from stepalign_report.comparison import Comparison, comparison_json
from stepalign_report.comparison import compare as compare_runs
from stepalign_report.measures import Metric
from stepalign_report.runs import read_runs
from stepalign_report.tables import comparison_tables
from stepalign_report.write import compare_into
from stepalign_run.folder.layout import RunFolder


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs that have ended.")],
    metric: Annotated[Metric, typer.Option("--metric", help="Metric of the table of differences.")] = "avg",
    everything: Annotated[
        bool, typer.Option("--all", help="Every pair of arms, not the headline pairs alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics and pairs as JSON.")] = False,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="A folder that gets comparison.json and a page of all runs."),
    ] = None,
) -> None:
    """Compare finished runs: means over seeds, and paired 95 % intervals over problems and seeds.

    Give the runs of two or more arms, several seeds each, made on equal terms: stepalign compare runs/scoped-*
    runs/refsol-*.
    """
    comparison = compare_runs(read_runs(runs)) if to is None else compare_into(RunFolder(to), runs)
    if as_json:
        typer.echo(comparison_json(comparison), nl=False)
        return
    console = Terminal()
    show_comparison(console, comparison, metric, everything)
    if to is not None:
        console.print(f"the page of it: {RunFolder(to).page}", soft_wrap=True)


def show_comparison(
    console: Terminal, comparison: Comparison, metric: Metric = "avg", everything: bool = False
) -> None:
    """Print the tables, and the remarks that a reader needs before believing them."""
    for table in comparison_tables(comparison, metric, everything):
        console.print(table)
    for remark in comparison.remarks:
        console.print(remark, soft_wrap=True)
    hidden = sum(not pair.headline for pair in comparison.pairs)
    if hidden and not everything:
        console.print(f"{hidden} more pair{'s' if hidden > 1 else ''} with stepalign compare --all")
