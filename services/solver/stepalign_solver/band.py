"""Choosing problems by difficulty: those that the base model solves now and then.

A problem that is always solved holds nothing to learn, one that is never solved gives a reward nothing to find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError
from stepalign.plugins import load_grader
from stepalign.problems import load_problems
from stepalign.scoring import grade
from stepalign.types import Problem
from stepalign_models.loading import load_policy, load_tokenizer
from stepalign_models.sampling import Completion, Sampler, stable_seed
from stepalign_run.config import Config
from stepalign_solver.prompts import StudentPrompts


@dataclass(frozen=True)
class Band:
    """Problems solved ``at_least`` to ``at_most`` times of ``samples``, both included."""

    samples: int
    at_least: int
    at_most: int

    def __post_init__(self) -> None:
        if not 0 <= self.at_least <= self.at_most <= self.samples or self.samples < 1:
            raise ConfigError(
                f"a band of {self.at_least} to {self.at_most} solved of {self.samples} samples; "
                "it takes 0 <= at least <= at most <= samples"
            )


def base_completions(
    config: Config, candidates: Path, samples: int, purpose: str, progress: Callable[[int, int], None]
) -> list[tuple[Problem, Completion]]:
    """``samples`` completions of each problem by the base model, sampled as the solver samples its rollouts.

    The random numbers depend on (run seed, ``purpose``, problem, sample) alone.
    """
    problems = load_problems(candidates)
    tokenizer = load_tokenizer(config.model.path)
    prompts = StudentPrompts(config, tokenizer, problems, candidates)
    sampler = Sampler(load_policy(config.model, None, merge=False), tokenizer)
    draws = [(problem, sample) for problem in problems for sample in range(samples)]
    found: list[tuple[Problem, Completion]] = []
    for start in range(0, len(draws), config.solver.batch):
        part = draws[start : start + config.solver.batch]
        parameters = [
            config.solver.parameters(stable_seed(config.run.seed, purpose, problem.id, sample))
            for problem, sample in part
        ]
        completions = sampler.sample([prompts.token_ids[problem.id] for problem, _ in part], parameters)
        found += [(problem, completion) for (problem, _), completion in zip(part, completions, strict=True)]
        progress(len(found), len(draws))
    return found


def solved_counts(config: Config, candidates: Path, samples: int, progress: Callable[[int, int], None]) -> list[int]:
    """How often the base model solves each problem of the file, in its order.

    A sample that the grader fails on is not solved.
    """
    grader = load_grader(config.data.grader)
    solved = [
        grade(completion.text, len(completion.token_ids), completion.finish_reason, problem, grader).correct is True
        for problem, completion in base_completions(config, candidates, samples, "band", progress)
    ]
    return [sum(solved[start : start + samples]) for start in range(0, len(solved), samples)]


def chosen_rows(problems: list[Problem], counts: list[int], band: Band) -> list[dict[str, Any]]:
    """Rows of a problem file, in the candidates' order; each says in its metadata how often it was solved."""
    return [
        problem.model_dump(mode="json", exclude_none=True)
        | {"metadata": {**problem.metadata, "band": {"solved": count, "samples": band.samples}}}
        for problem, count in zip(problems, counts, strict=True)
        if band.at_least <= count <= band.at_most
    ]
