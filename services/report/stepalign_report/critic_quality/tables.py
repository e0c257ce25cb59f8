"""A critic's figures as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepalign.commands.terminal import Table

Estimate = dict[str, float] | None

# Name in the summary, heading, digits.
ROWS = (
    ("f1", "F1 of the first error, %", 1),
    ("on_erroneous", "accuracy on erroneous, %", 1),
    ("on_correct", "accuracy on correct, %", 1),
    ("detected", "erroneous called wrong, %", 1),
    ("place_accuracy", "place right, if called wrong, %", 1),
    ("valid", "valid critiques, %", 1),
    ("prompt_tokens", "prompt tokens a critique", 0),
    ("completion_tokens", "completion tokens a critique", 0),
    ("seconds", "seconds a critique", 2),
)
CALIBRATION = (("ece", "ECE of p_wrong", 3), ("brier", "Brier score of p_wrong", 3))
DIFFERENCES = (
    ("f1_difference", "F1, points", 1),
    ("f1_ratio", "F1, ratio", 2),
    ("on_erroneous_difference", "accuracy on erroneous, points", 1),
    ("on_correct_difference", "accuracy on correct, points", 1),
    ("valid_difference", "valid critiques, points", 1),
)
GROUPS = (("by_steps", "by number of steps", "steps"), ("by_generator", "by the solution's author", "author"))


def quality_tables(summary: dict[str, Any]) -> list[Table]:
    """Figures, failures, reliability, groups and the comparison; a table without rows is left out."""
    critics = summary["critics"]
    tables = [_figures(summary, critics), _failures(critics)]
    for each in critics:
        whose = "" if len(critics) == 1 else f"{each['label']}: "
        tables += [_reliability(each, whose)]
        tables += [_groups(each["figures"][key], f"{whose}{title}", heading) for key, title, heading in GROUPS]
    if summary["comparison"] is not None:
        tables.append(_comparison(summary))
    return [table for table in tables if table.rows]


def critic_name(each: dict[str, Any]) -> str:
    critic = each["critic"]
    return f"{critic['model']} ({critic['backend']}, {critic['prompt_version']})"


def told_text(told: dict[str, bool]) -> str:
    return ", ".join(f"{'with' if given else 'without'} {name.replace('_', ' ')}" for name, given in told.items())


def written(found: Estimate, digits: int) -> str:
    """``31.2 (25.0 to 37.9)``."""
    if found is None:
        return "–"
    value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _figures(summary: dict[str, Any], critics: Sequence[dict[str, Any]]) -> Table:
    chosen, data = summary["chosen"], summary["data"]
    half = f", half {chosen['half']}" if chosen["half"] else ""
    first = critics[0]["figures"]
    level = round(summary["bootstrap"]["level"])
    table = Table(
        f"{data['name']}{half}: {first['rows']} solutions, {first['erroneous']} erroneous",
        caption="; ".join(
            f"{'' if len(critics) == 1 else each['label'] + ': '}{critic_name(each)} {told_text(each['told'])}"
            for each in critics
        )
        + f"; in brackets {level} % intervals over {first['questions']} questions",
    )
    table.add_column("")
    for each in critics:
        table.add_column(each["critic"]["model"] if len(critics) == 1 else each["label"], number=True)
    for key, name, digits in ROWS:
        table.add_row(name, *(written(each["figures"][key], digits) for each in critics))
    if any(each["figures"]["calibration"] is not None for each in critics):
        for key, name, digits in CALIBRATION:
            found = [each["figures"]["calibration"] for each in critics]
            table.add_row(name, *(written(None if one is None else one[key], digits) for one in found))
    best = [each["figures"]["best_threshold"] for each in critics]
    if any(best):
        table.add_row("best wrong_threshold here", *("–" if one is None else f"{one['threshold']:g}" for one in best))
        table.add_row("F1 with it, %", *("–" if one is None else written(one["f1"], 1) for one in best))
    return table


def _failures(critics: Sequence[dict[str, Any]]) -> Table:
    table = Table("failures, counted as wrong")
    table.add_column("reason")
    for each in critics:
        table.add_column("critiques" if len(critics) == 1 else each["label"], number=True)
    for reason in sorted({reason for each in critics for reason in each["figures"]["failures"]}):
        table.add_row(reason, *(str(each["figures"]["failures"].get(reason, 0)) for each in critics))
    return table


def _reliability(each: dict[str, Any], whose: str) -> Table:
    table = Table(f"{whose}reliability of p_wrong", caption="steps up to the first wrong one")
    for heading, number in (("p_wrong", False), ("steps", True), ("mean", True), ("share wrong", True)):
        table.add_column(heading, number=number)
    found = each["figures"]["calibration"]
    for one in [] if found is None else found["bins"]:
        if one["steps"]:
            shares = (f"{one[key]:.2f}" for key in ("mean_p_wrong", "share_wrong"))
            table.add_row(f"{one['low']:.1f}–{one['high']:.1f}", str(one["steps"]), *shares)
    return table


def _groups(groups: Sequence[dict[str, Any]], title: str, heading: str) -> Table:
    table = Table(title)
    table.add_column(heading)
    for name in ("rows", "F1", "on\nerroneous", "on\ncorrect", "valid"):
        table.add_column(name, number=True)
    for group in groups:
        figures = (group[key] for key in ("f1", "on_erroneous", "on_correct", "valid"))
        shown = ("–" if found is None else f"{found['value']:.1f}" for found in figures)
        table.add_row(group["name"], str(group["rows"]), *shown)
    return table


def _comparison(summary: dict[str, Any]) -> Table:
    found = summary["comparison"]
    table = Table(
        f"A beside B on {found['rows']} solutions",
        caption="A − B and A / B on the same draws of questions; * the interval does not hold 0 (ratio: 1)",
    )
    table.add_column("")
    table.add_column("A beside B", number=True)
    for key, name, digits in DIFFERENCES:
        table.add_row(name, f"{written(found[key], digits)}{' *' if is_apart(key, found[key]) else ''}")
    return table


def is_apart(key: str, found: Estimate) -> bool:
    """Whether the interval holds no sign of equality: 0 of a difference, 1 of a ratio."""
    if found is None:
        return False
    equal = 1.0 if key.endswith("_ratio") else 0.0
    return found["low"] > equal or found["high"] < equal
