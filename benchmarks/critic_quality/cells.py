"""Cells of the benchmark: a critic, in an engine, told some things, asked about some solutions.

Every answer is a row of ``benchmarks/results/critic_quality/<cell>.jsonl``. A cell whose rows are all there starts no
critic and needs no model.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.arms_benchmark import ROOT
from benchmarks.critic_quality.critics import MODELS, Engine, serving_critic
from benchmarks.critic_quality.rows import BenchRows, read_rows
from benchmarks.errors import BenchError
from stepalign.client import CriticClient
from stepalign.errors import StepalignError
from stepalign_report.critic_quality.asking import ask, identity_of
from stepalign_report.critic_quality.judged import NO_STEP, Judged, judge
from stepalign_report.critic_quality.rows import Row, Told
from stepalign_run.data import LabelledData, LabelledSolution, in_half
from stepalign_run.data.labelled import Half

ROWS = ROOT / "benchmarks" / "results" / "critic_quality"
PROMPTS = "chat-v2"
_CONCURRENCY = 8
_ANSWER_SECONDS = 3600.0

BOTH = Told(reference_solution=True, answer=True)
NO_ANSWER = Told(reference_solution=True, answer=False)
NO_REFERENCE = Told(reference_solution=False, answer=True)
NEITHER = Told(reference_solution=False, answer=False)


@dataclass(frozen=True)
class Cell:
    """``limit`` takes the first so many solutions of the half, of the ``erroneous`` ones alone if so wished."""

    model: str
    engine: Engine
    told: Told = BOTH
    limit: int | None = None
    prompts: str = PROMPTS
    erroneous: bool = False
    half: Half = "test"

    @property
    def name(self) -> str:
        told = {"reference": self.told.reference_solution, "answer": self.told.answer}
        without = [name for name, given in told.items() if not given]
        half = [] if self.half == "test" else [self.half]
        return "-".join([self.model, self.engine, self.prompts, *(f"no-{name}" for name in without), *half])

    @property
    def path(self) -> Path:
        return ROWS / f"{self.name}.jsonl"

    def chosen(self, data: LabelledData) -> list[LabelledSolution]:
        chosen = of_half(data, self.half)
        return [each for each in chosen if not self.erroneous or each.first_error is not None][: self.limit]

    def made_of(self, data: LabelledData) -> dict[str, Any]:
        """What the rows are made of."""
        folder = files("stepalign.prompts") / self.prompts
        texts = {
            each.name: each.read_text(encoding="utf-8") for each in folder.iterdir() if each.name.startswith("critique")
        }
        return {
            "model": self.model,
            "engine": self.engine,
            "prompts": self.prompts,
            "prompts_sha256": hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest(),
            "data_sha256": data.sha256,
            "told": self.told.model_dump(),
            "dtype": MODELS[self.model].dtype,
        }


def of_half(data: LabelledData, half: Half) -> list[LabelledSolution]:
    """The solutions of a half. Figures are read on ``test``; prompts and thresholds are chosen on ``dev``."""
    return [solution for solution in data.solutions if in_half(solution, half)]


class _JudgedRows:
    """Keeps of each answer what figures are made of."""

    def __init__(self, kept: BenchRows, solutions: Sequence[LabelledSolution]) -> None:
        self._kept = kept
        self._of = {solution.id: solution for solution in solutions}

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self._kept.rows

    def append(self, row: Row, /) -> None:
        found = judge(self._of[row.id], row)
        response = row.response
        critique = None if response is None else response.critique
        self._kept.append(
            {
                "id": row.id,
                "called": found.called,
                "failure": found.failure,
                "verdict": None if critique is None else critique.verdict,
                "forced": [] if response is None else list(response.forced),
                "p_wrong": None if response is None or response.p_wrong is None else _rounded(response.p_wrong),
                "prompt_tokens": found.prompt_tokens,
                "completion_tokens": found.completion_tokens,
                "seconds": round(found.seconds, 2),
                "probabilities": [[round(p, 5), is_wrong] for p, is_wrong in found.probabilities],
            }
        )


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def measure_cell(cell: Cell, data: LabelledData, console: Console) -> None:
    """Ask for the rows that are missing. Raises BenchError when a critic does not start or stops answering."""
    chosen = cell.chosen(data)
    there = read_rows(cell.path, cell.made_of(data))
    missing = [solution for solution in chosen if solution.id not in there]
    if not missing:
        return
    console.print(f"{cell.name}: {len(missing)} of {len(chosen)} to ask")
    with serving_critic(cell.model, cell.engine, cell.prompts) as url:
        asyncio.run(_ask(cell, url, data, missing))


async def _ask(cell: Cell, url: str, data: LabelledData, missing: Sequence[LabelledSolution]) -> None:
    async with CriticClient(url, timeout=_ANSWER_SECONDS) as client:
        identity = await identity_of(client)
        with BenchRows(cell.path, cell.made_of(data)) as kept:
            rows = _JudgedRows(kept, missing)
            try:
                asked = await ask(
                    client, identity, missing, cell.told, rows, concurrency=_CONCURRENCY, on_row=lambda _: None
                )
            except StepalignError as error:
                raise BenchError(f"{cell.name}: {error}") from error
    problem = asked.stopped or next(iter(asked.unanswered.values()), None)
    if problem is not None:
        raise BenchError(f"{cell.name}: {problem}")


def judged_rows(cell: Cell, data: LabelledData) -> list[Judged]:
    """The rows of a finished cell beside their labels. Raises BenchError when rows are missing."""
    rows = read_rows(cell.path, cell.made_of(data))
    chosen = cell.chosen(data)
    missing = sum(solution.id not in rows for solution in chosen)
    if missing:
        raise BenchError(f"{cell.name}: {missing} of {len(chosen)} rows are missing")
    return [judged_row(solution, rows[solution.id]) for solution in chosen]


def judged_row(solution: LabelledSolution, row: dict[str, Any]) -> Judged:
    """A row beside the label of its solution."""
    return Judged(
        id=solution.id,
        question=solution.question_key,
        steps=len(solution.steps),
        generator=solution.generator,
        label=NO_STEP if solution.first_error is None else solution.first_error,
        called=row["called"],
        failure=row["failure"],
        prompt_tokens=row["prompt_tokens"],
        completion_tokens=row["completion_tokens"],
        seconds=row["seconds"],
        probabilities=tuple((p, bool(is_wrong)) for p, is_wrong in row["probabilities"]),
    )
