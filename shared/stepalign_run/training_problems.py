"""The problems that a run trains on: each must fit into an entry of the queue, with room for a rollout."""

from __future__ import annotations

from stepalign.errors import ProblemFileError, RefusedRow
from stepalign.problems import load_problems
from stepalign.types import Problem
from stepalign_run.config import Config

_NAMED = 5


def load_training_problems(config: Config) -> list[Problem]:
    """The problems of ``data.train``. Raises ProblemFileError, also where one alone fills an entry of the queue."""
    problems = load_problems(config.data.train)
    most = config.queue.max_entry_bytes
    large = [problem.id for problem in problems if len(problem.model_dump_json().encode()) >= most]
    if large:
        more = f" and {len(large) - _NAMED} more" if len(large) > _NAMED else ""
        reason = (
            f"too large for an entry of the queue: {', '.join(large[:_NAMED])}{more}; shorten them, or raise "
            f"queue.max_entry_bytes, which is {most}"
        )
        raise ProblemFileError(str(config.data.train), [RefusedRow(0, reason)])
    return problems
