"""How the critic's reader splits solutions whose steps are known: writes ``benchmarks/results/attempts.json``.

    make bench-attempts ARGS="--data FOLDER"

FOLDER holds solutions as JSON Lines: ``processbench_gsm8k_dev.jsonl`` and ``processbench_math_dev.jsonl`` (the field
``steps``), and ``gsm8k_train.jsonl`` (``reference_solution``, whose lines are the steps, and ``answer``, which is
written behind them as GSM8K does: ``#### 18``).

``sent_as_steps``: the share of solutions whose steps, sent one by one, keep their count. ``joined``: that of their
steps joined by blank lines and sent as one text. ``answers``: solutions in which an answer is found, of those whose end
announces one, by a box, ``####`` or the word "answer". The others' last words stand under ``without_answer``, to be
read by people. ``concluded`` are answers by the rule ``conclusion``, which nothing announces; ``cut_off``
says how often that rule finds one that is none: in solutions cut off after each step but the last. Exits with 1 when a
bound is missed.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import report
from benchmarks.report import Bound
from stepalign.critique.splitting import AnswerRule, SplitAttempt, join_steps, split_attempt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "attempts.json"
_FILES = ("processbench_gsm8k_dev", "processbench_math_dev", "gsm8k_train")
_STATED = re.compile(r"\\boxed|\\fbox|####|answer\b[^.\n]{0,60}(?:\bis\b|[:=])", re.I)


@dataclass(frozen=True)
class Solution:
    """``last_line`` is written behind the steps where the data set has the answer there."""

    id: str
    steps: list[str]
    last_line: str | None

    @property
    def text(self) -> str:
        return "\n\n".join(self.steps if self.last_line is None else [*self.steps, self.last_line])

    @property
    def states_answer(self) -> bool:
        """Whether its last step or line holds words or marks that announce an answer."""
        return _STATED.search(self.last_line or self.steps[-1]) is not None


def solutions(file: Path) -> list[Solution]:
    return [_solution(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _solution(row: dict[str, Any]) -> Solution:
    if "steps" in row:
        return Solution(row["id"], row["steps"], None)
    lines = [line for line in row["reference_solution"].split("\n") if line.strip()]
    return Solution(row["id"], lines, f"#### {row['answer']}")


def measure(known: list[Solution]) -> dict[str, Any]:
    sent = [join_steps(solution.steps) for solution in known]
    joined = [split_attempt(solution.text) for solution in known]
    kept = [len(read.steps) == len(solution.steps) for solution, read in zip(known, joined, strict=True)]
    found = [read.answer is not None for read in joined]
    stating = [answered for solution, answered in zip(known, found, strict=True) if solution.states_answer or answered]
    return {
        "solutions": len(known),
        "sent_as_steps": _share([len(r.steps) == len(s.steps) for s, r in zip(known, sent, strict=True)]),
        "joined": _share(kept),
        "joined_otherwise": _ids(known, kept),
        "rules": dict(Counter(read.rule.value for read in joined).most_common()),
        "state_an_answer": len(stating),
        "answers": _share(stating),
        "answer_rules": dict(Counter(_rule(read) for read in joined).most_common()),
        "concluded": {
            s.id: r.text[slice(*r.answer)]
            for s, r in zip(known, joined, strict=True)
            if r.answer is not None and r.answer_rule is AnswerRule.CONCLUSION
        },
        "cut_off": cut_off(known),
        "without_answer": {s.id: s.steps[-1][-200:] for s, answered in zip(known, found, strict=True) if not answered},
    }


def cut_off(known: list[Solution]) -> dict[str, Any]:
    """In how many of the solutions cut off after a step, and announcing no answer so far, one is found."""
    shorter = ["\n\n".join(solution.steps[:n]) for solution in known for n in range(1, len(solution.steps))]
    rules = [split_attempt(text).answer_rule for text in shorter]
    unannounced = [rule for rule in rules if rule in (None, AnswerRule.CONCLUSION)]
    concluded = [rule is AnswerRule.CONCLUSION for rule in unannounced]
    return {"cut_off": len(unannounced), "concluded": sum(concluded), "share": _share(concluded)}


def _share(kept: list[bool]) -> float:
    return sum(kept) / len(kept)


def _ids(known: list[Solution], kept: list[bool]) -> list[str]:
    return [solution.id for solution, same in zip(known, kept, strict=True) if not same]


def _rule(read: SplitAttempt) -> str:
    return "none" if read.answer_rule is None else read.answer_rule.value


def main(
    data: Annotated[Path, typer.Option(help="Folder with the solutions, as this file's first lines describe it.")],
    output: Annotated[Path, report.output_option("attempts")] = RESULTS,
) -> None:
    """Measure the reader of attempts."""
    missing = [str(data / f"{name}.jsonl") for name in _FILES if not (data / f"{name}.jsonl").is_file()]
    if missing:
        raise typer.BadParameter(f"{', '.join(missing)} missing: give the folder that holds them", param_hint="--data")
    begin, described = time.monotonic(), report.machine()
    read = {name: solutions(data / f"{name}.jsonl") for name in _FILES}
    sets = {name: measure(known) for name, known in read.items()}
    processbench = measure(read[_FILES[0]] + read[_FILES[1]])
    everything = measure([solution for known in read.values() for solution in known])
    bounds = {
        "sent_as_steps": Bound(everything["sent_as_steps"], at_least=1.0),
        "joined_processbench": Bound(processbench["joined"], at_least=0.99),
        "joined_gsm8k": Bound(sets["gsm8k_train"]["joined"], at_least=0.99),
        "answers": Bound(everything["answers"], at_least=1.0),
        "cut_off_processbench": Bound(processbench["cut_off"]["share"], at_most=0.015),
    }
    kept = all(bound.kept for bound in bounds.values())
    figures = {
        "benchmark": "attempts",
        "command": "make bench-attempts",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "bounds_kept": kept,
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": described,
        "sets": sets,
    }
    report.write(output, figures)
    beside = {f"{name}: {what}": row[what] for name, row in sets.items() for what in ("solutions", "state_an_answer")}
    report.show(Console(), bounds, beside)
    if not kept:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
