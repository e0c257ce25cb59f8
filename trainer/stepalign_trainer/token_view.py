"""The teaching of each context, token by token, for the report. One JSON object per rollout in ``tokens.jsonl``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepalign.critique.answers import Grader
from stepalign.critique.trace import parse_trace
from stepalign.errors import GraderError, UnusableRolloutError
from stepalign.scoring import is_right
from stepalign_run.context import Context, ContextKind
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.jsonl import read_rows
from stepalign_run.folder.layout import RunFolder
from stepalign_run.logging import get_logger
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import ContextResult
from stepalign_trainer.batch.examples import check_readable, teacher_prompt_ids
from stepalign_trainer.batch.item import Item
from stepalign_trainer.batch.scope import token_groups
from stepalign_trainer.batch.spans import token_spans
from stepalign_trainer.update.learner import Learner

log = get_logger(__name__)

DIGITS = 4


class TokenJournal:
    def __init__(self, run_dir: Path) -> None:
        self.path = RunFolder(run_dir).tokens

    def replace(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write the rows of update ``step`` in the place of those that an interrupted run wrote."""
        kept = [row for row in read_rows(self.path) if row["step"] < step]
        replace_text(self.path, "".join(json.dumps(row) + "\n" for row in [*kept, *rows]))


def contexts_of(rollout: Rollout, result: ContextResult) -> list[Context]:
    """The contexts that can be made for this rollout: the arm's own, its critique, and the reference solution."""
    found = {result.context.kind: result.context} if result.context is not None else {}
    if result.critique is not None:
        critique = Context(kind=ContextKind.CRITIQUE, text=result.critique.text)
        found.setdefault(ContextKind.CRITIQUE, critique)
    reference = rollout.problem.reference_solution
    if reference is not None:
        found.setdefault(ContextKind.REFERENCE, Context(kind=ContextKind.REFERENCE, text=reference))
    return list(found.values())


def token_rows(learner: Learner, step: int, items: Sequence[Item], grader: Grader, count: int) -> list[dict[str, Any]]:
    """Rows of ``count`` rollouts before update ``step``; fewer only where the others cannot be read."""
    rows: list[dict[str, Any]] = []
    for item in _by_problem(items):
        if len(rows) == count:
            break
        try:
            rows.append(_token_row(learner, step, item.rollout, item.context, grader))
        except UnusableRolloutError as error:
            log.info("not shown", rollout_id=item.rollout.rollout_id, reason=error.reason.value)
    return rows


def _by_problem(items: Sequence[Item]) -> list[Item]:
    """Every problem once before any a second time, since the rollouts of one are much alike."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, Item]] = []
    for item in items:
        problem = item.rollout.problem.id
        ranked.append((seen[problem], item))
        seen[problem] += 1
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]


def _token_row(learner: Learner, step: int, rollout: Rollout, result: ContextResult, grader: Grader) -> dict[str, Any]:
    """Contexts over the teacher's prompt budget are left out. Raises UnusableRolloutError as an update does."""
    check_readable(rollout, rollout.prompt_token_ids, learner.limits)
    spans = token_spans(rollout, learner.tokenizer)
    groups = token_groups(learner.config.arm.scope, rollout, result.critique, spans)
    contexts: dict[str, Any] = {}
    completion, prompt = rollout.completion_token_ids, rollout.prompt_token_ids
    logprobs = learner.token_values(prompt, prompt, completion).logprob
    for context in contexts_of(rollout, result):
        try:
            teacher_prompt = teacher_prompt_ids(learner.config, learner.tokenizer, rollout, context)
            check_readable(rollout, teacher_prompt, learner.limits)
        except UnusableRolloutError:
            continue
        terms = learner.token_values(prompt, teacher_prompt, completion)
        contexts[context.kind.value] = {
            "text": context.text,
            "advantage": _rounded(terms.advantage.tolist()),
            "kl": _rounded(terms.kl.tolist()),
        }
    return {
        "step": step,
        "rollout_id": rollout.rollout_id,
        "problem": rollout.problem.model_dump(include={"id", "question", "answer", "reference_solution"}),
        "verdict": result.critique.verdict.value if result.critique is not None else None,
        "correct": _is_correct(rollout, grader),
        "finish_reason": rollout.finish_reason.value,
        "first_error_token": groups.first_error,
        "in_scope": groups.in_scope,
        "tokens": _pieces(rollout, spans),
        "logprob": _rounded(logprobs.tolist()),
        "contexts": contexts,
    }


def _pieces(rollout: Rollout, spans: list[tuple[int, int]]) -> list[str]:
    """The text of each token. Of tokens that share a character the first shows it."""
    shown: list[str] = []
    reached = 0
    for start, end in spans:
        shown.append(rollout.text[max(start, reached) : end])
        reached = max(reached, end)
    return shown


def _is_correct(rollout: Rollout, grader: Grader) -> bool | None:
    try:
        return is_right(parse_trace(rollout.text), rollout.finish_reason, rollout.problem, grader)
    except GraderError:
        return None


def _rounded(values: list[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]
