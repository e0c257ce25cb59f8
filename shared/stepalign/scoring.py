"""Avg@k, Maj@k and Pass@k of graded samples, in percent.

A sample without an answer is wrong and casts no vote. Definitions:

- Avg@k: mean over problems of the share of right samples.
- Maj@k: the answer with the most votes among the k samples, by equivalence of answers; of tied answers each counts for
  its share, so that the order of samples has no influence; no vote at all is wrong.
- Pass@k: ``1 − C(n − c, k) / C(n, k)`` for c right ones of n samples, the unbiased estimator (Chen et al. 2021,
  arXiv 2107.03374).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from stepalign.grading import answer_key, answers_equal
from stepalign.trace import parse_trace
from stepalign.types import FinishReason


@dataclass(frozen=True)
class GradedSample:
    """One sampled solution. ``answer`` is None when the text holds no tagged answer."""

    answer: str | None
    correct: bool
    well_formed: bool
    tokens: int


@dataclass(frozen=True)
class Score:
    """Figures of one problem set. Shares in percent, lengths in tokens, EOS included."""

    problems: int
    samples: int
    avg: float
    maj: float
    pass_: float
    mean_tokens: float
    format_rate: float
    truncated: float

    def as_report(self) -> dict[str, float | int]:
        """The report's names: ``avg_at_12`` for 12 samples, and so on."""
        k = self.samples
        return {
            f"avg_at_{k}": round(self.avg, 4),
            f"maj_at_{k}": round(self.maj, 4),
            f"pass_at_{k}": round(self.pass_, 4),
            "mean_tokens": round(self.mean_tokens, 4),
            "format_rate": round(self.format_rate, 4),
            "truncated": round(self.truncated, 4),
            "problems": self.problems,
            "samples": k,
        }


def grade(text: str, tokens: int, finish_reason: FinishReason, known_answer: str) -> GradedSample:
    """Grade one solution. Right needs a tagged answer equal to the known one and an end by EOS."""
    trace = parse_trace(text)
    stopped = finish_reason is FinishReason.STOP
    answer = (trace.answer.body or None) if trace.answer is not None else None
    return GradedSample(
        answer=answer,
        correct=stopped and answer is not None and answers_equal(answer, known_answer),
        well_formed=stopped and trace.well_formed,
        tokens=tokens,
    )


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right. Raises ValueError unless 0 < k ≤ n."""
    if not 0 < k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} needs at least k samples and at most n right ones; n = {n}, right = {correct}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_share(samples: Sequence[GradedSample]) -> float:
    """1 when the most voted answer is right, 0 when it is wrong, the right share of a tie in between."""
    votes = Counter(answer_key(s.answer) for s in samples if s.answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = {key for key, count in votes.items() if count == most}
    right = {answer_key(s.answer) for s in samples if s.answer is not None and s.correct}
    return len(winners & right) / len(winners)


def score(graded: Sequence[Sequence[GradedSample]], truncated: int = 0) -> Score:
    """Score problems × samples. Raises ValueError when problems have different numbers of samples, or none."""
    counts = {len(samples) for samples in graded}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every problem needs the same number of samples, at least one; got {sorted(counts)}")
    k = counts.pop()
    flat = [sample for samples in graded for sample in samples]
    right = [sum(sample.correct for sample in samples) for samples in graded]

    def percent(total: float, of: int) -> float:
        return 100.0 * total / of

    return Score(
        problems=len(graded),
        samples=k,
        avg=percent(sum(right), len(flat)),
        maj=percent(sum(majority_share(samples) for samples in graded), len(graded)),
        pass_=percent(sum(pass_at_k(k, c, k) for c in right), len(graded)),
        mean_tokens=sum(sample.tokens for sample in flat) / len(flat),
        format_rate=percent(sum(sample.well_formed for sample in flat), len(flat)),
        truncated=percent(truncated, len(flat)),
    )
