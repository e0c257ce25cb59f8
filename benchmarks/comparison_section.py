"""The section of ``docs/results.md`` that a benchmark of arms writes from its file of figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stepalign_report.measures import HEADING
from stepalign_run.folder.files import replace_text


def write_section(page: Path, name: str, results: dict[str, Any]) -> None:
    """Write the section of the benchmark ``name``. Raises ValueError when the page has no markers for it."""
    budgets = [_budget(int(steps), budget) for steps, budget in results["budgets"].items()]
    replace_section(page, name, "\n\n".join(budgets))


def replace_section(page: Path, name: str, body: str) -> None:
    """Replace the text between the markers of ``name``. Raises ValueError when the page has none."""
    begin, end = f"<!-- bench-{name}: begin -->", f"<!-- bench-{name}: end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{page} must hold {begin} and {end} once each")
    before, after = text.split(begin)[0], text.split(end)[1]
    replace_text(page, f"{before}{begin}\n\n{body}\n\n{end}{after}")


def _budget(steps: int, budget: dict[str, Any]) -> str:
    comparison = budget["comparison"]
    k, seeds = comparison["samples"], comparison["seeds"]
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    parts = [
        f"### {steps} updates: {budget['rollouts_per_run']} rollouts per run, {named}",
        f"`{budget['command']}`. {comparison['problems']} test problems, {k} samples each; percent, mean over seeds, "
        "in brackets the seeds one by one.",
        markdown_table(["arm", *(f"{name}@{k}" for name in HEADING.values()), "picked steps"], _arm_rows(comparison)),
        "Differences in points, with paired 95 % intervals over problems and seeds; **bold**: apart from 0.",
        markdown_table(["difference", *(f"{name}@{k}" for name in HEADING.values())], _pair_rows(comparison)),
        "Advantage at the first update, when the student is still the base:",
        markdown_table(
            ["arm", "on correct tokens", "share of them below −0.1", "at the first error", "after it"], _first(budget)
        ),
        *(
            f"Bound: {bound['what']} at least {bound['at_least']}: {bound['value']:.2f} "
            f"({bound['interval'][0]:.2f} to {bound['interval'][1]:.2f}), "
            f"{'kept' if bound['kept'] else '**missed**'}."
            for bound in budget["bounds"]
        ),
        *([_alarms(budget)] if any(run["alarms"] for run in budget["runs"]) else []),
    ]
    return "\n\n".join(parts)


def markdown_table(heads: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _arm_rows(comparison: dict[str, Any]) -> Iterable[list[str]]:
    chance = comparison["chance"]
    if chance is not None:
        yield ["chance", *(f"{chance[m]:.1f}" if m in chance else "–" for m in HEADING), ""]
    for arm in [comparison["base"], *comparison["arms"]]:
        steps = ", ".join(map(str, arm["selected_steps"].values()))
        yield [f"`{arm['arm']}`", *(_figure(arm["figures"].get(metric)) for metric in HEADING), steps]


def _figure(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    return f"{figure['mean']:.1f} ({', '.join(f'{value:.1f}' for value in figure['by_seed'].values())})"


def _pair_rows(comparison: dict[str, Any]) -> Iterable[list[str]]:
    headlines = [pair for pair in comparison["pairs"] if pair["headline"]]
    for pair in [*headlines, *comparison["against_base"]]:
        yield [f"{pair['a']} − {pair['b']}", *(_interval(pair["metrics"].get(metric)) for metric in HEADING)]


def _interval(found: dict[str, Any] | None) -> str:
    if found is None or found["difference"] is None:
        return "–"
    text = f"{found['difference']:+.1f} ({found['lower']:+.1f} to {found['upper']:+.1f})"
    return f"**{text}**" if found["apart_from_0"] else text


def _first(budget: dict[str, Any]) -> Iterable[list[str]]:
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in budget["runs"]:
        arms.setdefault(run["arm"], []).append(run["first_update"])
    for arm, updates in arms.items():
        keys = ("advantage_correct", "advantage_correct_below", "advantage_at_error", "advantage_after_error")
        correct, below, error, after = (_mean(update[key] for update in updates) for key in keys)
        if correct is not None and below is not None:
            yield [f"`{arm}`", f"{correct:.2f}", f"{100 * below:.0f} %", _nats(error), _nats(after)]


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _alarms(budget: dict[str, Any]) -> str:
    found = [
        f"`{run['arm']}` seed {run['seed']}: "
        + ", ".join(
            f"{name} from update {a['first_step']} ({a['updates']} updates)" for name, a in run["alarms"].items()
        )
        for run in budget["runs"]
        if run["alarms"]
    ]
    return "Alarms: " + "; ".join(found) + "."
