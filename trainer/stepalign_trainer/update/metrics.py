"""The figures of one update, from the values of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.divergence import TokenTerms

BELOW = -0.1
"""A correct token whose advantage is below this is being changed."""


@dataclass(frozen=True)
class UpdateMetrics:
    """Figures of one update. Advantages and KL in nats, lengths in tokens; None where no token was in the group.

    Without a critique and without a checker no token is known to be correct, and the advantages by group are None.
    """

    loss: float
    kl_all_tokens: float | None
    advantage_correct: float | None
    advantage_correct_below: float | None
    """Share of the tokens before the first error whose advantage is below −0.1."""
    advantage_at_error: float | None
    advantage_after_error: float | None
    first_token_kl: float | None
    entropy: float | None
    mean_tokens: float
    truncated: float
    grad_norm: float
    trained_rollouts: int
    tokens: int
    tokens_in_scope: int
    signal_share: float | None
    """Share of the tokens in scope that the objective pushes somewhere."""
    update_seconds: float
    tokens_per_second: float
    of_objective: Mapping[str, float] = field(default_factory=dict[str, float])
    """The columns that the objective adds."""

    def as_row(self) -> dict[str, Any]:
        row = asdict(self)
        of_objective = row.pop("of_objective")
        return {**row, **of_objective}


@dataclass
class BatchTerms:
    """One pass over a batch: its loss, and each example's values on the CPU."""

    loss: float = 0.0
    of: list[TokenTerms] = field(default_factory=list[TokenTerms])


@dataclass(frozen=True)
class Step:
    """The figures of an optimizer step. ``grad_norm`` is that before clipping."""

    tokens_in_scope: int
    grad_norm: float
    seconds: float


def update_metrics(
    examples: Sequence[Example], before: BatchTerms, step: Step, of_objective: Mapping[str, float]
) -> UpdateMetrics:
    """``before`` holds the values before the first optimizer step."""
    pairs = list(zip(examples, before.of, strict=True))
    tokens = sum(len(example.completion) for example in examples)
    count = max(len(examples), 1)
    correct = [terms.advantage[: e.groups.first_error] for e, terms in pairs if e.groups.aligned]
    wrong = [(terms.advantage, error) for e, terms in pairs if (error := e.groups.first_error) is not None]
    return UpdateMetrics(
        loss=before.loss,
        kl_all_tokens=_mean([terms.kl for terms in before.of]),
        advantage_correct=_mean(correct),
        advantage_correct_below=_mean([(values < BELOW).float() for values in correct]),
        advantage_at_error=_mean([advantage[error : error + 1] for advantage, error in wrong]),
        advantage_after_error=_mean([advantage[error + 1 :] for advantage, error in wrong]),
        first_token_kl=_mean([terms.kl[:1] for terms in before.of]),
        entropy=_mean([terms.entropy for terms in before.of]),
        mean_tokens=tokens / count,
        truncated=sum(example.truncated for example in examples) / count,
        grad_norm=step.grad_norm,
        trained_rollouts=len(examples),
        tokens=tokens,
        tokens_in_scope=step.tokens_in_scope,
        signal_share=_mean([terms.signal[: e.groups.in_scope] for e, terms in pairs]),
        update_seconds=step.seconds,
        tokens_per_second=tokens / step.seconds if step.seconds else 0.0,
        of_objective=of_objective,
    )


def _mean(parts: Sequence[torch.Tensor]) -> float | None:
    values = torch.cat(list(parts)) if parts else torch.empty(0)
    return values.mean().item() if values.numel() else None
