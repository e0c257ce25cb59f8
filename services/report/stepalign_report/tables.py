"""A comparison as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from stepalign.commands.terminal import Table
from stepalign.errors import ConfigError
from stepalign_report.comparison import Comparison, Difference, Pair
from stepalign_report.intervals import LEVEL
from stepalign_report.measures import HEADING, METRICS, Metric
from stepalign_report.runs import CHANCE

NUMBER_OF_SEEDS = "no. of\nseeds"
"""A heading of counts; plain "seeds" would read as their names too, which are numbers as well."""


def comparison_tables(comparison: Comparison, metric: Metric = "avg", everything: bool = False) -> list[Table]:
    """Arms; differences between arms in ``metric``, every pair with ``everything``; Pass@k against the base.

    The number of seeds of a difference is that of the seeds which both arms have.

    A table without rows is left out. Raises ConfigError when no arm has the metric.
    """
    if not any(metric in arm.by_seed for arm in comparison.arms):
        raise ConfigError(f"no run has figures of {metric!r}; run them again with data.checker set")
    name = f"{HEADING[metric]}@{comparison.samples}"
    shown = [pair for pair in comparison.pairs if everything or pair.headline]
    tables = [
        _arms(comparison),
        _differences(f"differences of {name}, percentage points", shown, metric),
        _differences(f"Pass@{comparison.samples} against the base, percentage points", comparison.against_base, "pass"),
    ]
    return [table for table in tables if table.rows]


def _arms(comparison: Comparison) -> Table:
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {', '.join(map(str, comparison.seeds))}"
    table = Table(
        title=f"{comparison.problems} test problems, {comparison.samples} samples each, {seeds}",
        caption="percent, mean over seeds",
    )
    metrics: list[Metric] = [metric for metric in METRICS if any(metric in arm.by_seed for arm in comparison.arms)]
    table.add_column("")
    table.add_column(NUMBER_OF_SEEDS, number=True)
    for metric in metrics:
        table.add_column(f"{HEADING[metric]}@{comparison.samples}", number=True)
    if comparison.chance is not None:
        table.add_row(CHANCE, "", *(_share(comparison.chance.get(metric)) for metric in metrics))
    for arm in (comparison.base, *comparison.arms):
        table.add_row(arm.name, str(len(arm.seeds)), *(_share(arm.mean(metric)) for metric in metrics))
    return table


def _differences(title: str, pairs: Sequence[Pair], metric: Metric) -> Table:
    found = [pair.differences[metric] for pair in pairs if metric in pair.differences]
    over = {difference.over for difference in found if difference.over is not None}
    caption = f"intervals over {' or, with one seed, '.join(sorted(over, reverse=True))}"
    table = Table(title=title, caption=f"{caption}{' only' if 'problems' in over else ''}" if over else None)
    table.add_column("A − B")
    for heading in ("difference", f"{LEVEL:.0f} % interval", "apart\nfrom 0", NUMBER_OF_SEEDS):
        table.add_column(heading, number=True)
    for difference in found:
        table.add_row(f"{difference.a} − {difference.b}", *_cells(difference))
    return table


def _cells(difference: Difference) -> tuple[str, ...]:
    interval = difference.interval
    if interval is None:
        return "–", "not comparable", "–", "none"
    return (
        f"{interval.difference:+.2f}",
        f"{interval.lower:+.2f} to {interval.upper:+.2f}",
        "yes" if interval.apart_from_0 else "no",
        str(len(difference.seeds)),
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
