"""The probe's figures, as pure functions of per-token values and of graded samples.

The error segment of a rollout goes from its first-error token to the end of the first segment that its critique does
not copy, where the scope ``through_first_error`` ends. Definitions::

    contrast   means of A_t before the first error, at its token, and after the error segment
    focus      Σ KL_t over the error segments / Σ KL_t over the tokens in the arm's scope, over rollouts with an error
    score      solve rate × focus                                                     self-distillation
               mean over problems of 1 − p^G − (1 − p)^G                              GRPO with groups of G

The reasoning: the loss should push where the first error is (focus), and the teacher that it pushes towards should be
right (solve rate). A group teaches GRPO something only where its rewards differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb

import torch

from stepalign.scoring import GradedSample
from stepalign_run.probing import Contrast, Estimate
from stepalign_trainer.batch.scope import TokenGroups
from stepalign_trainer.update.metrics import BELOW

RESAMPLES = 10_000
LEVEL = 0.95
NO_KL = 1e-6
"""Nats per token under which a loss is rounding."""


@dataclass(frozen=True)
class ScoredRollout:
    """A context's word on each of a rollout's tokens. ``advantage`` and ``kl`` are ``[T]`` in nats.

    ``groups`` are those of the scope ``through_first_error``: ``groups.in_scope`` is the end of the error segment.
    """

    groups: TokenGroups
    advantage: torch.Tensor
    kl: torch.Tensor


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of ``values`` and its percentile interval: means of 10,000 resamples of them. None without any."""
    if not values:
        return None
    given = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    tail = (1 - LEVEL) / 2
    lower, upper = torch.quantile(given[drawn].mean(-1), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value=round(given.mean().item(), 6), lower=round(lower, 6), upper=round(upper, 6))


def scaled(rate: Estimate, factor: float) -> Estimate:
    """The interval of a rate times a number that is taken as known."""
    return Estimate(**{name: round(value * factor, 6) for name, value in rate.model_dump().items()})


def mean(values: Iterable[torch.Tensor]) -> float | None:
    """The mean over all elements; None without any."""
    parts = list(values)
    joined = torch.cat(parts) if parts else torch.empty(0)
    return round(joined.mean().item(), 6) if joined.numel() else None


def contrast(rows: Sequence[ScoredRollout]) -> Contrast:
    """Means over the tokens of all rollouts, each token counting the same, as in ``metrics.jsonl``."""
    correct = [row.advantage[: row.groups.first_error] for row in rows if row.groups.aligned]
    wrong = [(row, row.groups.first_error) for row in rows if row.groups.first_error is not None]
    return Contrast(
        correct=mean(correct),
        below=mean((values < BELOW).float() for values in correct),
        at_error=mean(row.advantage[error : error + 1] for row, error in wrong),
        tail=mean(row.advantage[row.groups.in_scope :] for row, _ in wrong),
    )


def focus(rows: Sequence[ScoredRollout], in_scope: Sequence[int]) -> float | None:
    """The share of the loss that lies in the error segments. ``in_scope``: the arm's scope of each rollout, in tokens.

    None where there is no loss: no rollout with an error, or a teacher that says what the student says.
    """
    inside = outside = 0.0
    tokens = 0
    for row, end in zip(rows, in_scope, strict=True):
        error = row.groups.first_error
        if error is None:
            continue
        loss = row.kl[:end].double()
        segment = loss[error : row.groups.in_scope].sum().item()
        inside += segment
        outside += loss.sum().item() - segment
        tokens += end
    mass = inside + outside
    return round(inside / mass, 6) if mass > NO_KL * tokens else None


def differing(right: int, samples: int, group: int) -> float:
    """An unbiased estimate of the chance that a group has differing rewards: ``1 − p^G − (1 − p)^G``.

    Of ``samples`` of one problem ``right`` are right; the estimate is the share of their subsets of size ``group`` that
    are neither all right nor all wrong (as Pass@k: Chen et al. 2021, arXiv 2107.03374). Raises ValueError for fewer
    samples than a group has: no function of them is then unbiased.
    """
    if not 0 <= right <= samples or not 1 <= group <= samples:
        raise ValueError(f"a group of {group} needs as many samples, and at most all are right: {right} of {samples}")
    return 1 - (comb(right, group) + comb(samples - right, group)) / comb(samples, group)


def solve_rate(graded: Sequence[Sequence[GradedSample]]) -> Estimate | None:
    """Mean share of right samples over rollouts or problems, as they were sampled. Grader errors are left out."""
    shares: list[float] = []
    for samples in graded:
        known = [float(sample.correct) for sample in samples if sample.correct is not None]
        if known:
            shares.append(sum(known) / len(known))
    return estimate(shares)
