"""Token ids of the student's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepalign.errors import ProblemFileError, PromptTooLongError, RefusedRow
from stepalign.prompts import load_prompt, render_token_ids
from stepalign.types import Problem
from stepalign_run.config import Config


class StudentPrompts:
    """Token ids of the student's prompts. All problems are checked before the first is sampled."""

    def __init__(self, config: Config, tokenizer: Any, problems: list[Problem], source: Path) -> None:
        prompt = load_prompt(config.model.prompts, "student")
        self.token_ids: dict[str, list[int]] = {}
        refused: list[RefusedRow] = []
        for row, problem in enumerate(problems, start=1):
            ids = render_token_ids(
                tokenizer, prompt.fill(question=problem.question), **config.model.chat_template_options
            )
            if len(ids) > config.solver.max_prompt_tokens:
                what, budget = f"the prompt of problem {problem.id!r}", config.solver.max_prompt_tokens
                error = PromptTooLongError(what, len(ids), budget, "solver.max_prompt_tokens")
                refused.append(RefusedRow(row, str(error), unit="problem"))
            self.token_ids[problem.id] = ids
        if refused:
            raise ProblemFileError(str(source), refused)
