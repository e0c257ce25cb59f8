"""Evaluation of checkpoints: sample, grade, score; pick on validation; only then look at the test problems.

The random numbers of an evaluation depend on (run seed, split, problem, sample), not on the checkpoint: checkpoints are
compared on common random numbers. Results go to ``evaluation.jsonl`` in the run's folder, one row per scored pair of
policy version and split, so an interrupted evaluation continues where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError
from stepalign.plugins import load_checker, load_grader
from stepalign.problems import load_problems, problems_sha256
from stepalign.scoring import GradedSample, Score, grade, score
from stepalign.types import FinishReason, Problem
from stepalign_models.loading import load_policy, load_tokenizer
from stepalign_models.sampling import Sampler, stable_seed
from stepalign_run.config import Config
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.jsonl import end_at_a_whole_row, read_rows
from stepalign_run.folder.layout import ADAPTER_FILE
from stepalign_run.heartbeat import Heartbeat
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import file_sha256
from stepalign_run.selection import evaluated_steps, select_step
from stepalign_solver.prompts import StudentPrompts

log = get_logger(__name__)


def evaluate(sampler: Sampler, prompts: StudentPrompts, problems: list[Problem], config: Config, split: str) -> Score:
    """Score ``evaluation.samples`` completions of every problem."""
    settings = config.evaluation
    grader = load_grader(config.data.grader)
    checker = load_checker(config.data.checker) if config.data.checker is not None else None
    draws = [(problem, sample) for problem in problems for sample in range(settings.samples)]
    graded: dict[str, list[GradedSample]] = {problem.id: [] for problem in problems}
    truncated = 0
    heartbeat = Heartbeat(config.run.heartbeat_file)
    for start in range(0, len(draws), settings.batch):
        heartbeat.beat()
        part = draws[start : start + settings.batch]
        parameters = [
            settings.parameters(stable_seed(config.run.seed, "evaluation", split, problem.id, sample))
            for problem, sample in part
        ]
        completions = sampler.sample([prompts.token_ids[problem.id] for problem, _ in part], parameters)
        for (problem, _), completion in zip(part, completions, strict=True):
            # A grader may take seconds for one answer.
            heartbeat.beat()
            truncated += completion.finish_reason is FinishReason.LENGTH
            length = len(completion.token_ids)
            graded[problem.id].append(
                grade(completion.text, length, completion.finish_reason, problem, grader, checker)
            )
    return score([graded[problem.id] for problem in problems], truncated, grader)


class Evaluator:
    """Evaluates a run's published adapters; ``wait`` is called until the next one exists."""

    def __init__(self, config: Config, wait: Callable[[], None] | None = None) -> None:
        if config.data.validation is None or config.data.test is None:
            raise ConfigError("evaluation needs data.validation, which picks the checkpoint, and data.test")
        self.config = config
        self.wait = wait
        self.tokenizer = load_tokenizer(config.model.path)
        self.problems = {
            "validation": load_problems(config.data.validation),
            "test": load_problems(config.data.test),
        }
        sources = {"validation": config.data.validation, "test": config.data.test}
        self.prompts = {
            split: StudentPrompts(config, self.tokenizer, problems, sources[split])
            for split, problems in self.problems.items()
        }
        self.heartbeat = Heartbeat(config.run.heartbeat_file)
        self.rows_path = config.folder.evaluations
        self.rows: dict[tuple[int, str], dict[str, Any]] = {}

    def run(self) -> dict[str, Any]:
        """Evaluate every checkpoint on validation, then the base and the picked one on test."""
        self.rows = self._read_rows()
        validation = {step: self._score(step, "validation") for step in self._available_steps()}
        figures = {step: row["figures"] for step, row in validation.items()}
        selected = select_step(figures, f"avg_at_{self.config.evaluation.samples}")
        base, best = self._score(0, "test"), self._score(selected, "test")
        summary = {
            "validation": {str(step): figures[step] for step in figures},
            "selected_step": selected,
            "base_test": base["figures"],
            "selected_test": best["figures"],
            "problem_ids": {split: [problem.id for problem in of_split] for split, of_split in self.problems.items()},
            "by_problem": {
                "validation": {str(step): row["by_problem"] for step, row in validation.items()},
                "base_test": base["by_problem"],
                "selected_test": best["by_problem"],
            },
            "problems_sha256": {"validation": validation[0]["problems_sha256"], "test": base["problems_sha256"]},
            "temperature": self.config.evaluation.temperature,
            "max_new_tokens": self.config.evaluation.max_new_tokens,
        }
        replace_text(self.config.folder.evaluation, json.dumps(summary, indent=1) + "\n")
        return summary

    def adapter(self, step: int) -> Path | None:
        return self.config.folder.adapter(step) if step else None

    def _available_steps(self) -> Iterator[int]:
        for step in evaluated_steps(self.config):
            adapter = self.adapter(step)
            while adapter is not None and not adapter.is_dir() and self.wait is not None:
                self.heartbeat.beat()
                self.wait()
            if adapter is None or adapter.is_dir():
                yield step
            else:
                log.warning("left out: there is no adapter of this step", step=step)

    def _score(self, step: int, split: str) -> dict[str, Any]:
        adapter = self.adapter(step)
        revision = file_sha256(adapter / ADAPTER_FILE) if adapter is not None else ""
        settings = self.config.evaluation.model_dump(mode="json", exclude={"every", "batch"})
        problems = {"validation": self.config.data.validation, "test": self.config.data.test}[split]
        made_with = {
            "adapter_sha256": revision,
            "problems_sha256": problems_sha256(problems) if problems is not None else "",
            "seed": self.config.run.seed,
            "settings": settings,
            "grader": self.config.data.grader,
            "checker": self.config.data.checker,
        }
        known = self.rows.get((step, split))
        if known is not None and {key: known.get(key) for key in made_with} == made_with and "by_problem" in known:
            return known
        started = time.monotonic()
        model = load_policy(self.config.model, adapter, merge=self.config.solver.merge_adapter)
        sampler = Sampler(model, self.tokenizer)
        scored = evaluate(sampler, self.prompts[split], self.problems[split], self.config, split)
        figures = scored.as_report()
        by_problem = scored.by_problem.as_report()
        row = {"step": step, "split": split, **made_with, "figures": figures, "by_problem": by_problem}
        self.rows[step, split] = row
        with self.rows_path.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps(row) + "\n")
        log.info("evaluated", step=step, split=split, seconds=round(time.monotonic() - started, 2), **figures)
        return row

    def _read_rows(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Rows of an earlier session. A last line that a kill cut short is dropped and evaluated again."""
        self.rows_path.parent.mkdir(parents=True, exist_ok=True)
        end_at_a_whole_row(self.rows_path)
        return {(row["step"], row["split"]): row for row in read_rows(self.rows_path)}
