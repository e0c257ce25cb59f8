"""``stepalign compare``: how the arms of finished runs compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stepalign_report.runs import Metric

if TYPE_CHECKING:
    from stepalign_report.comparison import Comparison


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs that have ended.")],
    metric: Annotated[Metric, typer.Option("--metric", help="Metric of the table of differences.")] = "avg",
    everything: Annotated[
        bool, typer.Option("--all", help="Every pair of arms, not the headline pairs alone.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all metrics and pairs as JSON.")] = False,
) -> None:
    """Compare finished runs: means over seeds, and paired 95 % intervals over problems and seeds.

    Give the runs of two or more arms, several seeds each, made on equal terms: stepalign compare runs/scoped-*
    runs/refsol-*.
    """
    from stepalign_report.comparison import compare as compare_runs
    from stepalign_report.comparison import comparison_json, read_runs

    comparison = compare_runs(read_runs(runs))
    if as_json:
        typer.echo(comparison_json(comparison), nl=False)
        return
    show_comparison(Console(), comparison, metric, everything)


def show_comparison(console: Console, comparison: Comparison, metric: Metric = "avg", everything: bool = False) -> None:
    """Print the tables, and what a reader must know before believing them."""
    from stepalign_report.tables import comparison_tables

    for table in comparison_tables(comparison, metric, everything):
        console.print(table)
    for remark in comparison.remarks:
        console.print(remark, highlight=False, soft_wrap=True)
    hidden = sum(not pair.headline for pair in comparison.pairs)
    if hidden and not everything:
        console.print(f"{hidden} more pair{'s' if hidden > 1 else ''} with stepalign compare --all", highlight=False)
