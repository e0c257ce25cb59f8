"""Avg@k, Maj@k and Pass@k of graded samples, in percent.

A sample without an answer is wrong and casts no vote. A sample on which the grader failed is neither right nor wrong:
it is counted, leaves the figures, and casts no vote. Definitions, over the n ≤ k graded samples of a problem:

- Avg@k: mean over problems of the share of right samples.
- Maj@k: the class of equal answers with the most votes among the samples (``critique/answers.py``: an answer joins the
  first class whose first member the grader finds equal; unknown is not equal). Right answers make the first class, the
  others follow as they were sampled. Of tied classes each counts for its share; no vote at all is wrong.
- Pass@k: ``1 − C(n − c, k) / C(n, k)`` for c right ones of n samples, the unbiased estimator (Chen et al. 2021,
  arXiv 2107.03374), at k = n.
- Trace@k: as Avg@k, right being that an exact checker finds every step right too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

from stepalign.critique.alignment import in_sent_text, validate_critique
from stepalign.critique.answers import Grader, answers_equal, equal_classes, same_text
from stepalign.critique.splitting import split_attempt
from stepalign.critique.trace import Trace, parse_trace
from stepalign.errors import ConfigError, GraderError
from stepalign.plugins import Checker
from stepalign.types import Critique, FinishReason, Problem, Verdict

_MOST_SHOWN = 200
"""Characters of an answer in a message."""


@dataclass(frozen=True)
class GradedSample:
    """One sampled solution. ``answer`` is None when the text holds no tagged answer."""

    answer: str | None
    correct: bool | None
    """None when the grader or the checker failed, or the grader could not tell."""
    well_formed: bool
    tokens: int
    trace_correct: bool | None = None
    """None without a checker."""


@dataclass(frozen=True)
class ProblemFigures:
    """Figures of each problem, in the order of the problem file. Intervals are made from them."""

    correct: list[int] = field(default_factory=list[int])
    """Right samples."""
    graded: list[int] = field(default_factory=list[int])
    """Samples that were graded."""
    majority: list[float] = field(default_factory=list[float])
    """1 when the most voted answer is right, its share of a tie in between."""
    trace_correct: list[int] | None = None
    """Samples with every step right; None without a checker."""

    def as_report(self) -> dict[str, Any]:
        return {
            "correct": self.correct,
            "graded": self.graded,
            "majority": [round(share, 6) for share in self.majority],
            "trace_correct": self.trace_correct,
        }


@dataclass(frozen=True)
class Score:
    """Figures of one problem set. Shares in percent, lengths in tokens, EOS included."""

    problems: int
    samples: int
    avg: float
    maj: float
    pass_: float
    trace: float | None
    mean_tokens: float
    format_rate: float
    truncated: float
    grader_errors: int
    by_problem: ProblemFigures

    def as_report(self) -> dict[str, float | int]:
        """The report's names: ``avg_at_12`` for 12 samples, and so on."""
        k = self.samples
        figures: dict[str, float | int] = {
            f"avg_at_{k}": round(self.avg, 4),
            f"maj_at_{k}": round(self.maj, 4),
            f"pass_at_{k}": round(self.pass_, 4),
            "mean_tokens": round(self.mean_tokens, 4),
            "format_rate": round(self.format_rate, 4),
            "truncated": round(self.truncated, 4),
            "grader_errors": self.grader_errors,
            "problems": self.problems,
            "samples": k,
        }
        if self.trace is not None:
            figures[f"trace_at_{k}"] = round(self.trace, 4)
        return figures


def is_right(
    trace: Trace,
    finish_reason: FinishReason,
    problem: Problem,
    grader: Grader = answers_equal,
    *,
    needs_eos: bool = True,
) -> bool:
    """Whether a solution has a tagged answer, equal to the known one, and the model ended it by itself.

    Raises GraderError on any exception of the grader, and where it cannot tell.
    """
    answer = trace.answer.body if trace.answer is not None else ""
    if not answer or (needs_eos and finish_reason is not FinishReason.STOP):
        return False
    try:
        said = grader(answer, problem.answer)
    except Exception as error:
        raise GraderError(f"the grader failed on {_shown(answer)}: {type(error).__name__}: {error}") from error
    if said is None and not same_text(answer, problem.answer):
        raise GraderError(f"the grader cannot tell whether {_shown(answer)} is {_shown(problem.answer)}")
    return said is None or bool(said)


def _shown(answer: str) -> str:
    return repr(answer if len(answer) <= _MOST_SHOWN else f"{answer[:_MOST_SHOWN]}…")


def trace_critique(problem: Problem, text: str, checker: Checker, grader: Grader = answers_equal) -> Critique | None:
    """The exact critique of a solution; None where the checker's does not validate, so that no alignment is known.

    As the critic does, the checker reads an untagged solution with tags. Raises ConfigError when the checker cannot
    handle the problem (its ValueError), and GraderError on any other exception of it.
    """
    split = split_attempt(text)
    try:
        said = checker(problem.question, split.tagged)
    except ValueError as error:
        raise ConfigError(f"data.checker cannot handle problem {problem.id!r}: {error}") from None
    except Exception as error:
        raise GraderError(f"the checker failed on a solution: {type(error).__name__}: {error}") from error
    critique = validate_critique(said, split.tagged, known_answer=problem.answer, grader=grader)
    return in_sent_text(critique, split) if isinstance(critique, Critique) else None


def grade(
    text: str,
    tokens: int,
    finish_reason: FinishReason,
    problem: Problem,
    grader: Grader = answers_equal,
    checker: Checker | None = None,
) -> GradedSample:
    """Grade one solution by :func:`is_right`. One on which grader or checker fails is neither right nor wrong.

    Raises ConfigError when the checker cannot handle the problem.
    """
    trace = parse_trace(text)
    answer = (trace.answer.body or None) if trace.answer is not None else None
    every_step = None if checker is None else False
    try:
        correct = is_right(trace, finish_reason, problem, grader)
        if checker is not None and correct:
            critique = trace_critique(problem, text, checker, grader)
            every_step = critique is not None and critique.verdict is Verdict.CORRECT
    except GraderError:
        correct = None
    return GradedSample(
        answer=answer,
        correct=correct,
        well_formed=finish_reason is FinishReason.STOP and trace.well_formed,
        tokens=tokens,
        trace_correct=every_step,
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right. Raises ValueError unless 0 < k ≤ n."""
    if not 0 < k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} needs at least k samples and at most n right ones; n = {n}, right = {correct}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_share(samples: Sequence[GradedSample], grader: Grader = answers_equal) -> float:
    """1 when the most voted class of answers is right, 0 when it is wrong, the right share of a tie in between.

    A class is right when a sample in it is.
    """
    voted = [(s.answer, s.correct) for s in samples if s.answer is not None and s.correct is not None]
    right = {answer for answer, correct in voted if correct}
    if not voted:
        return 0.0
    # The grader found all right answers equal to the known one: they are one class, whatever it says of two of them.
    seed = next((answer for answer, correct in voted if correct), None)
    others = [answer for answer, _ in voted if answer not in right]
    classes = equal_classes(others if seed is None else [seed, *others], grader)
    classes[0] |= right
    votes = [sum(answer in members for answer, _ in voted) for members in classes]
    winners = [members for members, count in zip(classes, votes, strict=True) if count == max(votes)]
    return sum(not right.isdisjoint(members) for members in winners) / len(winners)


def score(samples: Sequence[Sequence[GradedSample]], truncated: int = 0, grader: Grader = answers_equal) -> Score:
    """Score problems × samples, whose answers ``grader`` graded.

    Raises ValueError when problems have different numbers of samples, or none.
    """
    counts = {len(of_problem) for of_problem in samples}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every problem needs the same number of samples, at least one; got {sorted(counts)}")
    flat = [sample for of_problem in samples for sample in of_problem]
    checked = [[s.trace_correct for s in of_problem] for of_problem in samples]
    figures = ProblemFigures(
        correct=[sum(s.correct is True for s in of_problem) for of_problem in samples],
        graded=[sum(s.correct is not None for s in of_problem) for of_problem in samples],
        majority=[majority_share(of_problem, grader) for of_problem in samples],
        trace_correct=None if None in checked[0] else [sum(map(bool, of_problem)) for of_problem in checked],
    )

    def mean(of_problem: Callable[[int], float]) -> float:
        """In percent, over the problems of which something was graded."""
        values = [of_problem(i) for i, n in enumerate(figures.graded) if n]
        return 100.0 * sum(values) / len(values) if values else 0.0

    def percent(total: float) -> float:
        return 100.0 * total / len(flat)

    correct, graded, traces = figures.correct, figures.graded, figures.trace_correct
    return Score(
        problems=len(samples),
        samples=counts.pop(),
        avg=mean(lambda i: correct[i] / graded[i]),
        maj=mean(lambda i: figures.majority[i]),
        pass_=mean(lambda i: pass_at_k(graded[i], correct[i], graded[i])),
        trace=None if traces is None else mean(lambda i: traces[i] / graded[i]),
        mean_tokens=sum(sample.tokens for sample in flat) / len(flat),
        format_rate=percent(sum(sample.well_formed for sample in flat)),
        truncated=percent(truncated),
        grader_errors=len(flat) - sum(graded),
        by_problem=figures,
    )


def chance(answer_choices: int, samples: int) -> dict[str, float]:
    """The figures of a uniform guesser among ``answer_choices`` answers, in percent, by the report's names."""
    share = 1.0 / answer_choices
    return {
        f"avg_at_{samples}": round(100.0 * share, 4),
        f"maj_at_{samples}": round(100.0 * share, 4),
        f"pass_at_{samples}": round(100.0 * (1.0 - (1.0 - share) ** samples), 4),
    }
